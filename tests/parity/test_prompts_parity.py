"""Templates and tokenizers against transformers' own `apply_chat_template` and fast tokenizer."""

import itertools
import json
import warnings

import pytest

pytest.importorskip("transformers", minversion="5.23")
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from efficient_vlm.processing.chat_template import HubTokenizer, Template

pytestmark = pytest.mark.parity

LINE_PER_TURN = """{{ bos_token }}{% for message in messages %}
{% set content = message['content'] %}
{{ message['role'] | capitalize }}:{% if content[0]['type'] != 'image' %} {% endif %}
{% for part in content %}
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}
{%- endfor %}<end>
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

NUMBERED = """{% set pictures = namespace(n=0) %}
{%- for message in messages %}
  {%- if loop.first and message.role != 'system' %}<|start|>system
You are helpful.<end>
{% endif %}<|start|>{{ message.role }}
{% generation %}{% if message.content is string %}{{ message.content | trim }}{% else %}
    {%- for part in message.content %}
        {%- if part.type == 'image' or 'image' in part %}
            {%- set pictures.n = pictures.n + 1 %}
            {%- if number_pictures %}Picture {{ pictures.n }}: {% endif %}<image>
        {%- else %}{{ part.text }}{% endif %}
    {%- endfor %}{% endif %}{% endgeneration %}<end>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% endif %}"""

ALTERNATING = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start>' + role + '\\n' }}
    {%- for part in message['content'] %}
        {{- '<image>' if part.type == 'image' else part.text.strip() }}
    {%- endfor %}
    {{- '<end>\\n' + (message | tojson(indent=1)) + (tools | tojson if tools else '') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"""

MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": " What <b>is</b> “this”? "}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A naïve 犬 🐕."}]},
    {"role": "user", "content": [{"type": "text", "text": "And\nthis?"}, {"type": "image"}]},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same tiny BPE tokenizer in transformers and, from the files that it saves, here."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["what is this and this", "assistant user system"], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<end>",
        extra_special_tokens={"image_token": "<image>"},
    )
    theirs.chat_template = ALTERNATING
    directory = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(directory)
    return theirs, HubTokenizer.from_hf(directory), directory


@pytest.mark.parametrize("source", [LINE_PER_TURN, NUMBERED, ALTERNATING])
@pytest.mark.parametrize("answering", [True, False])
@pytest.mark.parametrize("extra", [{}, {"number_pictures": True}])
def test_templates(pair, source, answering, extra):
    theirs, ours, _ = pair
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}]
    expected = theirs.apply_chat_template(
        MESSAGES,
        chat_template=source,
        tools=tools,
        tokenize=False,
        add_generation_prompt=answering,
        **extra,
    )
    rendered = Template(source, ours.special).render(
        MESSAGES, tools=tools, add_generation_prompt=answering, **extra
    )
    assert rendered == expected
    assert rendered.count("<image>") == 2


@pytest.mark.parametrize("source", [LINE_PER_TURN, NUMBERED, ALTERNATING])
@pytest.mark.parametrize("text", ["It is a", "assistant", " a \n"])
def test_an_answer_that_was_begun(pair, source, text):
    """What ends with the assistant's turn: `continue_final_message` of transformers."""
    if source == ALTERNATING:  # Writes the text a second time, as JSON, behind the first.
        source = source.replace("(message | tojson(indent=1)) + ", "")
    theirs, ours, _ = pair
    messages = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    expected = theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert Template(source, ours.special).render(messages) == expected
    # Asked for a header, both write one.
    header = dict(add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **header)
    assert Template(source, ours.special).render(messages, **header) == expected


def test_saved_template_is_found(pair):
    theirs, _, directory = pair
    found = Template.from_hf(directory)
    assert found.source == ALTERNATING
    assert found.tokens["image_token"] == "<image>"
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert found.render(MESSAGES) == expected


def test_the_file_that_a_processor_takes(pair, tmp_path):
    """Of several with different templates, all subsets of the three that a processor reads."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs, _, _ = pair
    plain = PreTrainedTokenizerFast(
        tokenizer_object=theirs.backend_tokenizer,
        extra_special_tokens={"image_token": "<image>"},
    )
    LlavaProcessor(CLIPImageProcessorPil(), plain, patch_size=14).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    for first, second, third in itertools.product((True, False), repeat=3):
        if not (first or second or third):
            continue
        named = {"chat_template": "processor"} if first else {}
        (tmp_path / "processor_config.json").write_text(json.dumps(settings | named))
        for there, file, text in (
            (second, "chat_template.json", '{"chat_template": "json"}'),
            (third, "chat_template.jinja", "jinja"),
        ):
            (tmp_path / file).unlink(missing_ok=True)
            if there:
                (tmp_path / file).write_text(text)
        taken = LlavaProcessor.from_pretrained(tmp_path).chat_template
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert Template.from_hf(tmp_path).source == taken


@pytest.mark.parametrize(
    "text",
    [
        "",
        "what is this",
        "<s>user<image> this <end>",
        "naïve 犬 🐕\n\n  x",
        " <image><image>\t<end",
    ],
)
def test_ids(pair, text):
    theirs, ours, _ = pair
    assert ours.encode(text) == theirs(text)["input_ids"]
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, bos=False) == ids
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=skip) == expected
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.id_of("image_token") == theirs.convert_tokens_to_ids("<image>")
