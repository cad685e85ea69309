"""A row of a LLaVA file is taken whole, or refused with its reason."""

import base64
import json
import math

import pytest
from data_samples import image_bytes

from efficient_vlm.data import DataConfig, llava_json, make_train
from efficient_vlm.data.llava_rows import read_row
from efficient_vlm.data.records import REASONS, BadRecord, Conversation
from efficient_vlm.errors import UserError


def row(question="What?", answer="Noise.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **fields}


def said(*turns, **fields):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **fields}


NAN = math.nan
TAKEN = [
    # Pictures under either key, unused fields as tables write them.
    (row("<image>\nWhat?", image="a"), ["a"], "What?", ()),
    (row("<image><image> What?", images=["a", "b"]), ["a", "b"], "What?", ()),
    (row("<image><image>\nWhat?", image=None, images=["a", "b"]), ["a", "b"], "What?", ()),
    (row("<image>\nWhat?", image=NAN, images="a", video=NAN, audio=None), ["a"], "What?", ()),
    (row("<image> What?", image="a", images=["a"], videos=[]), ["a"], "What?", ()),
    (row("<image> What?", images=["a", None]), ["a"], "What?", ()),
    (row("<image> What?", image={"bytes": None, "path": "a"}, image_name="x"), ["a"], "What?", ()),
    # Without any marker rows stay as they are.
    (row(image="a"), ["a"], "What?", ()),
    (row(images=["a", "b"]), ["a", "b"], "What?", ()),
    (row(image=""), [], "What?", ()),
    (row(images=[], image=NAN, image_id="7", video_id="8"), [], "What?", ()),
    (row("<image> What?", image="c/a.jpg", file_name="a.jpg", coco_url="http://x/y.jpg"),
     ["c/a.jpg"], "What?", ()),
    (row("<image> What?", image="a", images=[{"path": "a", "bytes": None}, None]), ["a"], "What?",
     ()),
    (row(image={"path": None, "bytes": NAN}, audio={"path": None}, videos=[None]), [], "What?", ()),
    (row("<|im_end|> What?"), [], "<|im_end|> What?", ()),  # Of a chat, not of a picture.
    (row("What do <img src='a'> and a < b do?"), [], "What do <img src='a'> and a < b do?", ()),
    # A marker stands where it stands.
    (row("Is <image> darker than <image>?", images=["a", "b"]), ["a", "b"],
     "Is  darker than ?", ((0, 3), (0, 16))),
    (row("What? <image> ", image="a"), ["a"], "What?", ((0, 5),)),
    (row("<image> or\n<image>\n", image=["a", "b"]), ["a", "b"], "or", ((0, 0), (0, 2))),
    # System text comes first, under a key or as a turn.
    (row("<image> What?", image="a", system="Be brief."), ["a"], "Be brief.\nWhat?", ((0, 10),)),
    (row(system=NAN), [], "What?", ()),
    (row(system_prompt="Be brief.", system=None), [], "Be brief.\nWhat?", ()),
    (said(("system", "Be brief."), ("Human", "What?"), ("assistant", "A")), [],
     "Be brief.\nWhat?", ()),
    (said(("system", ""), ("human", "<image>"), ("user", "What?"), ("gpt", "A"), image="a"), ["a"],
     "What?", ()),
]  # fmt: skip


@pytest.mark.parametrize(("given", "pictures", "question", "places"), TAKEN)
def test_rows_that_are_taken(given, pictures, question, places):
    found = read_row(json.loads(json.dumps(given)))  # NaN is what json writes of a NaN.
    flat = Conversation(found.turns, places=found.places, system=found.system).flat()
    assert (list(found.pictures), flat.places) == (pictures, places)
    assert flat.turns[0][0] == question
    assert found.system == ("Be brief." if question.startswith("Be brief.") else "")


@pytest.mark.parametrize(
    "answer",
    ["![fig 3](<image>) follows", "<image>", "  indented <video>\n", "<im<image>age>", "<|image|>"],
)
def test_answers_stay_as_they_are(answer):
    for given in (row(answer=answer), row("<image> What?", answer, image="a")):
        assert read_row(given).turns == (("What?", answer),)


def test_turns_with_keys_of_either_kind():
    turns = [{"role": "user", "content": "Q", "from": None, "value": None}]
    turns += [
        {"from": "gpt", "value": "A", "role": NAN, "weight": 1},
        {"from": "human", "value": "R"},
    ]
    assert read_row({"conversations": turns}).turns == (("Q", "A"),)
    second = said(("human", "Q"), ("gpt", "A"), ("human", "<image>R"), ("gpt", "B"), image="a")
    assert read_row(second).places == ((1, 0),)


QUESTION, ANSWER = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
PICTURES = (
    "< image >", "<image/>", "<image>1</image>", "<img>", "[IMG]", "<images>", "<vila/image>",
    "\uff1cimage\uff1e", "<image\u200b>", "&lt;image&gt;", "<image-placeholder>",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row("<image> What?"), "markers"),
        (row("<image> What?", image=None), "markers"),
        (row("<image> What?", image=NAN, images=[None]), "markers"),
        (row("Is <image> darker than <image>?", image="a"), "markers"),
        (row("<image> What?", images=["a", "b"]), "markers"),
        (row("<Image> What?", image="a"), "markers"),
        (row("<image_1> and <image_2>", images=["a", "b"]), "markers"),
        (row("<|vision_start|><|image_pad|><|vision_end|>What?", image="a"), "markers"),
        *((row(f"{mark} What?", image="a"), "markers") for mark in PICTURES),
        *((row(f"{mark} What?"), "media") for mark in ("<video/>", "&lt;video&gt;", "<frames>",
          "<video\u200b>", "<vila/video>", "[audio]", "<|audio_bos|>", "<point_cloud>")),
        (row("Draw it.", "<image>", image="a"), "markers"),
        (said(("human", "Q"), ("gpt", "A"), ("human", "<image>?"), image="a"), "markers"),
        (row(system="<image>"), "markers"),
        (row(video="a.mp4"), "media"),
        (row("<image> What?", image="a", audios=["a.wav"]), "media"),
        (row("<video>\nWhat?"), "media"),
        (row("<AUDIO> and <image>", image="a"), "media"),
        (row(image_path="a"), "media"),
        (row(videoPath="a"), "media"),
        (row(clip="a.mp4", image="a"), "media"),
        (row(file_name="a.png"), "media"),
        (row(imagePath="a"), "media"),
        (row(image_2="b", image="a"), "media"),
        (row(depth=[{"path": "b.png"}], image="a.png"), "media"),
        ({"conversations": [{"from": "human", "value": "Q", "image": "a"}, ANSWER]}, "media"),
        ({"conversations": [{"from": "human", "value": "Q", "video": "a"}, ANSWER]}, "media"),
        ({"conversations": [QUESTION, {**ANSWER, "weight": 0}]}, "malformed"),
        ({"conversations": [QUESTION, {**ANSWER, "train": False}]}, "malformed"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "malformed"),
        ({"conversations": [QUESTION, ANSWER], "messages": [QUESTION, ANSWER] * 2}, "malformed"),
        (row(answer=5), "malformed"),
        (row(system="A", system_prompt="B"), "malformed"),
        (row(images=["a", None]), "malformed"),
        (row(images=[["a"], ["b"]]), "malformed"),
        (row(image=3), "malformed"),
        (row(image="a", images=["b"]), "malformed"),
        (row(image={"bytes": "x", "path": "a"}), "malformed"),
        (row(system=3), "malformed"),
        ({"image": "a"}, "malformed"),
        ({"conversations": []}, "malformed"),
        ({"conversations": NAN}, "malformed"),
        (said(("robot", "Q"), ("gpt", "A")), "malformed"),
        (said((None, "Q"), ("gpt", "A")), "malformed"),
        (said(("human", None), ("gpt", "A")), "malformed"),
        (said(("human", NAN), ("gpt", "A")), "malformed"),
        (said(("human", ["Q"]), ("gpt", "A")), "malformed"),
        ({"conversations": [{"from": "human", "role": "gpt", "value": "Q"}]}, "malformed"),
        (row(answer=""), "no_label"),
        (row(answer=None), "no_label"),
        (said(("human", "Q"), ("gpt", " "), ("human", "R"), ("gpt", "A")), "no_label"),
        (said(("human", "Q")), "no_label"),
        (None, "malformed"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(given, reason):
    with pytest.raises(BadRecord) as caught:
        read_row(json.loads(json.dumps(given)))
    assert caught.value.reason == reason and reason in REASONS
    assert len(caught.value.detail) < 200


def test_placeholders_are_found_in_linear_time():
    for text in ("<image" + "1" * 10**5, "<" * 10**5, "< " * 10**5, "<image" + "_1" * 10**5):
        assert read_row(row(text)).turns[0][0] == text.strip()


def test_rows_in_utf_16_and_one_picture_in_two_spellings(tmp_path):
    """PowerShell writes UTF-16; and a split must not share a picture, however it is spelt."""
    rows = [row(image=f"{dots}{name}.png") for name in "abcdefgh" for dots in ("", "./", "x/../")]
    (tmp_path / "rows.jsonl").write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-16")
    parts = [
        llava_json.LlavaSource(tmp_path / "rows.jsonl", split=split, test_fraction=0.3)
        for split in ("train", "test")
    ]
    assert sum(map(len, parts)) == 24 and all(len(part) % 3 == 0 for part in parts)


def settings(path, **changes):
    fields = dict(batch_size=1, image_size=8, max_length=32, vocab_size=300, test_fraction=0.0)
    fields |= dict(num_threads=0, max_images=2, max_skip_fraction=1.0)
    return DataConfig(source="llava_json", path=str(path), **(fields | changes))


def test_pictures_in_a_folder_of_their_own(tmp_path):
    """Links count as what is in the folder; paths that leave it are refused; addresses too."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "outside.png").write_bytes(image_bytes(1))
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "outside.png")
    inline = "data:image/png;base64," + base64.b64encode(image_bytes(2)).decode()
    names = ["a.png", "x/../a.png", "link.png", str(tmp_path / "photos" / "a.png"), inline]
    bad = ["http://127.0.0.1/a.png", str(tmp_path / "outside.png"), "../outside.png", "b.png"]
    path = tmp_path / "rows" / "rows.json"
    path.write_text(json.dumps([row(image=name) for name in [*names, *bad]]))
    source = llava_json.LlavaSource(path, pictures=tmp_path / "photos")
    found = [source[i].images[0] for i in range(len(names))]
    assert found == [image_bytes(i) for i in (0, 0, 1, 0, 2)]
    pipeline = make_train(settings(path, images=str(tmp_path / "photos")))
    batches = iter(pipeline)
    for _ in range(9):
        next(batches)
    assert pipeline.skipped == {"outside": 2, "missing": 2}
    # The error says what to do: with that, the same rows are read. One bad row, as the order of the
    # data decides which is met first.
    path.write_text(json.dumps([row(image=name) for name in [*names, bad[1]]]))
    strict = settings(path, images=str(tmp_path / "photos"), max_skip_fraction=0.0, batch_size=6)
    with pytest.raises(UserError, match="set data.images to a folder that holds all") as caught:
        next(iter(make_train(strict)))
    assert len(str(caught.value).splitlines()) <= 3
    assert llava_json.LlavaSource(path, pictures=tmp_path)[5].images == (image_bytes(1),)
    with pytest.raises(UserError, match=r"data\.images: no folder"):
        make_train(settings(path, images=str(tmp_path / "none")))


def test_what_was_skipped_stays_counted(tmp_path):
    """A run that goes on carries the counts in its checkpoint; nothing is counted twice."""
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    rows = [row(image="a.png"), row("<image>?"), row(video="v"), row(image="b.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    first = make_train(settings(tmp_path / "rows.json"))
    batches = iter(first)
    for _ in range(4):
        next(batches)
    assert first.skipped == {"markers": 1, "media": 1, "missing": 1}
    again = make_train(settings(tmp_path / "rows.json"))
    again.skips.load(json.loads(json.dumps(first.skips.state())))
    batches = iter(again)
    for _ in range(4):
        next(batches)
    assert again.skipped == first.skipped
    names = dict(enumerate(sorted(REASONS), 1))
    assert [names.get(code) for code in again.skips.codes()] == [
        None, "markers", "media", "missing"
    ]  # fmt: skip


def test_places_count_tokens(tmp_path):
    """A picture stands behind as many tokens as the text in front of it has."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image_bytes(0))
    rows = [row("Is <image> like <image>?", images=["a.png", "b.png"]), row(image="a.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pipeline = make_train(settings(tmp_path / "rows.json"))
    encode, batches = pipeline.tokenizer.encode, iter(pipeline)
    by_index = {int(b["index"][0]): b for b in (next(batches), next(batches))}
    first = len(encode("Is "))
    places = [first, first + len(encode(" like "))]
    assert by_index[0]["image_places"][0].tolist() == [places]
    asked = by_index[0]["tokens"][0, 0, : by_index[0]["prompt_lengths"][0, 0]].tolist()
    assert asked == [*encode("Is "), *encode(" like "), *encode("?\n")]
    assert by_index[1]["image_places"][0].tolist() == [[0, 0]]
    with pytest.raises(UserError, match="questions_per_image=1"):
        make_train(settings(tmp_path / "rows.json", questions_per_image=2))
