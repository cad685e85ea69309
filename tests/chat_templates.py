"""Chat templates in the forms of published models, and small tokenizers, for tests of labels.

Each has a peculiarity of a released template; the words are ours.
"""

import json

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2-VL: a system prompt of its own where none is given.
QWEN_VL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    + _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
)
INTERNVL = _CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
MOLMO2 = _CHATML.replace("IMAGE", "<|image|>")
# The same with marks, where TRL's training templates have them: behind the header, and around the
# end of the turn with its line break.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}" + _PARTS + "<|im_end|>\n{% endgeneration %}{% else %}" + _PARTS
    + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")  # fmt: skip
# Marks around the text alone, and a header that ends with a space (LLaVA-1.5): no end token.
LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ c.text + ' ' }}{% endgeneration %}{% else %}{{ c.text + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Gemma 3: trims, another name of the role, the system prompt in the first turn, roles in turn.
GEMMA = """{{ bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content if messages[0].content is string
                    else messages[0].content[0].text %}
    {%- set first = first + '\n\n' %}{% set turns = messages[1:] %}
{%- endif %}
{%- for m in turns %}
    {%- set users = loop.index0 % 2 == 0 %}
    {%- if (m.role == 'user') != users %}{{ raise_exception('no turns') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {{- first if loop.first }}
    {%- if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}
        {{- '<start_of_image>' if c.type == 'image' else c.text | trim }}
    {%- endfor %}{% endif %}{{ '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# SmolVLM: the space belongs to the turn, not to its header.
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Llama 3: the header's line breaks may merge with those of the text; no line break at the end.
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
# Mistral: no header at all, nothing for `add_generation_prompt`; no system prompt.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# Phi-3: an end of the text where no answer is asked for.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# Qwen3: thinking parts stay in what follows on the last question alone, and there is always one.
QWEN3 = """{% set last = namespace(user=-1) %}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
                      if '</think>' in m.content else '' %}
    {%- if m.role == 'assistant' and loop.index0 > last.user %}
        {{- '<think>\n' + thought + '\n</think>\n\n' + text }}
    {%- elif m.role == 'assistant' %}{{ text }}{% else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# DeepSeek-R1: a prompt opens the thinking part that answers go without.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + "
    "m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)

# Family -> template, text of a placeholder, token of a visual token.
SEEING = {
    "qwen2_vl": (QWEN_VL, "<|image_pad|>", "<|image_pad|>"),
    "internvl": (INTERNVL, "<IMG_CONTEXT>", "<IMG_CONTEXT>"),
    "molmo2": (MOLMO2, "<|image|>", "<im_patch>"),
    "gemma3": (GEMMA, "<start_of_image>", "<image_soft_token>"),
    "smolvlm": (SMOLVLM, "<image>", "<image>"),
    "llava": (LLAVA, "<image>", "<image>"),
}
READING = {"llama3": LLAMA3, "mistral": MISTRAL, "phi3": PHI3, "qwen3": QWEN3, "r1": R1}
SPECIAL = [
    *("<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<IMG_CONTEXT>", "<|image|>"),
    *("<im_patch>", "<|header|>", "<|/header|>", "<|eot|>", "<|end|>", "<|user|>"),
    *("<|assistant|>", "<|system|>", "<think>", "</think>"),
]
_CORPUS = [
    "What is this? It is a cat.\n\nAnd this: a dog. User: Assistant: USER: ASSISTANT:",
    "Be brief. Be helpful. Yes. No. It is a small red house on a hill",
] * 8


def byte_level(trim_offsets: bool | None = None) -> Backend:
    """BPE of bytes, as of GPT-2; `trim_offsets` of a post-processor, None for no such."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if trim_offsets is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return backend


def pieces() -> Backend:
    """BPE of sentencepiece, as of Llama 2 and Gemma: a space is a letter, one in front of all."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    letters = sorted({c for text in _CORPUS for c in text.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 257 + len(letters) + 60,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def saved(backend: Backend, directory, **special: str):
    """Writes a tokenizer to a directory."""
    backend.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>"} | special
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    return directory
