"""Packed batches of published models: the same in every process and after every resume."""

import collections
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from tuned_models import SMOLVLM, golden_with_words, mixed_rows, opened, png, row, write_rows

from efficient_vlm.data import chat
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.sources import open_source
from efficient_vlm.errors import UserError

ROWS = 22
END = "<end_of_utterance>\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Family -> (model, processor): tiles of one size, and pictures near their own size."""
    qwen = golden_with_words("qwen2_5_vl", tmp_path_factory.mktemp("golden") / "qwen")
    return {"smolvlm": opened(SMOLVLM), "qwen2_5_vl": opened(qwen)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(rows, their file)."""
    folder = tmp_path_factory.mktemp("rows")
    made = mixed_rows(folder, ROWS)
    return made, write_rows(folder / "rows.jsonl", made)


def pipeline_of(published, path, rows=None, programs=8, **fields):
    model, processor = published
    given = dict(batch_size=2, pack_tokens=96, max_images=4, max_length=512, test_fraction=0.0)
    config = DataConfig(source="auto", path=str(path), **{**given, "num_threads": 0, **fields})
    source = open_source(config, "train")
    return ChatPipeline(config, source, processor, [model], rows=rows, programs=programs)


def take(pipeline, count, state=None):
    """The next batches, and the state in front of each."""
    batches, states = iter(pipeline), []
    if state is not None:
        batches.set_state(state)
    found = []
    for _ in range(count):
        states.append(json.loads(json.dumps(batches.get_state())))
        found.append(next(batches))
    return found, states


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.index.tolist() == two.index.tolist()
        jax.tree.map(np.testing.assert_array_equal, one.inputs, two.inputs)


def shapes(batch):
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch.inputs))


def answers_of(batches, tokenizer):
    """The texts that batches teach, each up to its end token, and how often."""
    found = collections.Counter()
    for batch in batches:
        for labels in np.asarray(batch.inputs.labels):
            text = tokenizer.decode(labels[labels >= 0].tolist(), skip_special=False)
            found.update(part.strip() for part in text.split(END)[:-1])
    return found


def taught(rows):
    """The same by the rows."""
    answers = (m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant")
    return collections.Counter(answer.strip() for answer in answers)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_batches_go_on_from_any_state(published, rows, family, threads):
    """Also in the middle of a window, which here is an epoch, and behind it."""
    made = pipeline_of(published[family], rows[1], num_threads=threads)
    expected, states = take(made, 14)
    seen = np.concatenate([batch.index for batch in expected]).tolist()
    assert sorted(seen[:ROWS]) == list(range(ROWS)) and len(seen) > ROWS
    assert seen[:ROWS] != list(range(ROWS))
    assert len(set(map(shapes, expected))) <= len(made.rooms) <= 8
    for at in (0, 1, 4, 9, 11):
        again = pipeline_of(published[family], rows[1], num_threads=threads, cache_mb=0)
        assert again.fingerprint == made.fingerprint
        assert_same(take(again, 3, states[at])[0], expected[at : at + 3])


def test_few_programs_and_rows_alone(published, rows):
    """One shape, and one sample a row: each row is taught what it says."""
    _, processor = published["smolvlm"]
    for fields in (dict(programs=1), dict(programs=2), dict(pack=False), dict(batch_size=3)):
        made = pipeline_of(published["smolvlm"], rows[1], **fields)
        batches = list(made.epoch())
        assert len(made.rooms) <= fields.get("programs", 8)
        assert answers_of(batches, processor.tokenizer) == taught(rows[0])
        if not fields.get("pack", True):
            assert all(len(batch.index) <= 2 for batch in batches)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_processes_read_their_own_rows(published, rows, family):
    whole = take(pipeline_of(published[family], rows[1]), 8)[0]
    parts = [
        take(pipeline_of(published[family], rows[1], rows=[number]), 8)[0] for number in range(2)
    ]
    for both, first, second in zip(whole, *parts, strict=True):
        assert both.index.tolist() == [*first.index, *second.index]
        jax.tree.map(
            lambda a, b, c: np.testing.assert_array_equal(a, np.concatenate([b, c])),
            *(both.inputs, first.inputs, second.inputs),
        )


def test_an_epoch_has_every_row_once(published, rows):
    _, processor = published["smolvlm"]
    batches = list(pipeline_of(published["smolvlm"], rows[1]).epoch())
    seen = np.concatenate([batch.index for batch in batches])
    assert sorted(seen.tolist()) == list(range(ROWS))
    assert answers_of(batches, processor.tokenizer) == taught(rows[0])


def test_an_epoch_of_several_windows(published, rows, monkeypatch):
    """Rows are packed among few, as packing all of them takes the square of their number."""
    monkeypatch.setattr(chat, "_WINDOW", 8)
    batches = list(pipeline_of(published["smolvlm"], rows[1], batch_size=1).epoch())
    seen = np.concatenate([batch.index for batch in batches])
    assert sorted(seen.tolist()) == list(range(ROWS))


def test_batches_say_where_conversations_are(published, tmp_path):
    """In a mixture, in any epoch, with two conversations a sample: found by what they answer."""
    parts = []
    for name, count in (("a", 5), ("b", 9)):
        (folder := tmp_path / name).mkdir()
        path = write_rows(folder / "rows.jsonl", mixed_rows(folder, count))
        parts.append(dict(path=str(path), weight=1.0, name=name, separate_turns=True))
    pipeline = pipeline_of(published["smolvlm"], "", mixture=parts, pack_tokens=192)
    batches, keys = take(pipeline, 12)[0], []
    for batch in batches:
        for at, found in enumerate(batch.conversations):
            for segment, (sample, number) in enumerate(found, 1):
                own = batch.inputs.segments[at] == segment
                labels = batch.inputs.labels[at][own & (batch.inputs.labels[at] >= 0)]
                ((_, answer),) = pipeline.source[sample].conversations[number].turns
                assert pipeline.tokenizer.decode(labels).strip() == answer.strip()
                keys.append((sample, number))
    assert {number for _, number in keys} == {0, 1} and len(keys) > 2 * len(set(keys))


def test_text_alone(published, tmp_path):
    rows = [row([], f"number {n} ?", "it is. " * (1 + n % 4)) for n in range(18)]
    path = write_rows(tmp_path / "text.jsonl", rows)
    made = pipeline_of(published["smolvlm"], path)
    batches = list(made.epoch())
    assert all(batch.inputs.pictures is None for batch in batches)
    assert answers_of(batches, published["smolvlm"][1].tokenizer) == taught(rows)


# ---- rows that cannot be used --------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """The tiny SmolVLM with a template that takes no system prompt."""
    folder = tmp_path_factory.mktemp("strict") / "smolvlm"
    shutil.copytree(SMOLVLM, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    settings["chat_template"] = refusal + settings["chat_template"]
    path.write_text(json.dumps(settings))
    return opened(folder)


def with_bad_rows(folder):
    """(rows, which of them are unusable by reason); those of "corrupt" only when they are read."""
    rows = mixed_rows(folder, ROWS)
    whole = png(7, 40, 40)
    (folder / "good.png").write_bytes(whole)
    # The header is good, the pixels end in the middle.
    (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    (folder / "none.png").write_bytes(b"no picture at all")
    system = row(["good.png"], "<image>what ?", "it is.")
    system["messages"].insert(0, dict(role="system", content="be brief"))
    bad = {
        3: (row(["damaged.png"], "<image>what is this ?", "it is it."), "corrupt"),
        5: (row(["good.png"], "<image>what ?", "it is " * 200), "too_long"),
        8: (row(["good.png"], "<image> <image>what ?", "it."), "markers"),
        12: (system, "refused"),
        13: (row(["gone.png"], "<image>what ?", "it."), "missing"),
        17: (row(["none.png"], "<image>what ?", "it."), "format"),
        19: (row(["good.png"] * 5, "<image>" * 5 + "what ?", "it."), "too_many_images"),
    }
    for number, (each, _) in bad.items():
        rows[number] = each
    return rows, {number: reason for number, (_, reason) in bad.items()}


def test_unusable_rows_are_left_out_and_counted(strict, tmp_path):
    rows, bad = with_bad_rows(tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    fields = dict(max_skip_fraction=0.5, max_length=400)
    made = pipeline_of(strict, path, **fields)
    seen_early = {reason: 1 for reason in bad.values() if reason != "corrupt"}
    assert made.skips.counts == seen_early
    batches = list(made.epoch())
    assert made.skips.counts == seen_early | {"corrupt": 1}
    good = [each for number, each in enumerate(rows) if number not in bad]
    assert answers_of(batches, strict[1].tokenizer) == taught(good)
    planned = np.concatenate([batch.index for batch in batches]).tolist()
    assert sorted(planned) == sorted({*range(ROWS)} - (bad.keys() - {3}))

    # In training a usable neighbour takes the place of a row that is known to be unusable.
    expected, states = take(pipeline_of(strict, path, **fields), 12)
    given = set(np.concatenate([batch.index for batch in expected]).tolist())
    assert not given & (bad.keys() - {3})
    first = next(n for n, batch in enumerate(expected) if 3 in batch.index)
    for at in (max(first - 1, 0), first, first + 1):
        again = pipeline_of(strict, path, **fields)
        again.skips.load(made.skips.state())  # As a run does that goes on.
        assert_same(take(again, 2, states[at])[0], expected[at : at + 2])
        assert again.skips.counts == made.skips.counts


def test_a_damaged_picture_leaves_everything_else_as_it_was(strict, tmp_path):
    """The same rows with the picture whole: the same plan, and the same tokens but its own."""
    rows, _ = with_bad_rows(tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    damaged = take(pipeline_of(strict, path, max_skip_fraction=0.5), 10)[0]
    shutil.copy(tmp_path / "good.png", tmp_path / "damaged.png")
    whole = take(pipeline_of(strict, path, max_skip_fraction=0.5), 10)[0]
    assert any(3 in batch.index for batch in damaged)
    for one, two in zip(damaged, whole, strict=True):
        assert one.index.tolist() == two.index.tolist()
        assert shapes(one) == shapes(two)
        if 3 not in one.index:
            assert_same([one], [two])
    learnt = [answers_of(batches, strict[1].tokenizer) for batches in (damaged, whole)]
    assert set(learnt[1] - learnt[0]) == {"it is it."} and not learnt[0] - learnt[1]


@pytest.mark.parametrize("reason", ["markers", "corrupt"])
def test_too_many_unusable_rows_end_it(strict, tmp_path, reason):
    rows, bad = with_bad_rows(tmp_path)
    kept = [r for n, r in enumerate(rows) if n not in bad or bad[n] == reason]
    path = write_rows(tmp_path / "rows.jsonl", kept)
    with pytest.raises(UserError, match=f"{reason} 1") as caught:
        list(pipeline_of(strict, path, max_skip_fraction=0.0).epoch())
    assert len(str(caught.value).splitlines()) <= 3


def test_no_usable_row(strict, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row(["gone.png"], "<image>what ?", "it.")] * 3)
    with pytest.raises(UserError, match="none of 3 samples can be used") as caught:
        pipeline_of(strict, path, max_skip_fraction=1.0)
    assert len(str(caught.value).splitlines()) <= 3


# ---- fingerprints --------------------------------------------------------------------------------


def test_a_fingerprint_is_that_of_content_and_order(published, rows, tmp_path):
    made, path = rows
    shutil.copytree(path.parent, tmp_path / "copy")
    changed = [*made[:-1], row([], "number ?", "another answer .")]
    others = {
        "seed": pipeline_of(published["smolvlm"], path, seed=1),
        "batch_size": pipeline_of(published["smolvlm"], path, batch_size=3),
        "rooms": pipeline_of(published["smolvlm"], path, pack_tokens=1024),
        "tokenizer": pipeline_of(published["qwen2_5_vl"], path),
        "content": pipeline_of(
            published["smolvlm"], write_rows(tmp_path / "copy" / "other.jsonl", changed)
        ),
    }
    first = pipeline_of(published["smolvlm"], path).fingerprint
    assert json.loads(json.dumps(first)) == first
    moved = pipeline_of(published["smolvlm"], tmp_path / "copy" / "rows.jsonl", num_threads=2)
    assert moved.fingerprint == first
    for name, other in others.items():
        assert other.fingerprint[name] != first[name], name
    assert len({json.dumps(o.fingerprint, sort_keys=True) for o in others.values()}) == len(others)


def test_seeds_give_other_orders(published, rows):
    first = take(pipeline_of(published["smolvlm"], rows[1]), 6)[0]
    other = take(pipeline_of(published["smolvlm"], rows[1], seed=1), 6)[0]
    pairs = itertools.zip_longest(first, other)
    assert any(a.index.tolist() != b.index.tolist() for a, b in pairs)


def test_a_mixture_says_what_each_source_gave(published, tmp_path):
    """Counted again from the batches themselves, in the middle of a window."""
    parts = []
    for name, count in (("a", 6), ("b", 18)):
        folder = tmp_path / name
        folder.mkdir()
        path = write_rows(folder / f"{name}.jsonl", mixed_rows(folder, count))
        parts.append(dict(path=str(path), weight=1.0))
    pipeline = pipeline_of(published["smolvlm"], "", mixture=parts)
    batches, _ = take(pipeline, 5)
    drawn = np.concatenate([batch.index for batch in batches])
    found = pipeline.by_source(5)
    assert [each["drawn"] for each in found] == [(drawn < 6).sum(), (drawn >= 6).sum()]
    assert [each["samples"] for each in found] == [6, 18]
    facts = pipeline.described()
    assert [each["rows"] for each in facts] == [6, 18]
    assert len({each["sha256"] for each in facts}) == 2 and "used" not in facts[0]


def test_several_conversations_beside_a_method_that_reads_the_text(published, tmp_path):
    """One would choose the tokens of the other."""
    turns = ["what ?", "it .", "and this ?", "that ."]
    path = write_rows(tmp_path / "rows.jsonl", [row([], *turns) for _ in range(4)])
    model, processor = published["smolvlm"]
    looks = model.clone(compressor=dict(name="fastv", layer=1, keep=2))
    with pytest.raises(UserError, match="fastv") as error:
        pipeline_of((looks, processor), path, separate_turns=True)
    assert str(error.value).count("\n") <= 2 and "separate_turns=False" in str(error.value)
    assert len(list(pipeline_of((looks, processor), path).epoch())) > 0
    assert len(list(pipeline_of((model, processor), path, separate_turns=True).epoch())) > 0
