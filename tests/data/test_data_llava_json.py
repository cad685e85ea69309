"""The adapter for a user's own images, and what happens to bad samples."""

import dataclasses
import json

import numpy as np
import pytest
from data_samples import image_bytes, row
from PIL import Image

from efficient_vlm.data import DataConfig, llava_json, make_eval, make_train
from efficient_vlm.errors import UserError
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord


def config(path, **changes):
    fields = {"batch_size": 4, "image_size": 16, "max_length": 64, "vocab_size": 300}
    fields |= {"test_fraction": 0.0, "num_threads": 0, "max_images": 2}
    return DataConfig(source="llava_json", path=str(path), **(fields | changes))


def good_rows(number):
    return [row(i, f"good{i % 10}.png", answer=f"Noise {i}.") for i in range(number)]


def reason_of(source, index):
    with pytest.raises(BadRecord) as caught:
        source[index]
    return caught.value.reason


@pytest.mark.parametrize("lines", [False, True])
def test_images_as_text_list_or_absent(write_rows, lines):
    rows = [row(0, "good0.png"), row(1, ["good1.png", "good2.png"]), row(2), row(3, [])]
    source = llava_json.LlavaSource(write_rows(rows, lines))
    assert [len(source[i].images) for i in range(4)] == [1, 2, 0, 0]
    assert source[1].images[1] == image_bytes(2)
    assert source[0].id == "r0"
    pipeline = make_train(config(source.path))
    batch = next(iter(pipeline))
    by_index = dict(zip(batch["index"].tolist(), batch["image_mask"].tolist(), strict=True))
    assert by_index == {0: [True, False], 1: [True, True], 2: [False, False], 3: [False, False]}
    wanted = images.resize(images.decode(image_bytes(0)), (16, 16))
    np.testing.assert_array_equal(batch["images"][batch["index"].tolist().index(0), 0], wanted)


def test_unicode_markers_and_turns(tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Was ist das? ☃ "},
        {"from": "gpt", "value": "Ein Schneemann, 雪だるま <image>"},
        {"from": "human", "value": "Sicher?"},
        {"from": "gpt", "value": "Ja."},
        {"from": "human", "value": "never answered"},
    ]
    path = tmp_path / "ü.jsonl"
    text = json.dumps({"id": 7, "conversations": turns}, ensure_ascii=False)
    path.write_text("\ufeff" + text + "\r\n\n", encoding="utf-8")
    (conversation,) = llava_json.LlavaSource(path)[0].conversations
    assert conversation.system == "Be brief."
    assert conversation.flat().turns == (
        ("Be brief.\nWas ist das? ☃", "Ein Schneemann, 雪だるま <image>"),
        ("Sicher?", "Ja."),
    )
    pipeline = make_train(config(path, batch_size=1, max_length=200))
    batch = next(iter(pipeline))
    (tokens,), (mask,) = batch["tokens"][0], batch["loss_mask"][0]
    split = batch["prompt_lengths"][0, 0]
    assert pipeline.tokenizer.answer(tokens[split:]) == "Ein Schneemann, 雪だるま <image>"
    assert (tokens[mask] == pipeline.tokenizer.eos_id).sum() == 2
    data = make_eval(config(path, batch_size=1, max_length=200), split="train")
    assert data.answers == [["Ein Schneemann, 雪だるま <image>"]]


def test_reasons(write_rows, tmp_path):
    (tmp_path / "cut.png").write_bytes(image_bytes(0)[:-60])
    (tmp_path / "note.txt").write_text("hello")
    # Above our limit of 50 megapixels, below the one from which Pillow warns.
    Image.new("1", (8_000, 8_000)).save(tmp_path / "large.png")
    cases = {
        "missing": row(0, "nowhere.png"),
        "corrupt": row(0, "cut.png"),
        "format": row(0, "note.txt"),
        "too_large": row(0, "large.png"),
        "no_label": row(0, "good0.png", answer="  "),
        "too_long": row(0, "good0.png", answer="word " * 500),
        "too_many_images": row(0, ["good0.png", "good1.png", "good2.png"]),
        "malformed": {"id": "x", "conversations": "hello"},
        "markers": row(0, "good0.png", question="<image> or <image>?"),
        "media": row(0, "good0.png") | {"video": "a.mp4"},
        "outside": row(0, "../good0.png"),
    }
    path = write_rows([*good_rows(20), *cases.values(), {"image": 3, "conversations": []}])
    pipeline = make_train(config(path, max_skip_fraction=1.0))
    seen = set()
    iterator = iter(pipeline)
    for _ in range(9):
        seen |= set(next(iterator)["index"].tolist())
    assert seen == set(range(20))
    assert pipeline.skipped == dict.fromkeys(cases, 1) | {"malformed": 2}
    data = make_eval(config(path, max_skip_fraction=1.0), split="train")
    assert data.skipped == pipeline.skipped and len(data) == 5


@pytest.mark.parametrize(
    "bad",
    [
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "robot", "value": "x"}]},
        {"conversations": ["text"]},
        {"conversations": []},
        {"image": {"a": 1}, **{k: v for k, v in row(0).items() if k != "image"}},
        {"image": [""], "conversations": row(0)["conversations"]},
        [1, 2],
        "text",
        None,
    ],
)
def test_malformed_rows(write_rows, bad):
    source = llava_json.LlavaSource(write_rows([*good_rows(1), bad]))
    assert reason_of(source, 1) == "malformed"


def test_bad_samples_do_not_move_others(write_rows):
    """The order of good samples is as without the bad one, which the next good one replaces."""
    rows = good_rows(12)
    wanted = take_index(make_train(config(write_rows(rows))), 9)
    rows[5] = row(5, "nowhere.png")
    broken = config(write_rows(rows), max_skip_fraction=0.2)
    pipeline = make_train(broken)
    got = take_index(pipeline, 9)
    assert got == [6 if i == 5 else i for i in wanted] and pipeline.skipped == {"missing": 1}
    iterator = iter(make_train(broken))
    for _ in range(4):
        next(iterator)
    fresh = iter(make_train(broken))
    fresh.set_state(iterator.get_state())
    assert [next(fresh)["index"].tolist() for _ in range(5)] == [
        got[k : k + 4] for k in range(16, 36, 4)
    ]
    halves = [make_train(broken, rows=rows) for rows in (range(2), range(2, 4))]
    iterators = [iter(h) for h in halves]
    joined = [i for _ in range(9) for it in iterators for i in next(it)["index"].tolist()]
    assert joined == got


def take_index(pipeline, number):
    iterator = iter(pipeline)
    return [i for _ in range(number) for i in next(iterator)["index"].tolist()]


def test_too_many_bad_samples_stop_the_run(write_rows):
    rows = good_rows(200)
    for bad in (17, 42):
        rows[bad] = row(bad, "nowhere.png")
    pipeline = make_train(config(write_rows(rows)))
    assert len(take_index(pipeline, 50)) == 200 and pipeline.skipped == {"missing": 2}
    rows[99] = row(99, "good0.png", answer="")
    pipeline = make_train(config(write_rows(rows)))
    with pytest.raises(UserError, match="missing 2") as caught:
        take_index(pipeline, 50)
    message = str(caught.value)
    assert "no_label 1" in message and "max_skip_fraction=0.01" in message
    assert len(message.splitlines()) <= 3
    with pytest.raises(UserError, match="no_label 1"):
        make_eval(config(write_rows(rows)), split="train")


def test_hopeless_data_stop_at_once(write_rows):
    """Chance cannot explain ten bad of ten: no need to see one per cent of a million."""
    rows = [row(i, "nowhere.png") for i in range(5000)]
    pipeline = make_train(config(write_rows(rows)))
    with pytest.raises(UserError, match="missing"):
        next(iter(pipeline))
    assert sum(pipeline.skipped.values()) <= 12


def test_all_bad_but_allowed(write_rows):
    rows = [row(i, "nowhere.png") for i in range(3)]
    with pytest.raises(UserError, match="none of the 3 samples"):
        next(iter(make_train(config(write_rows(rows), max_skip_fraction=1.0))))


@pytest.mark.parametrize("content", ["", "[]", "  \n", "[{", "not json", '"text"', "[1, 2]", "{}x"])
def test_files_that_are_no_data(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match="data.path") as caught:
        make_train(config(path))
    assert len(str(caught.value).splitlines()) <= 3


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        make_train(config(tmp_path / "no.json"))


def test_bad_line_is_skipped(write_rows):
    path = write_rows(good_rows(3), lines=True)
    path.write_text(path.read_text() + "\n{broken\n")
    pipeline = make_train(config(path, max_skip_fraction=0.5))
    assert set(take_index(pipeline, 2)) == {0, 1, 2} and pipeline.skipped == {"malformed": 1}


def test_hold_out_by_image(write_rows):
    rows = [row(i, f"good{i % 10}.png") for i in range(40)]
    rows += [row(40, ["good3.png", "good4.png"])]
    path = write_rows(rows)
    parts = {
        split: llava_json.LlavaSource(path, split=split, test_fraction=0.3)
        for split in ("train", "test")
    }
    assert sum(map(len, parts.values())) == 41 and all(map(len, parts.values()))
    used = {s: {d for i in range(len(p)) for d in p[i].images} for s, p in parts.items()}
    assert not used["train"] & used["test"]
    again = llava_json.LlavaSource(path, split="test", test_fraction=0.3)
    assert [again[i].id for i in range(len(again))] == [
        parts["test"][i].id for i in range(len(again))
    ]


def test_separate_file_for_evaluation(write_rows, tmp_path):
    train = write_rows(good_rows(8))
    other = tmp_path / "eval.json"
    other.write_text(json.dumps([row(0, "good0.png", answer="Else.")]))
    both = config(train, eval_path=str(other))
    assert make_eval(both).answers == [["Else."], [], [], []]
    assert len(make_train(both).source) == 8


def test_tokenizer_is_kept_and_reused(write_rows, tmp_path):
    path = write_rows(good_rows(8))
    first = make_train(config(path), workdir=tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer.json"
    assert kept.is_file()
    again = make_train(config(path, vocab_size=290), workdir=tmp_path / "run")
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    held = make_eval(config(path, test_fraction=0.2), workdir=tmp_path / "run")
    assert held.tokenizer.fingerprint == first.tokenizer.fingerprint
    named = make_train(config(path, tokenizer=str(kept)))
    assert named.fingerprint == first.fingerprint


def test_fingerprint_follows_the_file(write_rows):
    one = make_train(config(write_rows(good_rows(8)))).fingerprint
    other = make_train(config(write_rows(good_rows(9)))).fingerprint
    assert one["content"] != other["content"]
    assert json.loads(json.dumps(one)) == one


def test_tasks_of_rows(write_rows):
    rows = [row(0, "good0.png") | {"task": "ocr"}, row(1, "good1.png")]
    pipeline = make_train(config(write_rows(rows), batch_size=2))
    batch = next(iter(pipeline))
    assert pipeline.tasks == ("conversation", "ocr")
    assert dict(zip(batch["index"].tolist(), batch["task"][:, 0].tolist(), strict=True)) == {
        0: 1,
        1: 0,
    }


def test_limits_come_from_the_config(write_rows):
    path = write_rows(good_rows(4))
    small = config(path, max_pixels=100, max_skip_fraction=0.1)
    with pytest.raises(UserError, match="too_large"):
        next(iter(make_train(small)))
    with pytest.raises(UserError, match="too_large"):
        next(iter(make_train(dataclasses.replace(small, max_pixels=10**6, max_image_bytes=50))))
