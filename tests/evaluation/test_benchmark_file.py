"""Benchmarks from files: layouts that say the same give the same rows; others are told."""

import base64
import csv
import io
import json

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.benchmark_file import check_metric, find_columns, read_benchmark


def png(value, size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(data, "PNG")
    return data.getvalue()


RED, BLUE = png(10), png(200)
QUESTIONS = [
    ("What?", ["cat", "a cat"], RED),
    ("Where, then?", ["here"], RED),
    ("Who?", ["I"], BLUE),
]


def write(folder, kind, rows, name="file"):
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def text(data):
    return base64.b64encode(data).decode()


def layouts(folder):
    """The same three questions in each layout."""
    for number, (_, _, image) in enumerate(QUESTIONS):
        (folder / f"{number}.png").write_bytes(image)
    yield (
        "parquet",
        [
            {
                "question_id": str(k),
                "question": q,
                "answers": a,
                "image": {"bytes": i, "path": None},
            }
            for k, (q, a, i) in enumerate(QUESTIONS)
        ],
    )
    yield (
        "jsonl",
        [
            {"id": k, "query": q, "label": a, "images": [f"{k}.png"]}
            for k, (q, a, _) in enumerate(QUESTIONS)
        ],
    )
    yield (
        "csv",
        [
            {"index": k, "question": q, "answers": json.dumps(a), "image": text(i)}
            for k, (q, a, i) in enumerate(QUESTIONS)
        ],
    )
    yield (
        "tsv",
        [
            {"index": k, "question": q, "answer": repr(a), "image": text(i)}
            for k, (q, a, i) in enumerate(QUESTIONS)
        ],
    )
    yield (
        "json",
        {
            "name": "of the data",
            "data": [
                {
                    "questionId": k,
                    "question": f"<image>\n{q}",
                    "answers": [{"answer": each, "answer_id": 1} for each in a],
                    "image": f"data:image/png;base64,{text(i)}",
                }
                for k, (q, a, i) in enumerate(QUESTIONS)
            ],
        },
    )


def test_layouts_that_say_the_same_give_the_same(tmp_path):
    found = {}
    for kind, rows in layouts(tmp_path):
        read = read_benchmark(write(tmp_path, kind, rows))
        assert not read.skipped and read.total == 3 and len(read.sha256) == 64
        asked = [row.conversation("Be short.") for row in read.rows]
        found[kind] = [
            (row.id, row.references, row.group, row.images, *asked)
            for row, asked in zip(read.rows, asked, strict=True)
        ]
    assert len(found) == 5
    for rows in found.values():
        assert rows == found["parquet"]
    first, second, third = found["parquet"]
    assert first[1] == ("cat", "a cat") and first[4] == "What?\nBe short." and first[5] == [RED]
    assert first[2] == second[2] != third[2]  # Of the same picture, and of another.


def one(folder, row, **options):
    read = read_benchmark(write(folder, "json", [row]), **options)
    assert len(read.rows) == 1
    return read.rows[0]


def test_multiple_choice(tmp_path):
    row = {
        "question": "Which?",
        "image": text(RED),
        "A": "cat",
        "B": "dog",
        "C": None,
        "answer": "B",
    }
    made = one(tmp_path, row)
    assert made.options == ("cat", "dog") and made.references == ("B",)
    assert made.prompt("Letter:") == "Which?\nA. cat\nB. dog\nLetter:"
    for options, answer, right in (
        (["cat", "dog"], 1, "B"),  # ScienceQA counts from 0,
        ("['cat', 'dog']", "B", "B"),  # MMMU writes lists as text,
        ('["3", "1"]', "1", "1"),  # and a number may be an option's words.
    ):
        made = one(tmp_path, {"question": "?", "options": options, "answer": answer})
        assert made.references == (right,) and len(made.options) == 2


def test_pictures_in_the_text(tmp_path):
    row = {"question": "<image 2> or <image 1>?", "answer": "x", "options": "['<image 2>', 'no']"}
    row |= {"image_1": text(RED), "image_2": text(BLUE), "image_3": None}
    messages, images = one(tmp_path, row).conversation("Say.")
    assert images == [BLUE, RED, BLUE]
    parts = messages[0]["content"]
    kinds = [part["type"] for part in parts]
    assert kinds == ["image", "text", "image", "text", "image", "text"]
    assert parts[1]["text"] == "or" and parts[3]["text"] == "?\nA."
    assert parts[5]["text"] == "B. no\nSay."


def test_pictures_that_a_numbered_text_leaves_out_stand_in_front(tmp_path):
    row = {"question": "See <image 2>", "answer": "x", "images": [text(RED), text(BLUE)]}
    (message,), images = one(tmp_path, row).conversation()
    assert images == [RED, BLUE]
    assert [part["type"] for part in message["content"]] == ["image", "text", "image"]


def test_conversations(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    llava = {
        "id": "c",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": "Black."},
        ],
    }
    picture = {"type": "image", "image": "a.png"}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Black."},
    ]
    first, second = one(tmp_path, llava), one(tmp_path, {"id": "c", "messages": messages})
    assert first.references == second.references == ("Black.",)
    assert first.messages == second.messages and first.images == second.images == (RED,)
    assert first.group == second.group
    asked, images = first.conversation("Short.")
    assert [m["role"] for m in asked] == ["user", "assistant", "user"] and images == [RED]
    assert asked[-1]["content"] == "Which colour?\nShort."


def test_questions_about_the_same_pictures(tmp_path):
    texts = [{"user": f"Q{k}?", "assistant": f"A{k}", "source": "s"} for k in range(3)]
    rows = [{"images": [{"bytes": RED, "path": None}], "texts": texts}]
    read = read_benchmark(write(tmp_path, "parquet", rows), limit=2)
    assert [row.id for row in read.rows] == ["0-0", "0-1"] and read.rows[1].references == ("A1",)
    assert len({row.group for row in read.rows}) == 1


def test_masks_points_and_boxes(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 255
    data = io.BytesIO()
    Image.fromarray(mask).save(data, "PNG")
    row = {"question": "Point at it.", "image": text(RED), "mask": text(data.getvalue())}
    made = one(tmp_path, row)
    assert made.references == () and made.masks[0].nonzero() == (1, 2)
    row = {"question": "?", "bbox": [1, 2, 3, 4], "points": [{"x": 1.5, "y": 2}]}
    assert one(tmp_path, row).references == ({"x": 1.5, "y": 2},)
    assert one(tmp_path, row, columns={"references": "bbox"}).references == ((1, 2, 3, 4),)


# ---- rows that cannot be used --------------------------------------------------------------------

GOOD = {"question": "What?", "answer": "x", "image": "a.png"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("no row", "malformed"),
        ({**GOOD, "question": None}, "malformed"),
        ({**GOOD, "question": 5}, "malformed"),
        ({**GOOD, "answer": None}, "no_label"),
        ({**GOOD, "answer": []}, "no_label"),
        ({**GOOD, "image": "b.png"}, "missing"),
        ({**GOOD, "image": "https://example.org/a.png"}, "missing"),
        ({**GOOD, "image": "../a.png"}, "outside"),
        ({**GOOD, "image": "file:///etc/hostname"}, "outside"),
        ({**GOOD, "image": text(RED[:40])}, "corrupt"),
        ({**GOOD, "image": text(b"GIF89a nothing")}, "corrupt"),
        ({**GOOD, "image": 7}, "format"),
        ({**GOOD, "question": "<image> or <image>?"}, "markers"),
        ({**GOOD, "question": "<image 2>?"}, "markers"),
    ],
)
def test_unusable_rows_are_counted(tmp_path, row, reason):
    folder = tmp_path / "inside"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "a.png").write_bytes(RED)
    read = read_benchmark(write(folder, "json", [GOOD, row]))
    assert read.skipped == {reason: 1} and read.total == 2 and len(read.rows) == 1
    with pytest.raises(UserError, match="none of 1 rows") as error:
        read_benchmark(write(folder, "json", [{**GOOD, "image": "b.png"}]))
    assert "missing: b.png" in str(error.value)


def test_a_line_that_is_no_json_is_a_row_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "?", "answer": "x"}\n{"question": \n[1]\n\n')
    assert read_benchmark(path).skipped == {"malformed": 2}


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.xlsx", "x", {}, ["no known kind", ".parquet"]),
        ("a.json", "{", {}, ["not valid JSON"]),
        ("a.json", '{"a": 1}', {}, ["no list of rows"]),
        ("a.parquet", "PAR1", {}, ["no Parquet file"]),
        ("a.json", '[{"q": 1, "answer": 2}]', {}, ["no column of questions", "q, answer"]),
        ("a.json", '[{"q": 1}]', {"columns": {"question": "p"}}, ["'p'", "q"]),
        ("a.json", '[{"q": 1}]', {"columns": {"qestion": "q"}}, ["did you mean 'question'"]),
        ("a.json", '[{"q": 1}]', {"limit": 0}, ["limit: 0"]),
        ("a.json", '[{"q": 1}]', {"image_folder": "/no/such/folder"}, ["/no/such/folder"]),
    ],
)
def test_mistakes(tmp_path, name, content, options, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_benchmark(path, **options)
    told = str(error.value)
    assert all(word in told for word in words) and len(told.splitlines()) <= 3, told


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_benchmark(tmp_path / ("x" * 300 + ".json"))


def test_columns_are_found_by_name():
    assert find_columns(["query", "label", "image"], {}) == {
        **{"question": "query", "references": "label", "image": "image"}
    }
    found = find_columns(["image_2", "image_10", "image_1", "prompt", "answer"], {})
    assert found["image"] == "image_1,image_2,image_10"
    both = ["question", "answer", "messages"]
    assert "messages" not in find_columns(both, {})
    assert "question" not in find_columns(both, {"messages": "messages"})
    assert find_columns(["messages", "images", "prompt"], {}) == {
        **{"image": "images", "messages": "messages"}
    }


def test_a_question_for_all_rows(tmp_path):
    rows = [{"image": text(RED), "captions": ["a cat", "one cat"]}]
    read = read_benchmark(write(tmp_path, "json", rows), question="Describe it.")
    assert read.rows[0].prompt() == "Describe it." and len(read.rows[0].references) == 2


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("points_lmms_eval", ["no column of masks", "masks is found as masks, mask"]),
        ("mme", ["no column of category"]),
        ("yes_no", ["row 'r1'", "one of yes and no"]),
        ("vqa_accuracy", ["row 'r1'", "one reference"]),
        ("multiple_choice", ["row 'r1'", "'red' is no option"]),
    ],
)
def test_a_metric_that_the_columns_cannot_serve(tmp_path, metric, words):
    read = read_benchmark(write(tmp_path, "json", [{"id": "r1", "question": "?", "answer": "red"}]))
    with pytest.raises(UserError) as error:
        check_metric(metric, read)
    told = str(error.value)
    assert all(word in told for word in words) and len(told.splitlines()) <= 3, told
    check_metric("anls", read)
