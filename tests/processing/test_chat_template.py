"""Tokenizers of published models, chat templates in the sandbox, families without one."""

import inspect
import itertools
import json
import sys
import warnings

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from efficient_vlm.errors import UserError
from efficient_vlm.processing import chat_template as prompts
from efficient_vlm.processing import prompt_families, sandbox
from efficient_vlm.processing.chat_template import HubTokenizer, Template, expand, render
from efficient_vlm.processing.hub_tokenizer import special_id

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]


@pytest.fixture
def directory(tmp_path):
    """A byte-level BPE tokenizer with the files that a published model has."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["how many dogs are there", "are there many"], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    added = {str(size): {"content": "<image>", "special": True}}
    put(tmp_path, "tokenizer_config.json", bos_token="<s>", added_tokens_decoder=added)
    put(tmp_path, "special_tokens_map.json", eos_token={"content": "</s>"}, bos_token="wrong")
    put(tmp_path, "added_tokens.json", **{"<im_end>": size + 1})
    put(tmp_path, "generation_config.json", eos_token_id=[size + 1, 1])
    return tmp_path


def put(directory, name, **content):
    (directory / name).write_text(json.dumps(content))


def test_tokenizer_reads_all_files(directory):
    tokenizer = HubTokenizer.from_hf(directory)
    end = tokenizer.id_of("<im_end>")
    assert end == tokenizer.id_of("<image>") + 1 == tokenizer.vocab_size - 1
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (1, end), 1)
    assert tokenizer.id_of("eos_token") == 1
    with pytest.raises(UserError, match="did you mean '<image>'"):
        tokenizer.id_of("<images>")


def test_beginning_token(directory):
    tokenizer = HubTokenizer.from_hf(directory)
    plain = tokenizer.encode("how many dogs are there", bos=False)
    assert 0 not in plain and tokenizer.decode(plain) == "how many dogs are there"
    assert tokenizer.encode("how many dogs are there") == [0, *plain]  # And no truncation.
    assert tokenizer.encode("how many dogs are there", bos=True) == [0, *plain]
    assert tokenizer.encode("<s>how many dogs are there", bos=True) == [0, *plain]
    image = tokenizer.id_of("<image>")
    assert tokenizer.encode("a<image>b", bos=False)[1] == image
    assert tokenizer.decode([image, *plain]) == "how many dogs are there"
    assert tokenizer.decode([image], skip_special=False) == "<image>"
    put(directory, "tokenizer_config.json")
    put(directory, "special_tokens_map.json")
    put(directory, "added_tokens.json")
    with pytest.raises(UserError, match="no beginning token"):
        HubTokenizer.from_hf(directory).encode("a", bos=True)


@pytest.mark.parametrize("text", ["how many", "naïve 犬🐕\u200d🦺 dogs", "\ufffd a", "🐕"])
def test_stream_never_gives_half_a_character(directory, text):
    tokenizer = HubTokenizer.from_hf(directory)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == text


def test_stream_of_a_cut_character_and_of_spaces_before_words(directory):
    tokenizer = HubTokenizer.from_hf(directory)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a🐕", bos=False)[:-1]
    assert "".join(map(stream.push, ids)) == "a"
    assert stream.finish() == "\ufffd" and stream.finish() == ""
    words = Backend(models.WordLevel({"▁a": 0, "▁b": 1, "<s>": 2}, unk_token="<s>"))
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["<s>"])
    stream = HubTokenizer(words, {"bos_token": "<s>"}).stream()
    assert [stream.push(i) for i in (2, 0, 2, 1, 0)] == ["", "a", "", " b", " a"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not readable"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "holds a list"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "cannot be read"),
        (lambda d: put(d, "added_tokens.json", **{"<im_end>": 7}), "'<im_end>' has id"),
        (lambda d: put(d, "tokenizer_config.json", added_tokens_decoder={"x": 1}), "added token"),
    ],
)
def test_damaged_tokenizers_are_named(directory, spoil, message):
    spoil(directory)
    with pytest.raises(UserError, match=message):
        HubTokenizer.from_hf(directory)


def test_sentencepiece_alone_is_explained(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)sentencepiece.*save_pretrained"):
        HubTokenizer.from_hf(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        HubTokenizer.from_hf(tmp_path / "absent")


# ---- templates -----------------------------------------------------------------------------------


def test_where_a_template_is_found(tmp_path):
    with pytest.raises(UserError, match=r"(?s)none in.*llava"):
        Template.from_hf(tmp_path)
    several = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    put(tmp_path, "tokenizer_config.json", chat_template=several, eos_token="</s>")
    assert Template.from_hf(tmp_path) == Template("list", {"eos_token": "</s>"})
    assert Template.from_hf(tmp_path, "tool_use").source == "tools"
    with pytest.raises(UserError, match=r"(?s)rag.*default, tool_use"):
        Template.from_hf(tmp_path, "rag")
    put(tmp_path, "chat_template.json", chat_template=[1])
    with pytest.raises(UserError, match=r"chat_template\.json"):
        Template.from_hf(tmp_path, "tool_use")


def test_which_of_several_files_has_the_template(tmp_path):
    """The order of transformers 5.24's processors, and a note where the files differ."""
    files = ("processor_config.json", "chat_template.json", "chat_template.jinja")
    files += ("tokenizer_config.json",)
    for number, there in enumerate(itertools.product((True, False), repeat=4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        held = [file for file, is_there in zip(files, there, strict=True) if is_there]
        for file in held:
            if file.endswith(".jinja"):
                (folder / file).write_text(file)
            else:
                put(folder, file, chat_template=file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = Template.find(folder)
        assert (found and found.source) == (held[0] if held else None)
        assert len(caught) == (len(held) > 1)
        assert all(file in str(warning.message) for file in held for warning in caught)
    # The same text twice is no difference, nor is a damaged file that is not used.
    put(tmp_path, "chat_template.json", chat_template="one")
    (tmp_path / "chat_template.jinja").write_text("one\n")
    put(tmp_path, "tokenizer_config.json", chat_template=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Template.from_hf(tmp_path).source == "one"


def test_what_templates_use():
    source = (
        "{% for m in messages %}\n  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{{ loop.last }}\n{% endfor %}\n"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}{{ absent }}{{ flag }}"
    )
    messages = [{"role": "skip"}, {"role": "user", "content": "<é>"}]
    rendered = Template(source).render(messages, strftime_now=lambda form: "1999" + form, flag=7)
    assert rendered == '"<é>"True\n1999%Y>7'
    source = (
        "{{ messages | map(attribute='content') | join(', ') ~ 1 }} {{ [1, 2, 3] | sum }} "
        "{{ messages | selectattr('role', 'equalto', 'b') | list | length }} "
        "{{ 'a-b'.replace('-', '+').split('+') | last }} {{ ['x', 'y'] | first }}"
        "{{ 'abc' | list | reverse | join }} {{ messages[1:] | map(attribute='role') | first }}"
    )
    messages = [{"role": "a", "content": "one"}, {"role": "b", "content": "two"}]
    assert Template(source).render(messages) == "one, two1 6 1 b xcba b"


@pytest.fixture
def low_limits(monkeypatch):
    """Limits so low that every source below is harmless without them."""
    for name, limit in (("MAX_STEPS", 100), ("MAX_OUTPUT", 1000), ("MAX_SOURCE", 500)):
        monkeypatch.setattr(prompts, name, limit)
    monkeypatch.setattr(sandbox, "_MAX_BITS", 64)
    monkeypatch.setattr(sandbox, "_WIDE", sandbox.wide(3))
    monkeypatch.setattr(jinja2.sandbox, "MAX_RANGE", 50)
    prompts._compile.cache_clear()
    yield
    prompts._compile.cache_clear()


def test_the_limits_of_templates():
    """Those that hold outside the tests."""
    assert (prompts.MAX_SOURCE, prompts.MAX_OUTPUT, prompts.MAX_STEPS) == (2**20, 2**22, 200_000)
    assert sandbox._MAX_BITS == 10_000 and sandbox._WIDE.search("%1234567d")
    assert not sandbox._WIDE.search("%123456d")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "private"),
        ("{{ namespace(__init__=1) }}", "private"),
        ("{% include 'a file' %}", "no loader"),
        ("{% for i in range(2000) %}{% endfor %}", "2e\\+03"),
        ("{% for i in range(60) %}{% endfor %}", "Range too big"),
        ("{% for i in range(20) %}{% for j in range(20) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(120) }}", "steps"),
        (
            "{% for i in [[[1] * 9] * 9] * 9 recursive %}{{ loop(i) if i is iterable }}"
            "{% endfor %}",
            "steps",
        ),
        ("{% for i in range(20) %}{{ 'x' * 100 }}{% endfor %}", "writes more than"),
        ("{{ 'x' * 2000 }}", "repeated"),
        ("{{ 10 ** 30 }}", "bits"),
        ("{% set x = 9**8 %}{% set x = x**2 %}{% set x = x**2 %}{{ x }}", "bits"),
        ("{{ 99999999999 * 99999999999 }}", "bits"),
        ("{{ range(40) | list | join('a' * 50) }}", "length"),
        ("{{ ('a' * 50).join(['a'] * 40) }}", "length"),
        ("{{ ('a' * 40).replace('a', 'b' * 50) }}", "length"),
        ("{{ ('a' * 40) | replace('a', 'b' * 50) }}", "length"),
        ("{{ ([[1] * 10] * 40) | sum(start=[]) }}", "sum"),
        ("{{ (range(40) | list * 5) | map('string') | list }}", "steps"),
        (
            "{% set n = namespace(x='a' * 99) %}{% for i in range(5) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "length",
        ),
        (
            "{% set n = namespace(x='a' * 99) %}{% for i in range(5) %}"
            "{% set n.x = n.x + n.x %}{% endfor %}",
            "length",
        ),
        ("{{ 'x' | center(2000) }}", "2e\\+03"),
        ("{{ [1] | batch(2000, 0) | list }}", "2e\\+03"),
        ("{{ '%999d' % 1 }}", "field width"),
        ("{{ '%999d' | format(1) }}", "field width"),
        ("{{ '{:999d}'.format(1) }}", "field width"),
        ("{{ ('a' * 40) | wordwrap(1) }}", "wordwrap"),
        ("{{ 'a'.translate({97: 'b' * 40}) }}", "translate"),
        ("{{ [[1]] | tojson(indent=2000) }}", "indent"),
        ("{{ lipsum(n=1) }}", "lipsum"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("x" * 501, "characters"),
    ],
)
def test_hostile_and_damaged_templates(source, message, low_limits):
    with pytest.raises(UserError, match=message):
        Template(source).render([{"role": "user", "content": "a"}])


def test_recursion_has_a_limit():
    """Deeper than Python goes, here by a limit just above the depth of the test."""
    source = "{% macro f(n) %}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(30) }}"
    assert Template(source).render([]) == ""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        with pytest.raises(UserError, match="exceeds a limit"):
            Template(source).render([])
    finally:
        sys.setrecursionlimit(limit)


def test_the_budget_is_renewed_for_every_rendering(low_limits):
    template = Template("{% for i in range(40) %}{{ '' }}{% endfor %}done")
    assert [template.render([]) for _ in range(4)] == ["done"] * 4


# ---- families ------------------------------------------------------------------------------------


def test_families_write_the_published_prompts():
    assert render(QUESTION, "llava") == "USER: <image>\nHow many? ASSISTANT:"
    assert render(QUESTION, "paligemma") == "<image><bos>How many?\n"
    assert render(QUESTION, "molmo") == "<|endoftext|><|image|> User: How many? Assistant:"
    styled = render(QUESTION, "molmo", style="vqa2:", bos="")
    assert styled == "<|image|> User: vqa2: How many? Assistant:"
    assert render(QUESTION, "plain") == "<image>How many?"


def test_llava_conversation():
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = render(messages, "llava", system=prompt_families.VICUNA_SYSTEM)
    assert rendered == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nHow many? ASSISTANT: Two.</s>USER: Sure? ASSISTANT:"
    )
    # What ends with an answer goes on from it.
    assert render(messages[:2], "llava") == "USER: <image>\nHow many? ASSISTANT: Two."


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (QUESTION, "lava", "did you mean 'llava'"),
        (QUESTION * 2, "molmo", "2 messages"),
        ([{"role": "assistant", "content": "a"}], "paligemma", "role of number 0"),
        ([{"role": "user"}], "plain", "number 0"),
        (["hello"], "plain", "number 0"),
        ([{"role": "user", "content": [{"type": "video"}]}], "llava", "number 0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "llava", "number 0"),
    ],
)
def test_conversations_that_a_family_cannot_express(messages, template, message):
    with pytest.raises(UserError, match=message):
        render(messages, template)


def test_expand():
    assert expand("a<image>b<image>", ["1<image>", "2"]) == "a1<image>b2"
    assert expand("<|image|>", ["x"], "<|image|>") == "x"
    assert expand("none", []) == "none"
    with pytest.raises(UserError, match="2 <image> in the prompt, 1 picture\n"):
        expand("<image><image>", ["1"])
    with pytest.raises(UserError, match="0 <image> in the prompt, 2 pictures\n"):
        expand("", ["1", "2"])


def test_molmo_prompt_has_the_picture_behind_the_beginning_token():
    import numpy as np

    from efficient_vlm.processing.pictures.molmo import Molmo

    picture = Molmo()(np.zeros((64, 64, 3), np.uint8))
    prompt = expand(render(QUESTION, "molmo"), [picture.text], "<|image|>")
    assert prompt.startswith("<|endoftext|><im_start><im_patch>")
    assert prompt.endswith("<im_col><im_end> User: How many? Assistant:")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [1]}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<p>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("added_tokens.json", {"<p>": "x"}),
    ],
)
def test_damaged_added_tokens(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="added tokens"):
        special_id(tmp_path, "<p>")


def test_the_last_file_says_which_token_it_is(tmp_path):
    put(tmp_path, "tokenizer.json", added_tokens=[{"id": 3, "content": "<p>"}])
    assert (special_id(tmp_path, "<p>"), special_id(tmp_path, "<q>")) == (3, None)
    put(tmp_path, "added_tokens.json", **{"<p>": 4})
    assert special_id(tmp_path, "<p>") == 4
