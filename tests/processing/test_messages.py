"""Messages in the forms in which clients and tables write them."""

import math

import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.processing.messages import pictures_in_order, read_messages, without_nulls

IMAGE, HI = {"type": "image"}, {"type": "text", "text": "Hi"}


@pytest.mark.parametrize(
    ("content", "read", "pictures"),
    [
        ("Hi", "Hi", []),
        ([HI, "and", IMAGE], [HI, {"type": "text", "text": "and"}, IMAGE], [None]),
        ([{"type": "image", "image": "a.png"}], [IMAGE], ["a.png"]),
        (
            [{"type": "image", "url": "a.png"}, {"type": "image", "path": b"x"}],
            None,
            ["a.png", b"x"],
        ),
        (
            [{"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}}],
            [IMAGE],
            ["data:,x"],
        ),
        ([{"type": "image_url", "image_url": "a.png"}], [IMAGE], ["a.png"]),
        ([{"type": "input_image", "image_url": "a.png", "detail": "auto"}], [IMAGE], ["a.png"]),
        ([{"type": "input_text", "text": "Hi"}], [HI], []),
        ([{"text": "Hi"}, {"image": "a.png"}], [HI, IMAGE], ["a.png"]),
        # Unused fields, the structure in one too.
        ([{**HI, "image": None, "image_url": {"url": None, "detail": None}}], [HI], []),
        ([{**HI, "image": math.nan, "detail": "auto"}], [HI], []),
        ([{**HI, "image": [], "videos": []}], [HI], []),
        ([{**IMAGE, "text": None, "image": "", "image_url": {"url": None}}], [IMAGE], [None]),
        (
            [{**IMAGE, "image": {"bytes": b"x", "path": None}}],
            [IMAGE],
            [{"bytes": b"x", "path": None}],
        ),
    ],
)
def test_contents(content, read, pictures):
    message = {"role": "user", "content": content, "name": None, "tool_calls": math.nan}
    (found,), named = read_messages([message])
    expected = [IMAGE] * len(content) if read is None else read
    assert found == {"role": "user", "content": expected} and named == pictures
    assert read_messages([found]) == ([found], [None] * len(pictures))


def test_calls_of_tools_have_no_text():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    for content in (None, []):
        assert read_messages([{**calls, "content": content, "refusal": None}]) == ([calls], [])
    assert without_nulls({"role": "x", "content": math.nan}) == {"role": "x", "content": None}


@pytest.mark.parametrize(
    "message",
    [
        "Hi",
        {"role": "user"},
        {"content": "Hi"},
        {"role": None, "content": "Hi"},
        {"role": 5, "content": "Hi"},
        {"role": "user", "content": "Hi", "images": ["a.png"]},
        {"role": "user", "content": [HI], "video": "x" * 1000},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": 3},
        *(
            {"role": "user", "content": [part]}
            for part in (
                None,
                {"type": "text"},
                {"type": "text", "text": None},
                {"type": "text", "text": "Hi", "image": "a.png"},
                {"type": "image", "text": "Hi"},
                {"type": "image", "image": "a.png", "url": "b.png"},
                {"type": "image", "file_id": "f"},
                {"type": "video", "video": "a.mp4"},
                {"type": "input_audio", "input_audio": {"data": "x" * 1000}},
                {"type": "image_url", "image_url": {"url": "x" * 10_000}, "text": "y" * 10_000},
            )
        ),
    ],
)
def test_what_is_no_message(message):
    with pytest.raises(UserError, match="messages: number 1") as caught:
        read_messages([{"role": "user", "content": "Hi"}, message])
    assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) <= 3
    assert "x" * 81 not in str(caught.value)


def test_pictures_that_are_named_and_given():
    assert pictures_in_order([None, "a", None], ["b", "c"]) == ["b", "a", "c"]
    assert pictures_in_order(["a"], []) == ["a"]
    # A text may hold a placeholder of its own: the prompt says how many pictures there are.
    assert pictures_in_order([], ["b"]) == ["b"] and pictures_in_order([None], [1, 2]) == [1, 2]
    for named, given in (([None, None], ["b"]), (["a"], ["b"]), (["a", None], [])):
        with pytest.raises(UserError, match="images: "):
            pictures_in_order(named, given)
