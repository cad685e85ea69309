"""The same rows in every layout are the same records."""

import base64
import dataclasses
import io
import json
import tarfile

import layout_samples as samples
import numpy as np
import pyarrow as pa
import pytest
from data_samples import image_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_samples import config
from PIL import Image

from efficient_vlm.data import layouts, make_eval, make_train
from efficient_vlm.data.llava_rows import read_row
from efficient_vlm.data.records import REASONS, BadRecord
from efficient_vlm.data.sources import layout_of, open_source
from efficient_vlm.errors import UserError

WRITERS = {
    "messages": (samples.write_messages, "llava_json"),
    "parts": (samples.write_parts, "llava_json"),
    "shards": (samples.write_shards, "parquet"),
    "questions": (samples.write_questions, "parquet"),
    "csv": (samples.write_csv, "csv"),
    "tar": (samples.write_tar, "webdataset"),
}


def reason_of(source, index):
    with pytest.raises(BadRecord) as caught:
        source[index]
    return told(caught.value)


def told(error):
    assert error.reason in REASONS and len(str(error)) < 300
    return error.reason


@pytest.mark.parametrize("name", WRITERS)
def test_equal_records(name, tmp_path):
    """Picture, question, answer, id and place of each row, from "auto"."""
    write, layout = WRITERS[name]
    given = samples.rows(8)
    settings = config(write(tmp_path, given))
    assert layout_of(settings) == layout
    source = open_source(settings, "train")
    assert len(source) == 8 and not source.placed and source.tasks == ("conversation",)
    for index, (i, picture, question, answer) in enumerate(given):
        record = source[index]
        assert (record.id, record.images) == (i, (picture,))
        (conversation,) = record.conversations
        assert conversation.turns == ((question, answer),)
        assert (conversation.places, conversation.system) == ((), "")
    assert list(source.texts()) == [text for _, _, q, a in given for text in (q, a)]
    assert len(source.fingerprint["content"]) == 64


def test_equal_batches_and_other_fingerprints(tmp_path):
    """Arrays of two layouts are equal; the content decides on the fingerprint."""
    given = samples.rows(6)
    paths = [WRITERS[name][0](tmp_path, given) for name in ("shards", "tar")]
    (tmp_path / "t").mkdir()
    tokenizer = None
    batches = []
    for path in paths:
        pipeline = make_train(config(path), workdir=tmp_path / "t")
        assert tokenizer in (None, pipeline.tokenizer.fingerprint)
        tokenizer = pipeline.tokenizer.fingerprint
        batches.append(next(iter(pipeline)))
    for name, array in batches[0].items():
        np.testing.assert_array_equal(array, batches[1][name], err_msg=name)
    before = open_source(config(paths[1]), "train").fingerprint
    samples.write_tar(tmp_path, samples.rows(5))
    assert open_source(config(paths[1]), "train").fingerprint["content"] != before["content"]


def test_the_layout_is_seen_in_the_first_bytes(tmp_path):
    given = samples.rows(2)
    for name, (write, layout) in WRITERS.items():
        if name == "shards":
            continue
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, given)
        bare = path.rename(path.parent / "data")
        if layout == "csv":
            with pytest.raises(UserError, match="data.source=csv"):
                layouts.find(str(bare))
        else:
            assert layouts.find(str(bare)).layout == layout
        assert len(open_source(config(bare, source=layout), "train")) == 2


def test_shards_named_by_their_split(tmp_path):
    """A folder as the hub has it: nothing of the test shards is trained on."""
    for name, numbers in (("train-00000-of-00001", range(4)), ("validation-00000", range(4, 6))):
        given = [samples.rows(6)[i] for i in numbers]
        samples.write_parquet(tmp_path / "data" / f"{name}.parquet", samples.parquet_rows(given))
    settings = config(tmp_path, test_fraction=0.5)
    train, test = (open_source(settings, split) for split in ("train", "test"))
    assert [train[i].id for i in range(len(train))] == ["r0", "r1", "r2", "r3"]
    assert [test[i].id for i in range(len(test))] == ["r4", "r5"]
    only = config(tmp_path / "data" / "train*.parquet", test_fraction=0.5)
    assert len(open_source(only, "train")) == len(open_source(only, "test")) == 2


@pytest.mark.parametrize("name", ["messages", "shards", "tar"])
def test_splits_share_no_picture(name, tmp_path):
    """Pictures that lie in the rows are compared by their bytes."""
    given = [(f"r{i}", image_bytes(i % 5), f"Q {i}", "A") for i in range(20)]
    settings = config(WRITERS[name][0](tmp_path, given), test_fraction=0.4)
    parts = [open_source(settings, split) for split in ("train", "test")]
    used = [{p[i].images[0] for i in range(len(p))} for p in parts]
    assert [len(part) for part in parts] == [12, 8] and not used[0] & used[1]


def test_system_prompt_is_kept_apart(tmp_path):
    """And the arrays are those of the same words in the first question."""
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    turns = samples.messages("<image> What?", "Noise.")
    rows = [
        {"image": "a.png", "messages": [{"role": "system", "content": "Be brief."}, *turns]},
        {"image": "a.png", "system": "Be brief.", "messages": turns},
        {"image": "a.png", "messages": samples.messages("Be brief.\n<image>What?", "Noise.")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = open_source(config(tmp_path / "rows.json"), "train")
    assert [source[i].conversations[0].system for i in range(3)] == ["Be brief.", "Be brief.", ""]
    assert source[0].conversations[0].turns == (("What?", "Noise."),)
    data = make_eval(config(tmp_path / "rows.json", batch_size=3), "train")
    for name in ("tokens", "image_places", "prompt_lengths", "loss_mask"):
        first, *others = data.batches[0][name]
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=name)
    assert data.prompts == [["Be brief.\nWhat?"]] * 3


PARTS = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " it?"}]
PNG = image_bytes(0)
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


@pytest.mark.parametrize(
    ("row", "pictures", "places"),
    [
        ({"images": ["a"], "messages": samples.messages(PARTS, "A")}, ["a"], ((0, 3),)),
        # Tables write the absent keys of a part as nulls.
        (
            {
                "images": [{"bytes": PNG, "path": "a.png"}],
                "messages": samples.messages(
                    [{"type": "image", "text": None}, {"type": "text", "text": "What?"}], "A"
                ),
            },
            [PNG],
            (),
        ),
        (
            {
                "messages": samples.messages(
                    [
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{BASE64}"},
                        },
                        {"type": "text", "text": "What?"},
                    ],
                    "A",
                )
            },
            [DATA_URL],
            (),
        ),
        ({"image": {"bytes": BASE64, "path": None}, "question": "Q", "answer": 5}, [BASE64], ()),
        ({"images": [], "texts": [{"user": "Q", "assistant": "A"}]}, [], ()),
    ],
)
def test_rows_of_messages(row, pictures, places):
    found = read_row(row)
    assert (list(found.pictures), found.places) == (pictures, places)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a"], "messages": samples.messages([*PARTS, *PARTS], "A")}, "markers"),
        ({"messages": samples.messages(PARTS, "A")}, "markers"),
        ({"messages": samples.messages([{"type": "video", "video": "a"}], "A")}, "media"),
        ({"messages": samples.messages([{"type": "input_audio"}], "A")}, "media"),
        ({"images": ["a"], "messages": samples.messages("Q", [{"type": "image"}])}, "media"),
        ({"messages": samples.messages([{"type": "table"}], "A")}, "malformed"),
        ({"messages": samples.messages([{"type": "text", "text": 3}], "A")}, "malformed"),
        ({"messages": samples.messages([{"type": "image", "image": 3}], "A")}, "malformed"),
        ({"texts": [{"user": "Q"}]}, "malformed"),
        ({"texts": ["Q"]}, "malformed"),
        ({"texts": [{"user": "Q", "assistant": None}]}, "no_label"),
        ({"question": "Q", "answers": []}, "no_label"),
        ({"question": "Q", "answers": [{"a": 1}]}, "no_label"),
        ({"question": "Q", "answers": [["A"]]}, "malformed"),
        ({"question": "Q", "answer": True}, "malformed"),
        ({"question": "Q", "choices": ["x", "y"], "answer": "A"}, "malformed"),
        ({"image": {"bytes": "no picture"}, "question": "Q", "answer": "A"}, "malformed"),
    ],
)
def test_rows_of_messages_that_are_refused(row, reason):
    with pytest.raises(BadRecord) as caught:
        read_row(row)
    assert caught.value.reason == reason


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS | st.sampled_from(["<image>", "a.png", BASE64]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "image", "bytes", "path", "user", "assistant", "answer"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON}
)
PAIR = st.fixed_dictionaries({"user": JSON, "assistant": JSON})
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(TURN, max_size=4) | JSON,
        "texts": st.lists(PAIR, max_size=3) | JSON,
        "question": JSON,
        "answer": JSON,
        "answers": JSON,
        "images": JSON,
        "system": JSON,
    },
)


@settings(max_examples=400, deadline=None)
@given(row=ROWS)
def test_any_row_is_taken_or_refused_with_a_reason(row):
    """What is taken is text and pictures, and as many places as pictures, or none."""
    try:
        found = read_row(row)
    except BadRecord as error:
        told(error)
        return
    assert all(isinstance(text, str) for turn in found.turns for text in turn)
    assert all(isinstance(picture, str | bytes) for picture in found.pictures)
    assert len(found.places) in (0, len(found.pictures)) and isinstance(found.system, str)
    for turn, at in found.places:
        assert 0 <= at <= len(found.turns[turn][0])


def test_answers_of_several_people():
    """The most frequent is learnt, all are kept: metrics compare with each."""
    given = ["no", {"answer": "yes", "answer_id": 2}, "yes", "no", 2]
    found = read_row({"question": "Q", "answers": given})
    assert found.turns == (("Q", "no"),) and found.answers == ("no", "yes", "yes", "no", "2")
    named = read_row({"question": "Q", "answer": "maybe", "answers": ["no", "no"]})
    assert named.turns == (("Q", "maybe"),) and named.answers == ("no", "no")


def test_pairs_of_texts_are_turns_or_stand_alone(tmp_path):
    row = samples.parquet_rows(samples.rows(1))[0]
    row["texts"] = [{"user": f"Q{i}", "assistant": f"A{i}", "source": "s"} for i in range(3)]
    path = samples.write_parquet(tmp_path / "a.parquet", [row])
    turns = tuple((f"Q{i}", f"A{i}") for i in range(3))
    (whole,) = open_source(config(path), "train")[0].conversations
    assert whole.turns == turns
    alone = open_source(config(path, separate_turns=True), "train")
    assert tuple(c.turns for c in alone[0].conversations) == tuple((turn,) for turn in turns)
    batch = next(iter(make_train(config(path, separate_turns=True, questions_per_image=3))))
    assert batch["tokens"].shape[:2] == (4, 3) and (batch["lengths"] > 0).all()


HOSTILE = [
    ({"image": "nowhere.png"}, "missing"),
    ({"image": "../good0.png"}, "outside"),
    ({"image": "data:image/png;base64,AAAA"}, "format"),
    ({"question": "<image> or <image>?"}, "markers"),
    ({"question": "<video> what?"}, "media"),
    ({"answer": ""}, "no_label"),
]


def test_hostile_cells_are_counted(tmp_path):
    """CSV: what a row holds is judged as in JSON; a row with other fields is malformed."""
    good = {"image": "good0.png", "question": "What?", "answer": "Noise."}
    (tmp_path / "good0.png").write_bytes(image_bytes(0))
    listed = [good, *(good | bad for bad, _ in HOSTILE)]
    lines = ["image;question;answer"]
    lines += [";".join(f'"{value}"' for value in row.values()) for row in listed]
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "a;b", "a;b;c;d"]))
    source = open_source(config(tmp_path / "rows.csv"), "train")
    assert source[0].images == (image_bytes(0),)
    found = {i: reason for i, (_, reason) in enumerate(HOSTILE, 1) if reason != "format"}
    found |= {7: "malformed", 8: "malformed"}
    assert {i: reason_of(source, i) for i in found} == found
    data = make_eval(config(tmp_path / "rows.csv", max_skip_fraction=1.0), "train")
    assert data.skipped == dict.fromkeys((r for _, r in HOSTILE), 1) | {"malformed": 2}


def test_text_tables(tmp_path):
    """Quotes, line breaks, a byte order mark, UTF-16, tabs, an empty picture, base64 in a cell."""
    text = f'image,caption,note\r\n{BASE64},"two\nlines, ""quoted""",x\r\n\r\n,text only,\r\n'
    for name, encoding in (("a.csv", "utf-8"), ("b.csv", "utf-16")):
        (tmp_path / name).write_bytes(
            text.removeprefix("\ufeff" * (name == "b.csv")).encode(encoding)
        )
        source = open_source(config(tmp_path / name, template="Describe it."), "train")
        assert len(source) == 2
        assert source[0].images == (PNG,)
        assert source[0].conversations[0].turns == (("Describe it.", 'two\nlines, "quoted"'),)
        assert source[1].images == () and source[1].id == "1"
    (tmp_path / "c.tsv").write_text("pic\tq\ta\n\tWhat, then?\tNothing.\n")
    columns = "image=pic,question=q,answer=a"
    source = open_source(config(tmp_path / "c.tsv", columns=columns), "train")
    assert source[0].conversations[0].turns == (("What, then?", "Nothing."),)


def test_a_template_spells_out_choices(tmp_path):
    lines = ["question,A,B,answer", "Which {one}?,red,blue,B"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="holds choices") as caught:
        open_source(config(tmp_path / "rows.csv"), "train")
    assert len(str(caught.value).splitlines()) <= 3
    template = "{question}\nA. {A}\nB. {B} {{letter}}"
    source = open_source(config(tmp_path / "rows.csv", template=template), "train")
    assert source[0].conversations[0].turns == (
        ("Which {one}?\nA. red\nB. blue {letter}", "B"),
    )  # fmt: skip


def test_turns_and_pictures_inside_other_columns(tmp_path):
    """Under any name, in either form, in a column of a column."""
    turns = {"pairs": [{"user": "Q", "assistant": "A"}], "said": samples.messages("Q", "A")}
    listed = [{"talk": turns, "shown": {"left": {"bytes": PNG, "path": None}}, "video": "a.mp4"}]
    path = samples.write_parquet(tmp_path / "a.parquet", listed)
    for name in turns:
        columns = {"messages": f"talk/{name}", "image": "shown/left"}
        record = open_source(config(path, columns=columns), "train")[0]
        assert record.images == (PNG,) and record.conversations[0].turns == (("Q", "A"),)
    # What nobody named is looked at as well.
    listed = [{"image": PNG, "question": "Q", "answer": "A", "video": "a.mp4"}]
    path = samples.write_parquet(tmp_path / "b.parquet", listed)
    assert reason_of(open_source(config(path), "train"), 0) == "media"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": {"image": "pic"}}, "data.columns.image"),
        ({"columns": {"picture": "image"}}, "data.columns"),
        ({"columns": {"question": "question"}}, "no answer"),
        ({"columns": {"answer": "answer"}}, "no question"),
        ({"columns": "image"}, "wrong type"),
        ({"columns": {"image": 3}}, "wrong type"),
        ({"template": "{quest}"}, "data.template"),
        ({"template": "{"}, "data.template"),
        ({"held_out": ["none such"]}, "data.held_out"),
        ({"images": "/nowhere"}, "data.images"),
    ],
)
def test_columns_that_are_not_there(changes, words, tmp_path):
    path = samples.write_csv(tmp_path, samples.rows(2))
    with pytest.raises(UserError, match=words) as caught:
        open_source(config(path, **changes), "train")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"image,answer\n", "no rows"),
        ("a.csv", b"a,a\n1,2\n", "each another"),
        ("a.csv", b'a,b\n"1,2\n', "not valid CSV"),
        ("a.csv", b"a,b\n\xff,2\n", "not UTF-8"),
        ("a.parquet", b"", "Parquet"),
        ("a.parquet", b"PAR1xxxxPAR1", "Parquet"),
        ("a.tar", b"", "tar file"),
        ("a.tar", b"\x1f\x8b" + b"x" * 600, "gunzip"),
        ("a.tar", b"\0" * 10240, "no samples"),
        ("a", b"some words", "cannot be told"),
    ],
)
def test_files_that_are_no_data(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        open_source(config(tmp_path / name), "train")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["no.csv", "no.parquet", "no.tar", "no.jsonl", "no/*.tar", "No"])
def test_files_that_are_not_there(name, tmp_path):
    with pytest.raises(UserError, match="data.path") as caught:
        open_source(config(tmp_path / name), "train")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_folder_of_several_layouts(tmp_path):
    samples.write_csv(tmp_path, samples.rows(1))
    samples.write_tar(tmp_path, samples.rows(1))
    with pytest.raises(UserError, match="several layouts"):
        open_source(config(tmp_path), "train")
    assert len(open_source(config(tmp_path, source="webdataset"), "train")) == 1


def test_tar_members_that_leave_the_archive(tmp_path):
    """Links and such names are refused with the rows that they belong to; others are read."""
    with tarfile.open(tmp_path / "rows.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        long = "folder/" * 30 + "good"  # Needs a header of its own.
        for key in ("good", "../up", "/etc/abs", "a/../../b", long):
            samples.add(tar, f"{key}.png", PNG)
            samples.add(tar, f"{key}.txt", b" A picture. ")
        link = dict(type=tarfile.SYMTYPE, linkname="/etc/passwd")
        samples.add(tar, "linked.txt", b"", **link)
        samples.add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="good.png")
        samples.add(tar, "hard.txt", b"A")
        samples.add(tar, "clip.mp4", b"x")
        samples.add(tar, "clip.txt", b"A")
        samples.add(tar, "list.json", b"[1]")
        samples.add(tar, "bad.png", PNG[:-60])
        samples.add(tar, "bad.txt", b"A")
        samples.add(tar, "none.npy", b"A")
    settings = config(tmp_path / "rows.tar", template="What?", max_skip_fraction=1.0)
    source = open_source(settings, "train")
    assert source[0].images == source[4].images == (PNG,)
    assert source[4].id == long
    assert source[0].conversations[0].turns == (("What?", "A picture."),)
    reasons = [reason_of(source, i) for i in (1, 2, 3, 5, 6, 7, 8, 10)]
    assert reasons == [*["outside"] * 5, "media", "malformed", "no_label"]
    data = make_eval(settings, "train")
    assert data.skipped == {
        "corrupt": 1, "malformed": 1, "media": 1, "no_label": 1, "outside": 5
    }  # fmt: skip
    whole = (tmp_path / "rows.tar").read_bytes()
    (tmp_path / "rows.tar").write_bytes(whole[: len(PNG) // 2 + 512])
    with pytest.raises(UserError, match="tar file"):
        open_source(settings, "train")


def test_parquet_keeps_to_its_memory(tmp_path):
    """Row groups of 1 MB, a cache of two: no more than two stay, and every row is right."""
    from efficient_vlm.data.tables.parquet import ParquetTable

    noise = np.random.default_rng(0).bytes
    listed = [{"image": noise(100_000), "question": f"Q{i}", "answer": "A"} for i in range(100)]
    path = samples.write_parquet(tmp_path / "a.parquet", listed, group=10)
    table = ParquetTable([path], cache_bytes=2_100_000)
    base, peak = pa.total_allocated_bytes(), 0
    for index in np.random.default_rng(1).permutation(100):
        assert table.row(int(index)) == listed[index]
        peak = max(peak, pa.total_allocated_bytes() - base)
    assert 1_000_000 < peak < 2.5e6 + 1_000_000  # Two groups, one just read, and its page.
    for row in table.scan(False, ["question"]):
        assert set(row) == {"question"}


def test_parquet_classes_of_the_hub(tmp_path):
    """Numbers of classes become the names that `datasets` wrote beside them."""
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    listed = [{"image": {"bytes": PNG, "path": None}, "label": i} for i in (0, 1, 2, None)]
    table = pa.Table.from_pylist(listed)
    info = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": info})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(config(tmp_path / "a.parquet", template="Which animal?"), "train")
    assert [source[i].conversations[0].answer for i in (0, 1)] == ["cat", "dog"]
    assert [reason_of(source, i) for i in (2, 3)] == ["malformed", "no_label"]


def test_base64_without_a_slash(tmp_path):
    """What is longer than the names of files may be, and what is longer than paths."""
    for side in (12, 60):
        plain = io.BytesIO()
        Image.new("RGB", (side, side)).save(plain, "BMP")
        text = base64.b64encode(plain.getvalue()).decode()
        assert "/" not in text[:300]
        (tmp_path / "a.csv").write_text(f"image,question,answer\n{text},Q,A\n")
        assert open_source(config(tmp_path / "a.csv"), "train")[0].images == (plain.getvalue(),)


def test_a_template_beside_turns(tmp_path):
    path = samples.write_messages(tmp_path, samples.rows(1))
    with pytest.raises(UserError, match="data.template") as caught:
        open_source(config(path, template="What?"), "train")
    assert len(str(caught.value).splitlines()) <= 3


def test_shards_with_other_columns(tmp_path):
    samples.write_parquet(tmp_path / "a.parquet", [{"question": "Q", "answer": "A"}])
    samples.write_parquet(tmp_path / "b.parquet", [{"question": "Q", "other": "A"}])
    with pytest.raises(UserError, match="has the columns") as caught:
        open_source(config(tmp_path), "train")
    assert len(str(caught.value).splitlines()) == 3


def test_a_damaged_row_group_is_counted(tmp_path):
    path = samples.write_parquet(tmp_path / "a.parquet", samples.parquet_rows(samples.rows(6)))
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(bytes(data))
    source = open_source(config(path), "train")
    assert [reason_of(source, i) for i in range(3)] == ["corrupt"] * 3
    assert source[3].id == "r3"


def test_fields_are_checked_before_anything_is_read():
    with pytest.raises(UserError, match="data.path: empty"):
        config()
    assert config("a.csv", columns="image=a, answer=b").columns == {"image": "a", "answer": "b"}
    made = config("a.csv", columns={"image": "a"}, held_out="cat,dog")
    assert made.held_out == ("cat", "dog") and hash(made) == hash(dataclasses.replace(made))
    assert type(made).from_mapping(json.loads(json.dumps(dataclasses.asdict(made)))) == made
