"""What is asked becomes the ids that each family was trained on: beginning tokens, pictures, turns.

The expected texts are written out from the processors of transformers 5 and, for Molmo and
MobileVLM, from the models' own code.
"""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from efficient_vlm.errors import UserError
from efficient_vlm.families.table import FAMILIES
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.conversation import is_one, prompt_ids
from efficient_vlm.processing.hub_tokenizer import HubTokenizer

# Each in the form that the hub's has: who writes the beginning token differs.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = "{{ bos_token }}" + TURNS.replace("IMAGE", "<start_of_image>")
MOLMO = "{% for m in messages %}{{ m['role'].capitalize() + ': ' + m['content'] }}{% endfor %}"
QWEN = TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
TWO = "<image><image>"

# model type -> template, beginning token, whether the tokenizer adds it, text of a picture, and the
# prompt of one picture and "Hi" in words; "@" is the picture's text.
CASES = {
    "llava": (LLAVA, "<s>", True, TWO, "<s>USER: @\nHi ASSISTANT:"),
    "smolvlm": (
        "<|im_start|>" + TURNS.replace("<|im_start|>", "").replace("IMAGE", "<image>"),
        "<|im_start|>",
        False,
        f"<fake>{TWO}<fake>",
        "<|im_start|>user\n@Hi<|im_end|>\nassistant\n",
    ),
    # Whatever template lies in the folder, as its processor does.
    "paligemma": (GEMMA, "<bos>", True, TWO, "@<bos>Hi\n"),
    "gemma3": (
        GEMMA,
        "<bos>",
        True,
        "\n\n<start_of_image><image_soft_token><end_of_image>\n\n",
        "<bos><|im_start|>user\n@Hi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2_vl": (
        QWEN,
        None,
        False,
        "<|image_pad|><|image_pad|>",
        "<|im_start|>user\n<|vision_start|>@<|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "internvl": (
        TURNS.replace("IMAGE", "<IMG_CONTEXT>\n"),
        None,
        False,
        "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
        "<|im_start|>user\n@\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    # Its own template knows neither pictures nor the beginning token, and is not used.
    "molmo": (MOLMO, None, False, "<im_start><im_patch>", "<|endoftext|>@ User: Hi Assistant:"),
    "molmo2": (
        TURNS.replace("IMAGE", "<|image|>"),
        None,
        False,
        "<im_start><im_patch>",
        "<|im_end|><|im_start|>user\n@Hi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": ("{{ bos_token }}" + TURNS, "<s>", True, None, None),
}
SPECIAL = [
    *("<s>", "</s>", "<bos>", "<image>", "<|im_start|>", "<|im_end|>", "<fake>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|vision_start|>"),
    *("<|vision_end|>", "<|image_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|endoftext|>"),
    *("<im_start>", "<im_patch>", "<|image|>"),
]


class Picture:
    """As much of a `Pictured` as a prompt needs."""

    def __init__(self, text):
        self.text = text


def tokenizer(tmp_path, bos, adds, special=SPECIAL):
    """Byte by byte, with the special tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if adds:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, ids)
    backend.save(str(tmp_path / "tokenizer.json"))
    roles = {"bos_token": bos, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    return HubTokenizer.from_hf(tmp_path)


def ask(kind, tok, asked, pictures, config=None):
    family, (template, *_) = FAMILIES[kind], CASES[kind]
    use_own = template is None or family.own_prompt
    template = family.prompt if use_own else Template(template, tok.special)
    return prompt_ids(family.prompt_style(config or {}), template, tok, asked, pictures)


def test_texts_are_not_lost_in_templates_of_parts():
    """A text where the template wants parts, and parts where it wants a text; what is neither."""
    tokenizer = HubTokenizer(Backend(models.WordLevel({"x": 0}, unk_token="x")), {}, [])
    ids = []
    tokenizer.encode = lambda text, bos=None: ids.append(text) or [0]

    def asked(family, template, *messages):
        style = FAMILIES[family].prompt_style({"image_token_id": 1})
        prompt_ids(style, Template(template), tokenizer, messages, ())
        return ids[-1]

    # Short texts that are in the template's own words, too.
    turns = [{"role": role, "content": "A"} for role in ("user", "assistant", "user")]
    assert asked("llava", LLAVA, *turns) == "USER: A ASSISTANT: A USER: A ASSISTANT:"
    # A text of the system and parts of users; a role that is not written at all.
    first = "{% if messages[0].role == 'system' %}{{ messages[0].content + ';' }}{% endif %}"
    some = LLAVA.replace("for m in messages", "for m in messages if m.role != 'system'")
    system = {"role": "system", "content": "S"}
    assert asked("llava", first + some, system, *turns[:1]) == "S;USER: A ASSISTANT:"
    with pytest.raises(UserError, match="leaves out number 0"):
        asked("llava", some, system, *turns[:1])
    loud = LLAVA.replace("c['text']", "c['text'] | upper")
    assert asked("llava", loud, {"role": "user", "content": "b"}) == "USER: B ASSISTANT:"
    hi = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Yes?"}
    more = {"role": "user", "content": [{"type": "text", "text": "More"}]}
    turns = (hi, answer, more)
    assert asked("llava", LLAVA, *turns) == "USER: Hi ASSISTANT: Yes? USER: More ASSISTANT:"
    assert asked("llama", MOLMO, *turns) == "User: HiAssistant: Yes?User: More"
    for part in ({"type": "video", "video": "x"}, 3, {"type": "text"}):
        with pytest.raises(UserError, match="messages: number 0"):
            asked("llava", LLAVA, {"role": "user", "content": [part]})
    with pytest.raises(UserError, match="language model"):
        asked("llama", MOLMO, {"role": "user", "content": [{"type": "image"}]})


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "llama"])
def test_one_question_about_a_picture(kind, tmp_path):
    _, bos, adds, text, expected = CASES[kind]
    tok = tokenizer(tmp_path, bos, adds)
    ids = ask(kind, tok, "Hi", [Picture(text)])
    assert tok.decode(ids, skip_special=False) == expected.replace("@", text)
    # Messages that say the same give the same.
    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    assert ask(kind, tok, [{"role": "user", "content": content}], [Picture(text)]) == ids


def test_a_language_model_gets_what_its_template_writes(tmp_path):
    tok = tokenizer(tmp_path, "<s>", True)
    ids = ask("llama", tok, "Hi", [])
    expected = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(ids, skip_special=False) == expected


def test_a_conversation_says_where_its_pictures_stand(tmp_path):
    tok = tokenizer(tmp_path, None, False)
    one, two = (Picture("<|image_pad|>" * n) for n in (1, 3))
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "image"}]},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "too?"}]},
    ]
    assert tok.decode(ask("qwen2_vl", tok, asked, [one, two]), skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nIs <|vision_start|>{one.text}<|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nIt is.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{two.text}<|vision_end|>too?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="2 <|image_pad|> in the prompt, 1 picture"):
        ask("qwen2_vl", tok, asked, [one])


ANSWERED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": " It is a "},
]


@pytest.mark.parametrize("kind", [k for k in CASES if k not in ("paligemma", "molmo", "mobilevlm")])
def test_what_ends_with_an_answer_goes_on_from_it(kind, tmp_path):
    """No second header, no end of the turn, and not a space of its text lost."""
    _, bos, adds, text, _ = CASES[kind]
    tok = tokenizer(tmp_path, bos, adds)
    asked, pictures = (ANSWERED, [Picture(text)]) if text else (ANSWERED[1:], [])

    def prompt(asked):
        return tok.decode(ask(kind, tok, asked, pictures), skip_special=False)

    begun = prompt(asked)
    assert begun.endswith(" It is a ") and begun.lower().count("assistant") == 1
    parts = [*asked[:-1], {**asked[-1], "content": [{"type": "text", "text": " It is a "}]}]
    assert prompt(parts) == begun
    for last in (None, [{"type": "image"}]):
        with pytest.raises(UserError) as caught:
            prompt([*asked[:-1], {"role": "assistant", "content": last, "tool_calls": [1]}])
        assert len(str(caught.value).splitlines()) <= 3
    # What a template makes of the text does not matter, unless it is lost: then follow the advice.
    loud = Template("{% for m in messages %}{{ m.content | upper }}{% endfor %}", tok.special)
    with pytest.raises(UserError, match="end with a message of the user"):
        loud.render([{"role": "assistant", "content": "a"}])
    assert loud.render([{"role": "user", "content": "a"}]) == "A"


@pytest.mark.parametrize("kind", CASES)
def test_unused_fields_change_nothing(kind, tmp_path):
    """As typed clients and tables write messages: every field, null or NaN where it is unused."""
    _, bos, adds, text, _ = CASES[kind]
    tok = tokenizer(tmp_path, bos, adds)
    nothing = {"image": None, "image_url": {"url": None, "detail": None}, "video": float("nan")}
    content = [{"type": "text", "text": "Hi", **nothing}]
    if text:
        content.insert(0, {"type": "image", "text": None, **nothing})
    message = {"role": "user", "content": content, "name": None, "tool_calls": None}
    plain = [{k: v for k, v in part.items() if k in ("type", "text") and v} for part in content]
    expected = ask(kind, tok, [{"role": "user", "content": plain}], [Picture(text)] if text else [])
    assert ask(kind, tok, [message], [Picture(text)] if text else []) == expected


def test_a_placeholder_that_is_no_token(tmp_path):
    """MobileVLM: the parts around -200 are tokenised one by one, the first with its beginning."""
    tok = tokenizer(tmp_path, "<s>", True, [t for t in SPECIAL if t != "<image>"])
    CASES["mobilevlm"] = (None,)
    ids = ask("mobilevlm", tok, "Hi", [Picture(TWO)])
    at = ids.index(-200)
    assert ids[at : at + 2] == [-200, -200]
    assert ids.count(-200) == 2
    before, after = (tok.decode(part, skip_special=False) for part in (ids[:at], ids[at + 2 :]))
    assert before.startswith("<s>A chat between a curious user")
    assert before.endswith("questions. USER: ")
    assert after == "\nHi ASSISTANT:"


@pytest.mark.parametrize(
    ("prompt", "one"),
    [
        ("Hi", True),
        (["Hi", "Ho"], False),
        ([{"role": "user", "content": "Hi"}], True),
        ([[{"role": "user", "content": "Hi"}], "Ho"], False),
    ],
)
def test_what_is_one_prompt(prompt, one):
    assert is_one(prompt) is one


@pytest.mark.parametrize("prompt", [None, 3, [], [3], ["Hi", None], {"role": "user"}, [["Hi"]]])
def test_what_is_no_prompt(prompt):
    with pytest.raises(UserError, match="prompt") as caught:
        is_one(prompt)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config": 5, "config": 6}, {5}),
        ({"generation_config": [5, 7]}, {5, 7}),
        ({"generation_config": [], "config": 6}, {6}),
        ({"generation_config": [None, 5.0]}, {5}),
        ({"generation_config": [-1, 10**12]}, set()),  # No token ends an answer.
        ({"config": [6, 7]}, {6, 7}),
        ({"text_config": 8}, {8}),
        ({}, set()),
    ],
)
def test_ids_that_end_an_answer(files, ends, tmp_path):
    """Of generation_config.json alone; else config.json or text_config, and the tokenizer's."""
    config = {"eos_token_id": files.get("config")}
    if "text_config" in files:
        config["text_config"] = {"eos_token_id": files["text_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "generation_config" in files:
        content = json.dumps({"eos_token_id": files["generation_config"]})
        (tmp_path / "generation_config.json").write_text(content)
    tok = tokenizer(tmp_path, None, False)
    own = set() if files.get("generation_config") else {tok.id_of("<|im_end|>")}
    assert set(tok.eos_ids) == own | ends


@pytest.mark.parametrize("eos", ["5", True, [[5]], {"a": 5}])
def test_an_end_token_that_is_no_id_is_named(eos, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id"):
        tokenizer(tmp_path, None, False)
