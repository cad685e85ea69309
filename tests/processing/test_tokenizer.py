"""Tokenizers: reversible, reproducible, and deaf to special tokens in text."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_vlm.data import questions
from efficient_vlm.errors import UserError
from efficient_vlm.processing import plain_tokenizer
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.tokenizer import Tokenizer

TEXTS = [
    "a red car on the road",
    "a blue car",
    "der rote Wagen, schön",
    "赤い車",
    "<eos> <pad>",
] * 3
WORDS = plain_tokenizer.word_level(questions.vocabulary())
BPE = plain_tokenizer.train(TEXTS, 300)
ATTACKS = [
    "<eos>",
    "<pad>",
    "<unk>",
    "a<eos>b",
    "<<eos>>",
    " <eos> <pad> ",
    "<e<eos>os>",
    "<|endoftext|>",
    "\u200b<eos>\u200b",
    "<EOS>",
    "\ud800",
    "\0",
]


def test_words():
    assert (WORDS.pad_id, WORDS.eos_id) == (0, 1)
    assert WORDS.vocab_size == 3 + len(questions.vocabulary())
    for text in ("which digit is red", "is red left of blue", "63", "K 7 Q 2"):
        ids = WORDS.encode(text)
        assert len(ids) == len(text.split()) and WORDS.decode(ids) == text
        assert min(ids) > 2
    assert WORDS.encode("which zebra")[1] == 2
    assert WORDS.answer([*WORDS.encode("7"), 1, 9, 9]) == "7"
    assert WORDS.decode([1, *WORDS.encode("7 5"), 0, 1]) == "7 5"


def test_bytes():
    assert (BPE.pad_id, BPE.eos_id) == (0, 1)
    for text in (*TEXTS, "Ünïcödé ☃ 𝄞 مرحبا", "tab\tand\nline"):
        assert BPE.decode(BPE.encode(text)) == text
    prompt = BPE.encode_prompt("What?")
    assert prompt == BPE.encode("What?\n") and BPE.encode_prompt("")


@pytest.mark.parametrize("text", ATTACKS)
@pytest.mark.parametrize("made", [WORDS, BPE], ids=["words", "bytes"])
def test_text_never_makes_a_special_token(made, text):
    for ids in (made.encode(text), made.encode(f"red {text} car"), made.encode(text * 3)):
        assert not {made.pad_id, made.eos_id} & set(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("<>eospadunk| \n"), max_size=30))
def test_text_never_makes_a_special_token_fuzzed(text):
    for made in (WORDS, BPE):
        assert not {made.pad_id, made.eos_id} & set(made.encode(text))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_bytes_are_reversible(text):
    assert BPE.decode(BPE.encode(text)) == text.encode("utf-8", "replace").decode()


def test_same_texts_same_tokenizer_in_another_process():
    code = (
        "import sys, json; from efficient_vlm.processing import plain_tokenizer; "
        "print(plain_tokenizer.train(json.loads(sys.argv[1]), 300).fingerprint)"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == BPE.fingerprint
    assert plain_tokenizer.train(TEXTS[:3], 300).fingerprint != BPE.fingerprint


@pytest.mark.parametrize("made", [WORDS, BPE], ids=["words", "bytes"])
def test_save_and_load(made, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    made.save(path)
    loaded = plain_tokenizer.load(path)
    assert loaded.fingerprint == made.fingerprint and loaded.separator == made.separator
    assert loaded.encode("which digit is red <eos>") == made.encode("which digit is red <eos>")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def published(eos="</s>"):
    """A tokenizer.json in the manner of published models: its special tokens come last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([eos, "<image>"])
    template = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
    )
    backend.post_processor = template
    return backend


def test_published_tokenizer(tmp_path):
    backend = published()
    backend.save(str(tmp_path / "t.json"))
    made = plain_tokenizer.load(tmp_path / "t.json")
    assert made.eos_id == backend.token_to_id("</s>") == made.pad_id
    special = {backend.token_to_id(t) for t in ("</s>", "<image>")}
    for text in ("a red car", "</s>", "a </s> b <image>"):
        assert not special & set(made.encode(text))
    assert made.answer([*made.encode("a red car"), made.eos_id, 5]) == "a red car"


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    published(eos="[STOP]").save(str(tmp_path / "no_eos.json"))
    for name in ("none.json", "bad.json", "no_eos.json"):
        with pytest.raises(UserError, match="data.tokenizer") as caught:
            plain_tokenizer.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match="data.vocab_size"):
        plain_tokenizer.train(TEXTS, 100)


# --- one interface --------------------------------------------------------------------------------


def hub():
    """The same definition, read as a published model's."""
    return HubTokenizer(published(), {"eos_token": "</s>"})


@pytest.mark.parametrize("made", [WORDS, BPE, hub()], ids=["words", "bytes", "hub"])
def test_what_callers_ask_of_any_tokenizer(made):
    assert isinstance(made, Tokenizer)
    ids = made.encode("red left of blue", bos=False)
    assert max(ids) < made.vocab_size and not {made.pad_id, *made.eos_ids} & set(ids)
    assert made.decode(ids) == "red left of blue"
    assert made.encode_prompt("red") and made.encode_prompt("")
    assert made.answer([*ids, made.eos_id, *ids]) == made.decode(ids) == made.answer(ids)
    stream = made.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == made.decode(ids)
    assert made.eos_id == made.eos_ids[0] and len(made.fingerprint) == 64
    assert made.special["eos_token"] in ("<eos>", "</s>")
    assert not made.knows("no such token at all")
    if made.bos_id is None:
        with pytest.raises(UserError, match="no beginning token"):
            made.encode("red", bos=True)


def test_the_two_rules_for_special_tokens_in_text():
    """Ordinary text for ours, which no text can end; for a published model what they spell."""
    assert not BPE.knows("<eos>") and BPE.eos_id not in BPE.encode("<eos>")
    assert hub().knows("</s>") and hub().encode("</s>", bos=False) == [hub().eos_id]


def test_a_model_without_a_token_that_ends_answers():
    endless = HubTokenizer(published(), {})
    assert endless.eos_ids == () and endless.answer(endless.encode("red", bos=False)) == "red"
    with pytest.raises(UserError, match="no token that ends an answer"):
        _ = endless.eos_id
