"""Labels against transformers: its mask of assistant tokens, differences of its prompts, and the
labels of PaliGemma's processor.

Its processors for Qwen-VL and InternVL need torchvision, so those templates go through its
tokenizer with the texts of our pictures, which the tests of pictures compare with the processors'.
"""

import itertools

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.23")
from chat_templates import (
    GEMMA,
    LLAVA,
    MARKED,
    QWEN3,
    READING,
    SEEING,
    SMOLVLM,
    byte_level,
    pieces,
)
from PIL import Image
from tokenizers import processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from efficient_vlm.families.table import FAMILIES
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.labels import labelled

pytestmark = pytest.mark.parity

# The same templates with marks around what the model writes: transformers' mask needs them.
GEMMA_MARKED = (
    GEMMA.replace(
        "{%- if m.content is string %}",
        "{%- if m.role == 'assistant' %}{% generation %}{{ (m.content if m.content is string else "
        "m.content[0].text) | trim }}{{ '<end_of_turn>\n' }}{% endgeneration %}{% else %}"
        "{%- if m.content is string %}",
    )
).replace(
    "{{ '<end_of_turn>\n' }}\n{%- endfor %}", "{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
)
SMOLVLM_MARKED = (
    "<|im_start|>{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant:"
    "{% generation %} {{ m['content'][0]['text'] }}<end_of_utterance>\n{% endgeneration %}"
    "{% else %}"
    + SMOLVLM.removeprefix("<|im_start|>{% for m in messages %}").replace(
        "{% endfor %}<end_of_utterance>\n{% endfor %}",
        "{% endfor %}<end_of_utterance>\n{% endif %}{% endfor %}",
    )
)
_QWEN3_HEAD, _ = QWEN3.split("    {%- if m.role == 'assistant' and")
QWEN3_MARKED = (
    _QWEN3_HEAD
    + """{%- set late = loop.index0 > last.user %}{%- if m.role == 'assistant' %}{% generation %}
    {{- '<think>\n' + thought + '\n</think>\n\n' if late }}{{ text + '<|im_end|>\n' }}
    {%- endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
TEXTS = ["It is a cat.", " A naïve 犬 \n", "\n\nNo"]


def turn(role, *parts):
    return {
        "role": role,
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def turns(text, pictures):
    """One and two turns, pictures in front and behind."""
    first, last = (None,) * (pictures > 0), (None,) * (pictures > 1)
    one = [turn("user", *first, "What is this?"), turn("assistant", text)]
    return one, [*one, turn("user", "And this?", *last), turn("assistant", "A dog.")]


def as_texts(messages):
    """As language models take them."""
    return [{**m, "content": "".join(p["text"] for p in m["content"])} for m in messages]


def fast(backend, **special):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=special
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Tokenizers in transformers and, from the files that it saves, here."""

    def pair(backend):
        theirs, directory = fast(backend), tmp_path_factory.mktemp("tokenizer")
        theirs.save_pretrained(directory)
        return theirs, HubTokenizer.from_hf(directory)

    made = {"bytes": byte_level(), "trimmed": byte_level(trim_offsets=True), "pieces": pieces()}
    return {name: pair(backend) for name, backend in made.items()}


def ours(family, template, tok, messages, pictured=(), token="<image>"):
    config = {
        name: tok.id_of(token) for name in ("image_token_id", "image_token_index", "image_patch_id")
    }
    style = FAMILIES[family].prompt_style(config)
    template = Template(template, tok.special)
    ids, targets = labelled(style, template, tok, messages, pictured)
    return ids, [int(target) for target in targets]


def by_mask(theirs, template, messages):
    """Ids and mask of a template with marks."""
    out = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def by_difference(theirs, template, messages):
    """Ids, and what is behind the tokens of each prompt, up to where the turn's own end."""

    def ids(some, asked):
        return theirs.apply_chat_template(
            some, chat_template=template, add_generation_prompt=asked, return_dict=False
        )

    def common(first, second):
        pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(first, second, strict=False))
        return len(list(pairs))

    whole = ids(messages, False)
    mask = [0] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = common(ids(messages[:i], True), whole)
            stop = common(ids(messages[: i + 1], False), whole)
            mask[start:stop] = [1] * (stop - start)
    return whole, mask


@pytest.mark.parametrize("tokenizer", ["bytes", "trimmed", "pieces"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("family", "marked"),
    [
        ("llava", LLAVA),
        ("qwen2_vl", MARKED),
        ("gemma3", GEMMA_MARKED),
        ("smolvlm", SMOLVLM_MARKED),
        ("qwen3", QWEN3_MARKED),
    ],
)
def test_marks(pairs, family, marked, text, tokenizer):
    theirs, tok = pairs[tokenizer]
    for messages, system in itertools.product(turns(text, 0), (False, True)):
        messages = [SYSTEM, *messages] if system else messages
        if family == "qwen3":
            messages = as_texts(messages)
        ids, mask = by_mask(theirs, marked, messages)
        assert ours(family, marked, tok, messages) == (ids, mask)
        assert 1 in mask


@pytest.mark.parametrize(
    ("family", "plain", "marked"),
    [
        (
            "qwen2_vl",
            MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            MARKED,
        ),
        ("gemma3", GEMMA, GEMMA_MARKED),
        ("smolvlm", SMOLVLM, SMOLVLM_MARKED),
        ("qwen3", QWEN3, QWEN3_MARKED),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "pieces"])
def test_marks_that_were_added(pairs, family, plain, marked, tokenizer):
    """Without marks the same is found as transformers finds with them, thinking parts included."""
    theirs, tok = pairs[tokenizer]
    thoughts = "<think>\nFur.\n</think>\n\nIt is a cat."
    for text, system in itertools.product([*TEXTS, thoughts], (False, True)):
        for messages in turns(text, 0):
            messages = [SYSTEM, *messages] if system else messages
            if family == "qwen3":
                messages = as_texts(messages)
            assert ours(family, plain, tok, messages) == by_mask(theirs, marked, messages)


@pytest.mark.parametrize("tokenizer", ["bytes", "trimmed", "pieces"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl", "molmo2", "gemma3", "smolvlm", *READING])
def test_differences(pairs, kind, text, tokenizer):
    """Where there are no marks: of whole conversations, with and without a system prompt."""
    theirs, tok = pairs[tokenizer]
    family, template = (kind, SEEING[kind][0]) if kind in SEEING else ("llama", READING[kind])
    one, two = turns(text, 0)
    for messages, system in itertools.product((one, two), (False, True)):
        if (kind == "mistral" and system) or (kind == "qwen3" and messages is two):
            continue  # Refused; and other text once more follows, see test_marks_that_were_added.
        messages = [SYSTEM, *messages] if system else messages
        messages = messages if kind in SEEING else as_texts(messages)
        ids, mask = by_difference(theirs, template, messages)
        if kind == "molmo2":  # What its processor puts in front.
            ids, mask = [tok.id_of("<s>"), *ids], [0, *mask]
        assert ours(family, template, tok, messages) == (ids, mask)
        assert 1 in mask and 0 in mask


def noise(height, width):
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def with_pictures(messages, pictures):
    rest = iter(pictures)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def llava(tok):
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    options = dict(patch_size=14, num_additional_image_tokens=1)
    config = {"vision_config": {"image_size": 28, "patch_size": 14}}
    processor = LlavaProcessor(images, tok, vision_feature_select_strategy="default", **options)
    return processor, images, config, "<image>"


def gemma3(tok):
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    config = {
        "mm_tokens_per_image": 4,
        "vision_config": {"image_size": 56, "patch_size": 14},
    }
    return Gemma3Processor(images, tok, image_seq_length=4), images, config, "<image_soft_token>"


def smolvlm(tok):
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    config = {"scale_factor": 2, "vision_config": {"image_size": 32, "patch_size": 8}}
    return Idefics3Processor(images, tok, image_seq_len=4), images, config, "<image>"


PROCESSORS = {
    "llava": (llava, LLAVA, LLAVA, dict(image_token="<image>")),
    "gemma3": (
        gemma3, GEMMA, GEMMA_MARKED,
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
         "image_token": "<image_soft_token>"},
    ),
    "smolvlm": (smolvlm, SMOLVLM, SMOLVLM_MARKED, {}),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", PROCESSORS)
def test_pictures_through_processors(tmp_path, family, text):
    """Ids and mask of whole processors, which put the texts of pictures in; ours without marks."""
    make, plain, marked, special = PROCESSORS[family]
    backend = byte_level()
    if family == "llava":  # Its tokenizer adds the beginning, its template has none.
        ids = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, ids)
    theirs = fast(backend, **special)
    processor, images, config, token = make(theirs)
    theirs.save_pretrained(tmp_path)
    tok = HubTokenizer.from_hf(tmp_path)
    read = FAMILIES[family].processor(images.to_dict(), config)
    for count, messages in enumerate(turns(text, 2), 1):
        pictures = [noise(40, 60), noise(64, 31)][:count]
        out = processor.apply_chat_template(
            with_pictures(messages, pictures),
            chat_template=marked,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        expected = out["input_ids"][0], out["assistant_masks"][0]
        pictured = [read(picture) for picture in pictures]
        assert ours(family, plain, tok, messages, pictured, token) == expected
        assert tok.id_of(token) in expected[0] and 1 in expected[1]
        assert family != "llava" or expected[0][0] == tok.id_of("<s>")


@pytest.mark.parametrize("text", ["It is a cat.", "\nAnd this", " A dog \n"])
@pytest.mark.parametrize("backend", [byte_level, pieces])
def test_paligemma(tmp_path, backend, text):
    """Labels of its processor, which the suffix asks for."""
    theirs = fast(backend(), image_token="<image>")
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=4)
    processor = PaliGemmaProcessor(images, theirs)
    theirs.save_pretrained(tmp_path)
    tok = HubTokenizer.from_hf(tmp_path)
    out = processor(images=noise(28, 28), text="<image>What is this?", suffix=text)
    expected = np.asarray(out["labels"])[0]
    family = FAMILIES["paligemma"]
    config = {
        "image_token_index": tok.id_of("<image>"),
        "vision_config": {"image_size": 28, "patch_size": 14},
    }
    style = family.prompt_style(config)
    style = type(style)(**{**vars(style), "options": {"bos": "<s>"}})
    picture = family.processor(images.to_dict(), config)(noise(28, 28))
    messages = [turn("user", None, "What is this?"), turn("assistant", text)]
    ids, targets = labelled(style, "paligemma", tok, messages, [picture])
    assert ids == list(out["input_ids"][0])
    np.testing.assert_array_equal(np.where(targets, ids, -100), expected)
