"""Rows of preferences in the layouts that people have, and what is refused of them."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.preference_rows import PairSource, pair_of
from efficient_vlm.data.row_source import Reading
from efficient_vlm.data.sources import open_source
from efficient_vlm.data.tables.memory import MemoryTable
from efficient_vlm.errors import UserError
from efficient_vlm.processing.decode_image import BadRecord


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


QUESTION, GOOD, BAD = "<image>\nWhat shape is this?", "A circle.", "A square."
LAYOUTS = {
    "texts": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "turns": {"prompt": [user(QUESTION)], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "whole": {"chosen": [user(QUESTION), said(GOOD)], "rejected": [user(QUESTION), said(BAD)]},
    "text and whole": {
        "prompt": QUESTION,
        "messages": [user(QUESTION), said(GOOD)],
        "chosen": [user(QUESTION), said(GOOD)],
        "rejected": [user(QUESTION), said(BAD)],
    },
    "prompt twice": {
        "prompt": [user(QUESTION)],
        "chosen": [user(QUESTION), said(GOOD)],
        "rejected": [user(QUESTION), said(BAD)],
    },
    "llama_factory": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "question": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "parts": {
        "prompt": [user([{"type": "image"}, {"type": "text", "text": "What shape is this?"}])],
        "chosen": [said([{"type": "text", "text": GOOD}])],
        "rejected": [said([{"type": "text", "text": BAD}])],
    },
}


@pytest.fixture
def folder(tmp_path, request):
    shutil.copy(request.config.rootpath / "tests/samples/llava/00.jpg", tmp_path / "00.jpg")
    return tmp_path


def source_of(folder, rows, split="train", **fields):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="auto", path=str(path), pairs=True, test_fraction=0.0, **fields)
    return open_source(config, split)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, layout):
    source = source_of(folder, [{"images": ["00.jpg"], **LAYOUTS[layout]}])
    record = source[0]
    assert [c.turns for c in record.conversations] == [
        (("What shape is this?", GOOD),),
        (("What shape is this?", BAD),),
    ]
    assert len(record.images) == 1
    (wanted,) = source_of(folder, [{"images": ["00.jpg"], **LAYOUTS[layout]}], "test")[
        0
    ].conversations
    assert wanted == record.conversations[0]


def test_several_turns():
    turns = [user("a"), said("b"), user("c")]
    row = {"prompt": turns, "chosen": "d", "rejected": "e", "system": "s"}
    first, second = PairSource(MemoryTable([row]), Reading())[0].conversations
    assert first.turns == (("a", "b"), ("c", "d")) and second.turns == (("a", "b"), ("c", "e"))
    assert first.system == second.system == "s"


def test_parquet(folder):
    """As `datasets` writes pictures and turns: structures whose missing fields are null."""
    data = (folder / "00.jpg").read_bytes()
    row = {"images": [{"bytes": data, "path": "00.jpg"}], **LAYOUTS["parts"]}
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "pairs.parquet")
    config = DataConfig(
        source="auto", path=str(folder / "pairs.parquet"), pairs=True, test_fraction=0.0
    )
    record = open_source(config, "train")[2]
    assert record.images == (data,) and [c.answer for c in record.conversations] == [GOOD, BAD]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no_pair"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "no_pair"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no_pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no_pair"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "no_label"),
        ({"prompt": "a", "chosen": "b", "rejected": [user("a"), said("c")]}, "no_pair"),
        ({"chosen": [user("a"), said("b")], "rejected": [user("x"), said("c")]}, "no_pair"),
        ({"chosen": "b", "rejected": "c"}, "malformed"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "malformed"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "malformed"),
        ({"prompt": "<image> a", "chosen": "b", "rejected": "c"}, "markers"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "video": "x.mp4"}, "media"),
        ([], "malformed"),
    ],
)
def test_what_is_refused(row, reason):
    with pytest.raises(BadRecord) as found:
        PairSource(MemoryTable([row]), Reading())[0]
    assert found.value.reason == reason


def test_a_row_is_not_changed():
    row = {"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("c")]}
    before = json.dumps(row)
    pair_of(row)
    assert json.dumps(row) == before


def test_settings_that_pairs_do_not_have(folder):
    rows = [{"images": ["00.jpg"], **LAYOUTS["texts"]}]
    for fields in ({"template": "Why?"}, {"separate_turns": True}, {"held_out": ("a",)}):
        with pytest.raises(UserError, match="with data.pairs"):
            source_of(folder, rows, **fields)
    with pytest.raises(UserError, match="token_bench has no rejected answers"):
        open_source(DataConfig(pairs=True), "train")
