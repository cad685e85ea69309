"""Which tokens of a conversation are to be learnt: written out by hand, answers in [[ ]]."""

import types

import numpy as np
import pytest
from chat_templates import (
    GEMMA,
    LLAMA3,
    LLAVA,
    MARKED,
    MISTRAL,
    PHI3,
    QWEN3,
    QWEN_VL,
    R1,
    READING,
    SEEING,
    SMOLVLM,
    SPECIAL,
    byte_level,
    pieces,
    saved,
)
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from efficient_vlm.errors import UserError
from efficient_vlm.families.table import FAMILIES
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.conversation import prompt_ids
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.labels import labelled
from efficient_vlm.processing.placing import Prompt, place

SYSTEM = {"role": "system", "content": "Be brief."}


def user(*parts):
    texts = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts
    ]
    return {"role": "user", "content": texts if None in parts else parts[0]}


def answer(text):
    return {"role": "assistant", "content": text}


ASKED = [user(None, "What is this?"), answer("It is a cat."), user("And this?"), answer("A dog.")]
READ = [user("What is this?"), answer("It is a cat."), user("And this?"), answer("A dog.")]


def picture(text):
    return types.SimpleNamespace(text=text)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def made(backend, **special):
        return HubTokenizer.from_hf(saved(backend, tmp_path_factory.mktemp("t"), **special))

    return {
        "bytes": made(byte_level()),
        "trimmed": made(byte_level(trim_offsets=True)),
        "pieces": made(pieces()),
        "turns": made(byte_level(), eos_token="<|im_end|>", bos_token=None),
    }


def labels(tok, family, template, messages, pictures=(), **options):
    family = FAMILIES[family]
    image = SEEING.get(family.name, (None, None, "<image>"))[2]
    config = {"image_token_id": tok.id_of(image), "image_token_index": tok.id_of(image)}
    config |= {"image_patch_id": tok.id_of(image)}
    style = family.prompt_style(config)
    given = template if template in ("llava", "molmo", "paligemma", "plain") else Template(
        template, tok.special
    )  # fmt: skip
    ids, targets = labelled(style, given, tok, messages, pictures, **options)
    assert len(ids) == len(targets)
    return style, given, ids, targets


def shown(tok, ids, targets):
    """The text of ids, those to be learnt in [[ ]]."""
    out, run = "", []
    for at, (number, target) in enumerate(zip(ids, targets, strict=True)):
        run.append(number)
        if at + 1 == len(ids) or targets[at + 1] != target:
            text = tok.decode(run, skip_special=False)
            out, run = out + (f"[[{text}]]" if target else text), []
    return out


def learnt(tok, family, template, messages, pictures=(), **options):
    _, _, ids, targets = labels(tok, family, template, messages, pictures, **options)
    return shown(tok, ids, targets)


CASES = {
    "qwen2_vl": (
        "turns", "qwen2_vl", QWEN_VL,
        "<|im_start|>system\nBe helpful.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>@<|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n[[It is a cat.<|im_end|>\n]]<|im_start|>user\nAnd this?<|im_end|>\n"
        "<|im_start|>assistant\n[[A dog.<|im_end|>\n]]",
    ),
    "gemma3": (
        "bytes", "gemma3", GEMMA,
        "<s><start_of_turn>user\n@What is this?<end_of_turn>\n<start_of_turn>model\n"
        "[[It is a cat.<end_of_turn>\n]]<start_of_turn>user\nAnd this?<end_of_turn>\n"
        "<start_of_turn>model\n[[A dog.<end_of_turn>\n]]",
    ),
    "smolvlm": (
        "turns", "smolvlm", SMOLVLM,
        "<|im_start|>User:@What is this?<end_of_utterance>\nAssistant:[[ It is a cat."
        "<end_of_utterance>\n]]User: And this?<end_of_utterance>\nAssistant:[[ A dog."
        "<end_of_utterance>\n]]",
    ),
    # The space in front is in the token of the first word, which transformers counts as well.
    "llava": (
        "bytes", "llava", LLAVA,
        "USER: @\nWhat is this? ASSISTANT:[[ It is a cat. USER]]: And this? ASSISTANT:[[ A dog. ]]",
    ),
    "marked": (
        "turns", "qwen2_vl", MARKED,
        "<|im_start|>user\n<|vision_start|>@<|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n[[It is a cat.<|im_end|>\n]]<|im_start|>user\nAnd this?<|im_end|>\n"
        "<|im_start|>assistant\n[[A dog.<|im_end|>\n]]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_hand(tokenizers, case):
    name, family, template, expected = CASES[case]
    tok = tokenizers[name]
    text = SEEING[family][2] * 3
    got = learnt(tok, family, template, ASKED, [picture(text)])
    assert got == expected.replace("@", text)


READ_CASES = {
    # Not the end of the text, which is there only where the conversation ends.
    "phi3": (
        PHI3,
        "<|user|>\nWhat is this?<|end|>\n<|assistant|>\n[[It is a cat.<|end|>\n]]<|user|>\n"
        "And this?<|end|>\n<|assistant|>\n[[A dog.<|end|>\n</s>]]",
    ),
    "llama3": (
        LLAMA3,
        "<s><|header|>user<|/header|>\n\nWhat is this?<|eot|><|header|>assistant<|/header|>\n\n"
        "[[It is a cat.<|eot|>]]<|header|>user<|/header|>\n\nAnd this?<|eot|><|header|>assistant"
        "<|/header|>\n\n[[A dog.<|eot|>]]",
    ),
    "mistral": (
        MISTRAL,
        "<s>[INST] What is this? [/INST][[ It is a cat.</s>]][INST] And this? [/INST]"
        "[[ A dog.</s>]]",
    ),
    # The prompt opens a thinking part that no answer has.
    "r1": (
        R1,
        "<s><|user|>What is this?<|assistant|>[[It is a cat.</s>]]<|user|>And this?<|assistant|>"
        "[[A dog.</s>]]",
    ),
    "plain": ("plain", "What is this?[[It is a cat.</s>]]And this?[[A dog.</s>]]"),
    "molmo_text": (
        "{% for m in messages %}{{ m.role.capitalize() + ': ' + m.content }}{% endfor %}",
        "User: What is this?[[Assistant: It is a cat.]]User: And this?[[Assistant: A dog.]]",
    ),
}


@pytest.mark.parametrize("case", READ_CASES)
@pytest.mark.parametrize("tokenizer", ["bytes", "trimmed", "pieces"])
def test_by_hand_without_pictures(tokenizers, case, tokenizer):
    template, expected = READ_CASES[case]
    assert learnt(tokenizers[tokenizer], "llama", template, READ) == expected


def test_thinking_parts(tokenizers):
    """Of the last answer they are learnt; earlier ones are written without theirs."""
    turns = [
        user("What is this?"),
        answer("<think>\nFur.\n</think>\n\nIt is a cat."),
        user("And this?"),
        answer("<think>\nA tail.\n</think>\n\nA dog."),
    ]
    assert learnt(tokenizers["turns"], "qwen3", QWEN3, turns) == (
        "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
        "[[It is a cat.<|im_end|>\n]]<|im_start|>user\nAnd this?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nA tail.\n</think>\n\nA dog.<|im_end|>\n]]"
    )


def test_system_prompts(tokenizers):
    tok = tokenizers["turns"]
    got = learnt(tok, "qwen2_vl", QWEN_VL, [SYSTEM, *READ[:2]])
    assert got == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\n[[It is a cat.<|im_end|>\n]]"
    )
    got = learnt(tokenizers["bytes"], "gemma3", GEMMA, [SYSTEM, *READ[:2]])
    assert got == (
        "<s><start_of_turn>user\nBe brief.\n\nWhat is this?<end_of_turn>\n"
        "<start_of_turn>model\n[[It is a cat.<end_of_turn>\n]]"
    )
    with pytest.raises(UserError, match="Only user and assistant"):
        learnt(tok, "llama", MISTRAL, [SYSTEM, *READ[:2]])


def test_pictures_in_the_middle(tokenizers):
    tok = tokenizers["turns"]
    turns = [
        user("Is", None, "this"),
        answer("Yes."),
        user(None, "or", None, "that?"),
        answer(" No \n"),
    ]
    texts = ["<|image_pad|>" * n for n in (1, 3, 2)]
    got = learnt(tok, "qwen2_vl", QWEN_VL, turns, [picture(text) for text in texts])
    one, two, three = (f"<|vision_start|>{text}<|vision_end|>" for text in texts)
    assert got == (
        "<|im_start|>system\nBe helpful.<|im_end|>\n"
        f"<|im_start|>user\nIs{one}this<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>\n]]"
        f"<|im_start|>user\n{two}or{three}that?<|im_end|>\n"
        "<|im_start|>assistant\n[[ No \n<|im_end|>\n]]"
    )
    with pytest.raises(UserError, match="3 <|image_pad|> in the prompt, 2 pictures"):
        learnt(tok, "qwen2_vl", QWEN_VL, turns, [picture(text) for text in texts[:2]])


@pytest.mark.parametrize("tokenizer", ["trimmed", "pieces"])
@pytest.mark.parametrize("text", ["It is a cat.", " It is ", "\n\nYes", "naïve 犬 <|eot|>"])
@pytest.mark.parametrize("kind", [kind for kind in (*SEEING, *READING) if kind != "llava"])
def test_what_is_in_front_of_an_answer_is_the_prompt(tokenizers, kind, text, tokenizer):
    """Of every answer: up to a token that lies across the border, ids are those of its prompt."""
    tok = tokenizers[tokenizer]
    family, template = (kind, SEEING[kind][0]) if kind in SEEING else ("llama", READING[kind])
    turns = [READ[0], answer(text), READ[2], answer("A dog.")]
    style, given, ids, targets = labels(tok, family, template, turns)
    starts = [i for i, t in enumerate(targets) if t and not targets[i - 1]]
    assert len(starts) == 2
    for start, number in zip(starts, (1, 3), strict=True):
        prompt = prompt_ids(style, given, tok, turns[:number], [])
        if kind == "r1":
            prompt = prompt[: prompt.index(tok.id_of("<think>"))] if number == 1 else prompt
        equal = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), len(prompt))
        assert start == equal


def test_a_token_across_the_border_is_learnt(tokenizers):
    """ " It" of the header's space and the first word, "\\n\\n" of two line breaks."""
    tok = tokenizers["bytes"]
    header = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    header += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    got = learnt(tok, "llama", header, [user("Yes"), answer("It is")])
    assert got == "user: Yes</s>assistant:[[ It is</s>]]"
    got = learnt(tok, "llama", header, [user("Yes"), answer("(")])
    assert got == "user: Yes</s>assistant: [[(</s>]]"


@pytest.mark.parametrize("tokenizer", ["bytes", "trimmed"])
def test_white_space_at_the_end_of_a_turn_is_learnt(tokenizers, tokenizer):
    """Also the token of a space to which the tokenizer gives no characters."""
    plain = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    got = learnt(tokenizers[tokenizer], "llava", plain, READ[:2])
    assert got == "USER: What is this? ASSISTANT:[[ It is a cat. ]]"


def unigram():
    letters = [(letter, -5.0) for letter in "▁Itisa<mge>"]
    backend = Backend(models.Unigram([("<unk>", -9.0), *letters, ("▁It", -2.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([*SPECIAL])
    return backend


@pytest.mark.parametrize("backend", [byte_level, pieces, unigram])
def test_tokens_under_another_name(tmp_path, backend):
    tok = HubTokenizer.from_hf(saved(backend(), tmp_path))
    other = tok.renamed({"<image>": "\ue000"})
    image = tok.id_of("<image>")
    assert other.encode("It is\ue000</s>") == tok.encode("It is<image></s>")
    assert other.encode("\ue000")[-1] == image
    ids = other.encode("It is <image>")
    assert image not in ids and other.decode(ids, skip_special=False).strip() == "It is <image>"
    assert ids[: len(tok.encode("It is"))] == tok.encode("It is")
    assert tok.encode("<image>")[-1] == image  # The first is as it was.
    assert (other.eos_ids, other.bos_id, other.vocab_size) == (
        tok.eos_ids,
        tok.bos_id,
        tok.vocab_size,
    )


FUNCTIONS = {
    "paligemma": ("bytes", "paligemma", "@<s>What is this?\n[[It is a cat.</s>]]"),
    "molmo": ("bytes", "molmo", "<s>@ User: What is this? Assistant:[[ It is a cat.</s>]]"),
    "llava": ("bytes", "llava", "USER: @\nWhat is this? ASSISTANT:[[ It is a cat.</s>]]"),
    "internvl": ("bytes", "plain", "@What is this?[[It is a cat.</s>]]"),
}


@pytest.mark.parametrize("family", FUNCTIONS)
def test_families_without_a_template(tokenizers, family):
    name, function, expected = FUNCTIONS[family]
    tok = tokenizers[name]
    text = {"molmo": "<im_patch>", "internvl": "<IMG_CONTEXT>"}.get(family, "<image>") * 2
    config = {"image_token_id": 1, "image_token_index": 1, "image_patch_id": 1}
    style = FAMILIES[family].prompt_style({**config, "vocab_size": 9})
    if function in ("paligemma", "molmo"):
        style = type(style)(**{**vars(style), "options": {"bos": "<s>"}})
    ids, targets = labelled(style, function, tok, ASKED[:2], [picture(text)])
    assert shown(tok, ids, targets) == expected.replace("@", text)
    if function in ("llava", "plain"):
        ids, targets = labelled(style, function, tok, ASKED, [picture(text)])
        last = {
            "llava": "USER: And this? ASSISTANT:[[ A dog.</s>]]",
            "plain": "And this?[[A dog.</s>]]",
        }[function]
        assert shown(tok, ids, targets) == expected.replace("@", text) + last
    else:
        with pytest.raises(UserError, match="4 messages"):
            labelled(style, function, tok, ASKED, [picture(text)])


def test_answers_are_tokenised_apart_where_they_were(tokenizers):
    """PaliGemma: a line break that an answer begins with does not merge with that of the prompt."""
    tok = tokenizers["pieces"]
    style = FAMILIES["paligemma"].prompt_style({"image_token_index": 1})
    turns = [user("It is a cat."), answer("\nAnd this")]
    ids, targets = labelled(style, "paligemma", tok, turns, [])
    prompt, answered = "<bos>It is a cat.\n", "\nAnd this</s>"
    expected = tok.encode(prompt, bos=False), tok.encode(answered, bos=False)
    assert ids == [*expected[0], *expected[1]] != tok.encode(prompt + answered, bos=False)
    assert targets == [False] * len(expected[0]) + [True] * len(expected[1])


def test_a_placeholder_that_is_no_token(tmp_path):
    """MobileVLM: what is around -200 is tokenised by itself; answers may hold the word."""
    backend = byte_level()
    backend = type(backend).from_str(backend.to_str().replace('"<image>"', '"<im_age>"'))
    tok = HubTokenizer.from_hf(saved(backend, tmp_path))
    style = FAMILIES["mobilevlm"].prompt_style({})
    turns = [user(None, "What?"), answer("An <image>.")]
    ids, targets = labelled(style, "llava", tok, turns, [picture("<image><image>")])
    at = ids.index(-200)
    assert ids[at : at + 2] == [-200] * 2 and ids.count(-200) == 2
    rest = shown(tok, ids[at + 2 :], targets[at + 2 :])
    assert rest == "\nWhat? ASSISTANT:[[ An <image>.</s>]]"
    assert tok.decode(ids[:at]).endswith("questions. USER: ") and not any(targets[: at + 2])


@pytest.mark.parametrize("kind", SEEING)
def test_markers_in_answers_are_text(tokenizers, kind):
    """Pictures stay, and the words are read letter by letter, with the tokens around them."""
    tok = tokenizers["bytes"]
    template, placeholder, token = SEEING[kind]
    said = f"It is {placeholder} and {token}!"
    text = token * 2
    turns = [user(None, "What?"), answer(said), user("And?"), answer("A dog.")]
    style, given, ids, targets = labels(tok, kind, template, turns, [picture(text)])
    image = tok.id_of(token)
    assert ids.count(image) == 2
    assert not any(t for i, t in zip(ids, targets, strict=True) if i == image)
    # All else is as for other words.
    other = [user(None, "What?"), answer("Yes."), *turns[2:]]
    _, _, expected, _ = labels(tok, kind, template, other, [picture(text)])
    start = targets.index(True)
    assert ids[:start] == expected[:start]
    tail = max(i for i in range(len(expected)) if ids[-i:] == expected[-i:])
    # What is between is the answer; its letters need no special token but the end of the turn.
    middle = ids[start : len(ids) - tail]
    assert tok.decode(middle, skip_special=False).strip() in (said, said + " USER")


ERRORS = {
    "none to learn": (QWEN_VL, READ[:1], "none is the assistant's"),
    "a picture in an answer": (
        QWEN_VL, [READ[0], {"role": "assistant", "content": [{"type": "image"}]}],
        "number 1: a picture in an answer",
    ),
    "an answer first": (GEMMA, READ[1:], "chat template: no turns"),
    "an answer first, alone": (
        "{{ messages[0].role }}{% for m in messages %}{{ m.content }}{% endfor %}", READ[1:2],
        "the first one is the assistant's",
    ),
    "marks around nothing": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
        READ, "it marks no turn",
    ),
    "a text that is changed": (
        "{% set t %}{% for m in messages %}{% generation %} {{ m.content }} {% endgeneration %}"
        "{% endfor %}{% endset %}{{ t | trim }}", READ, "it changes the text",
    ),
    "prompts that do not agree": (  # Mistral's system prompts: in the last question.
        "{% for m in messages %}{{ '(first)' if messages | length < 3 }}[{{ m.content }}]"
        "{% endfor %}", READ, "number 1: the chat template writes other text",
    ),
    "roles": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ raise_exception('no answers') }}{% endif %}{% endfor %}", READ, "no answers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tokenizers, case):
    template, messages, expected = ERRORS[case]
    family = "gemma3" if template == GEMMA else "llama"
    family = "qwen2_vl" if template == QWEN_VL else family
    with pytest.raises(UserError, match=expected) as caught:
        learnt(tokenizers["bytes"], family, template, messages)
    assert len(str(caught.value).splitlines()) <= 3


def test_an_end_token_where_the_template_writes_none(tokenizers):
    tok = tokenizers["bytes"]
    plain = learnt(tok, "llava", LLAVA, READ)
    assert learnt(tok, "llava", LLAVA, READ, end=True) == plain.removesuffix("]]") + "</s>]]"
    assert learnt(tok, "llava", LLAVA, READ[:3], end=True) == learnt(tok, "llava", LLAVA, READ[:3])
    assert learnt(tok, "llama", MISTRAL, READ, end=True) == learnt(tok, "llama", MISTRAL, READ)
    # Marks around the text alone: the end token behind it is learnt, and no second one is added.
    outside = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    tok = tokenizers["turns"]
    assert learnt(tok, "qwen2_vl", outside, READ[:2]).endswith("[[It is a cat.]]<|im_end|>\n")
    got = learnt(tok, "qwen2_vl", outside, READ[:2], end=True)
    assert got.endswith("[[It is a cat.<|im_end|>]]\n")


def test_labels_of_a_batch(tokenizers):
    """In arrays every target is the label of the text token in front of it, past the picture."""
    tok = tokenizers["bytes"]
    text = "<image>" * 3
    for family, template in (("smolvlm", SMOLVLM), ("paligemma", "paligemma")):
        turns = ASKED if family == "smolvlm" else ASKED[:2]
        _, _, ids, targets = labels(tok, family, template, turns, [picture(text)])
        prompt = Prompt(np.array(ids), np.arange(3), targets=targets)
        blocks = FAMILIES[family].blocks
        inputs = place([[prompt]], tok.id_of("<image>"), 3, blocks=blocks)
        wanted = [i for i, target in zip(ids, targets, strict=True) if target]
        assert inputs.labels[inputs.labels >= 0].tolist() == wanted
        index = inputs.placement.text_index[inputs.labels >= 0]
        assert all(targets[i + 1] for i in index)
        if blocks == "prefix":  # All that is given sees itself, and no answer.
            assert inputs.placement.text_block[0].tolist() == [
                int(not targets[i]) for i in inputs.placement.text_index[0]
            ]
