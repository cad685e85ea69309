"""Records as messages: every picture where it stands, every word once."""

import pytest

from efficient_vlm.data.llava_rows import read_row
from efficient_vlm.data.record_messages import record_messages
from efficient_vlm.data.records import Conversation
from efficient_vlm.errors import UserError


def text(words):
    return {"type": "text", "text": words}


def image(name):
    return {"type": "image", "image": name}


def test_pictures_in_front_and_in_the_middle():
    turns = (("What is it?", "A cat."), ("And this?", " No. "))
    asked = Conversation(turns)
    answers = [{"role": "assistant", "content": answer} for _, answer in turns]
    first, second = answers
    assert record_messages(asked, []) == [
        {"role": "user", "content": "What is it?"},
        first,
        {"role": "user", "content": "And this?"},
        second,
    ]
    assert record_messages(asked, ["a", "b"])[0] == {
        "role": "user",
        "content": [image("a"), image("b"), text("What is it?")],
    }
    asked = Conversation(turns, places=((0, 5), (0, 5), (1, 9)), system="Be brief.")
    assert record_messages(asked, ["a", "b", "c"]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("What "), image("a"), image("b"), text("is it?")]},
        first,
        {"role": "user", "content": [text("And this?"), image("c")]},
        second,
    ]
    caption = Conversation((("", "A cat."),))
    assert record_messages(caption, ["a"])[0]["content"] == [image("a")]
    assert record_messages(caption, [])[0]["content"] == ""


def test_of_a_row_of_a_file():
    """The markers of the row become parts; one in an answer stays a text."""
    row = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\nIs it <image> or not?"},
            {"from": "gpt", "value": "An <image>."},
        ],
    }
    found = read_row(row)
    assert record_messages(Conversation(found.turns, places=found.places), found.pictures) == [
        {
            "role": "user",
            "content": [image("a.jpg"), text("Is it "), image("b.jpg"), text(" or not?")],
        },
        {"role": "assistant", "content": "An <image>."},
    ]


@pytest.mark.parametrize(
    ("places", "images"),
    [
        (((0, 0),), ["a", "b"]),
        (((0, 0), (1, 0)), ["a"]),
        (((2, 0),), ["a"]),
        (((0, 9),), ["a"]),
        (((1, 0), (0, 0)), ["a", "b"]),
        (((0, 2), (0, 1)), ["a", "b"]),
    ],
)
def test_places_of_other_pictures(places, images):
    asked = Conversation((("What", "A cat."), ("Hm", "No.")), places=places)
    with pytest.raises(UserError, match="conversation: ") as caught:
        record_messages(asked, images)
    assert len(str(caught.value).splitlines()) <= 3
