"""A published directory asked to draw: seeds, penalties, stops, log-probabilities, other caches."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.families import generation_config
from efficient_vlm.inference import generate as module
from efficient_vlm.inference.options import SamplingOptions
from efficient_vlm.inference.sampling import Sampling, draw, history
from efficient_vlm.processing.conversation import prompt_ids

TESTS = Path(__file__).parents[1]
SAMPLE = TESTS / "samples" / "smolvlm"
PHOTOS = [TESTS / "samples" / "llava" / f"{i:02}.jpg" for i in range(2)]
QUESTIONS, PICTURES = ["What is this?", "And these two, then?", "Hm"], [PHOTOS[:1], PHOTOS, []]
ASK = dict(images=PHOTOS[:1], max_new_tokens=8)


@pytest.fixture(scope="module")
def vlm():
    return evlm.from_pretrained(SAMPLE)


@pytest.mark.parametrize("method", [None, dict(name="divprune", budget=2)])
def test_a_seed_alone_in_a_batch_and_again(vlm, method):
    """Rows of different lengths, with settings of their own."""
    vlm = vlm if method is None else vlm.with_compressor(**method)
    seeds, temperatures = [5, 6, 5], [0.7, 1.3, 2.0]
    options = dict(max_new_tokens=8, top_p=0.9)
    together = vlm.generate(
        QUESTIONS, images=PICTURES, seed=seeds, temperature=temperatures, **options
    )
    again = vlm.generate(
        QUESTIONS, images=PICTURES, seed=seeds, temperature=temperatures, **options
    )
    assert again == together
    rows = zip(QUESTIONS, PICTURES, seeds, temperatures, strict=True)
    alone = [
        vlm.generate(question, images=row, seed=seed, temperature=t, **options)
        for question, row, seed, t in rows
    ]
    assert alone == together
    other = vlm.generate(QUESTIONS, images=PICTURES, seed=7, temperature=temperatures, **options)
    assert other != together


def whole_passes(vlm, prompt, photos):
    """Ids of a prompt with those of the picture, and its next-token logits by one pass each."""
    pictured = vlm.request([prompt], [photos]).pictured[0]
    style = vlm.family.prompt_style(vlm.config)
    ids = prompt_ids(style, vlm.template, vlm.tokenizer, prompt, pictured)

    def logits(more):
        request = vlm.place([[*ids, *more]], [pictured])
        return vlm.logits(request)[:, int(request.inputs.lengths[0]) - 1]

    return ids, logits


SETTINGS = [
    dict(temperature=0.8, seed=3, top_k=9, frequency_penalty=1.5, presence_penalty=-0.5),
    dict(temperature=1.2, seed=4, min_p=0.02, repetition_penalty=2.0, logit_bias={7: 3.0}),
    dict(presence_penalty=2.0, frequency_penalty=-1.0),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_and_logprobs_are_those_of_whole_passes(vlm, settings):
    """Each token drawn from the logits of a pass without a cache; log-probabilities in float64."""
    prompt = "What is this?"
    ids, logits = whole_passes(vlm, prompt, PHOTOS[:1])
    answer = vlm.generate(prompt, images=PHOTOS[:1], max_new_tokens=6, logprobs=4, **settings)
    sampling = Sampling.of([SamplingOptions(**settings)], vlm.model.vocab_size)
    before = history(np.array([ids], np.int32), vlm.model.vocab_size)
    assert len(answer.logprobs) == len(answer.tokens) > 1
    for step, (token, found) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        raw = logits(answer.tokens[:step])
        assert token == found.token == int(draw(raw, sampling, before, np.array([step]))[0])
        before = before.add(np.array([token]), np.array([True]))
        exact = np.asarray(raw[0], np.float64)
        exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
        assert found.logprob == pytest.approx(exact[token], abs=1e-4)
        best = np.argsort(-exact, kind="stable")[:4]
        assert [one for one, _, _ in found.top] == best.tolist()
        np.testing.assert_allclose([value for *_, value in found.top], exact[best], atol=1e-4)
        assert found.text == vlm.tokenizer.decode([token], skip_special=False)


def test_greedy_is_what_it_was(vlm):
    """Without a temperature; log-probabilities and a stop that never comes change nothing."""
    plain = vlm.generate("Why?", **ASK)
    answer = vlm.generate("Why?", seed=3, stop="never said", logprobs=0, **ASK)
    assert answer.text == plain and all(one.top == () for one in answer.logprobs)
    assert vlm.generate("Why?", temperature=0, top_k=1, do_sample=False, **ASK) == plain
    assert vlm.generate("Why?", temperature=1e-4, seed=1, **ASK) == plain
    assert vlm.generate("Why?", temperature=2.0, top_k=1, **ASK) == plain


def test_a_stop_string_ends_the_answer_in_front_of_it(vlm):
    whole = vlm.generate("Why?", **ASK)
    middle = whole[len(whole) // 2 :][:3]
    assert len(middle) == 3
    parts = []
    cut = vlm.generate("Why?", stop=["never said", middle], stream=parts.append, **ASK)
    assert cut == whole.partition(middle)[0] == "".join(parts)
    answer = vlm.generate("Why?", stop=middle, logprobs=1, **ASK)
    assert (answer.text, answer.finish) == (cut, "stop")
    assert middle in vlm.tokenizer.decode(answer.tokens)
    assert middle not in vlm.tokenizer.decode(answer.tokens[:-1])
    out = vlm.run(["Why?"], [PHOTOS[:1]], max_new_tokens=8, stop=middle)
    assert out.stopped == (middle,) and out.lengths[0, 0] == len(answer.tokens)
    assert len(out.seconds["decode"]) == len(answer.tokens) - 1  # Nothing is decoded behind it.
    # In a batch each ends at its own, and the others go on.
    asked = dict(images=[PHOTOS[:1]] * 2, max_new_tokens=8)
    assert vlm.generate(["Why?"] * 2, stop=[[middle], None], **asked) == [cut, whole]
    assert vlm.generate(["Why?"] * 2, stop=middle, **asked) == [cut, cut]


def test_a_stop_token_is_no_part_of_the_answer(vlm):
    whole = vlm.generate("Why?", logprobs=0, **ASK)
    assert whole.finish == "length" and len(whole.tokens) == 8
    stop = whole.tokens[4]
    first = whole.tokens.index(stop)
    cut = vlm.generate("Why?", logprobs=0, stop_token_ids=[stop], **ASK)
    assert (cut.tokens, cut.finish) == (whole.tokens[:first], "stop")
    assert cut.text == vlm.tokenizer.decode(whole.tokens[:first])


def test_generation_config_says_how_to_sample_where_that_is_asked(vlm, tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 1.7, "top_p": 0.8}))
    own = evlm.from_pretrained(tmp_path / "own")
    assert own.generate("Why?", **ASK) == vlm.generate("Why?", **ASK)  # Not asked: greedy.
    asked = own.generate("Why?", do_sample=True, seed=3, **ASK)
    assert asked == vlm.generate("Why?", temperature=1.7, top_p=0.8, top_k=50, seed=3, **ASK)
    given = own.generate("Why?", do_sample=True, temperature=0.5, top_k=0, seed=3, **ASK)
    assert given == vlm.generate("Why?", temperature=0.5, top_p=0.8, seed=3, **ASK)
    file.write_text(json.dumps({"temperature": "hot"}))
    own = evlm.from_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="generation_config.json: temperature: 'hot'"):
        own.sampling_options(1, True, {})
    assert own.sampling_options(1, True, {"temperature": 0.5})[0].temperature == 0.5


@pytest.mark.parametrize(
    ("strings", "stop"), [("", ()), (["", None], ()), ("a", ("a",)), ([["a"]], None), (5, None)]
)
@pytest.mark.filterwarnings("ignore:.*they end answers")
def test_stop_strings_of_a_file(strings, stop, tmp_path):
    """Empty ones end nothing; what is no string is named, and the advice can be followed."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": strings}))
    if stop is not None:
        assert generation_config.stop_strings(tmp_path) == stop
        return
    with pytest.raises(UserError, match=r"generation_config.json: stop_strings: "):
        generation_config.stop_strings(tmp_path)
    assert generation_config.repetition_penalty(tmp_path) == 1.0  # With stop=[] it is not asked.


def test_generation_config_says_where_answers_end(vlm, tmp_path):
    """Its stop strings, unless the caller gives some; of its end tokens those that it names."""
    whole = vlm.generate("Why?", logprobs=0, **ASK)
    stop = whole.text[2:4]
    shutil.copytree(SAMPLE, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps({"stop_strings": [stop], "typical_p": 0.9}))
    own = evlm.from_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match="stop_strings: they end answers"):
        found = own.generate("Why?", logprobs=0, **ASK)
    assert (found.text, found.finish) == (whole.text.partition(stop)[0], "stop")
    assert own.generate("Why?", stop=[], **ASK) == whole.text
    with pytest.warns(UserWarning, match="typical_p: not applied"):
        own.generate("Why?", do_sample=True, seed=1, **ASK)
    # An end token that the tokenizer calls its own, but this file does not name, goes by.
    ends = whole.tokens[3:4]
    first = whole.tokens.index(ends[0])
    file.write_text(json.dumps({"eos_token_id": ends}))
    cut = evlm.from_pretrained(tmp_path / "own")
    assert cut.tokenizer.eos_ids == tuple(ends)
    found = cut.generate("Why?", logprobs=0, **ASK)
    assert (found.tokens, found.finish) == (whole.tokens[:first], "stop")


def test_no_new_program_for_another_request(vlm):
    programs = (module.prefill_stage, module.decode_stage)
    vlm.generate("What is this?", temperature=0.7, top_p=0.9, seed=1, **ASK)
    before = [program._cache_size() for program in programs]
    vlm.generate("What else is here?", temperature=1.1, top_p=0.5, stop="x", **ASK)
    assert [program._cache_size() for program in programs] == before


def test_pages_and_int8(vlm):
    plain = vlm.run(["Why?"], [PHOTOS[:1]], max_new_tokens=8)
    paged = vlm.run(["Why?"], [PHOTOS[:1]], max_new_tokens=8, cache=dict(kind="paged", page=16))
    assert paged.tokens.tolist() == plain.tokens.tolist()
    small = vlm.run(["Why?"], [PHOTOS[:1]], max_new_tokens=8, cache=dict(dtype="int8"))
    dim = vlm.model.make_decoder().dim
    assert small.kv_bytes / plain.kv_bytes == pytest.approx((dim + 4) / (4 * dim))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature=-1), "temperature: -1"),
        (dict(temperature=[0.5, 0.5]), "2 values for 1 prompts"),
        (dict(temprature=1.0), "did you mean 'temperature'"),
        (dict(top_k=0.5), "top_k: 0.5"),
        (dict(seed=-1), "seed: -1"),
        (dict(stop=[""]), "stop: ''"),
        (dict(stop=[["x"], ["y"]]), "2 values for 1 prompts"),
        (dict(logprobs=21), "logprobs: 21"),
        (dict(logit_bias={10**6: 1.0}), "below"),
        (dict(repetition_penalty=0), "repetition_penalty: 0"),
        (dict(do_sample="yes"), "do_sample: 'yes'"),
        (dict(do_sample=False, temperature=1.0), "leave one out"),
        (dict(cache=dict(kind="pages")), "cache.kind"),
        (dict(cache="paged"), "a mapping"),
    ],
)
def test_mistakes_are_told_in_three_lines(vlm, options, words):
    with pytest.raises(UserError) as error:
        vlm.generate("Why?", **options)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


def main(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["efficient-vlm", *words])
        return cli.main()


def test_the_command_line_draws(vlm, capsys):
    asked = ["generate", str(SAMPLE), "Why?", f"--image={PHOTOS[0]}", "--max-new-tokens=8"]
    options = ["--temperature=0.9", "--top-p=0.9", "--top-k=30", "--seed=3", "--cache.kind=paged"]
    expected = vlm.generate("Why?", temperature=0.9, top_p=0.9, top_k=30, seed=3, logprobs=2, **ASK)
    assert main([*asked, *options]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main([*asked, *options, "--logprobs=2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["answer"] == expected.text and report["finish"] == expected.finish
    assert [one["token"] for one in report["logprobs"]] == list(expected.tokens)
    assert main([*asked, f"--stop={expected.text[3:5]}", *options, "--logprobs=1"]) == 0
    text, *lines = capsys.readouterr().out.split("\n")
    assert text == expected.text.partition(expected.text[3:5])[0] and lines[0].strip()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--temperature=-1", "--temperature: -1.0"),
        ("--top-p=0", "--top-p: 0.0"),
        ("--top-k=x", "--top-k"),
        ("--seed=-1", "--seed: -1"),
        ("--logit-bias=7", "ID=NUMBER"),
        ("--repetition-penalty=0", "--repetition-penalty: 0.0"),
        ("--stop=", "--stop: ''"),
        ("--cache.kind=pages", "cache.kind"),
        ("--cache.page=8", "cache.page"),
    ],
)
def test_mistakes_of_the_command_line(option, words, capsys):
    """In front of loading anything: there is no such directory."""
    assert main(["generate", "nowhere", "Hm", option]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") <= 3 and "Traceback" not in said
