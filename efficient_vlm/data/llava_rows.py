"""One row of a LLaVA-style file -> its pictures and turns: taken whole, or refused with a reason.

Pictures stand where "<image>" stands in the questions, so their numbers must agree; without any
marker they stand in front of everything. Answers are what the model learns to write, and stay as
they are to the last space: a marker in them is text.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord

MARKER = "<image>"
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "model")
# Keys that say that a row has more than text and the pictures that are read.
_MEDIA_KEY = re.compile(
    r"(video|audio|speech|sound|voice|music|point_?cloud|(video_?)?frame)s?"
    r"(_(path|file|url|name|bytes|list)s?)?"
)
_PICTURE_KEY = re.compile(
    r"(image|img|picture|photo|pixel_value)s?(_(path|file|url|name|bytes|base64|list)s?)?"
)
# Placeholders of media that are not read, and other spellings of a picture's.
_MEDIA_MARKER = re.compile(
    r"<(video|audio|speech|sound)[ _-]?\d*>|<\|(video|audio)[^|<>]*\|>", re.IGNORECASE
)
_OTHER_MARKER = re.compile(
    r"<image[ _-]?\d+>|<\|(image|vision_start)[^|<>]*\|>|<image>|<img_context>|<start_of_image>"
    r"|<image_(soft_token|placeholder)>|<imagehere>",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """What a row holds.

    Attributes:
      pictures: paths or data URLs, in the order of the text.
      turns: (user, assistant) texts.
      places: for each picture (turn, characters of its user text in front of it); () for all
        pictures in front of everything.
    """

    pictures: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    places: tuple[tuple[int, int], ...] = ()


def read_row(row: Any) -> Row:
    """Pictures and turns of a parsed row.

    A question behind the last answer is left out: nothing is learnt from it.

    Raises:
      BadRecord: "malformed", "media", "markers" or "no_label"; see `records.REASONS`.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("malformed", "no JSON object")
    pictures, nulls = pictures_of(row)
    _check_keys(row, pictures)
    turns, places = _turns(row)
    answered = [answer for _, answer in turns]
    if not places and nulls:
        raise BadRecord("malformed", "a null among the pictures, and no <image> says how many")
    if not places and pictures and any(MARKER in answer for answer in answered):
        raise BadRecord("markers", f"{MARKER} in an answer, and in no question")
    if places and len(places) != len(pictures):
        raise BadRecord("markers", f"{len(places)} {MARKER}, pictures: {len(pictures)}")
    in_front = all(place == (0, 0) for place in places)
    return Row(tuple(pictures), turns, () if in_front else places)


def absent(value: Any) -> bool:
    """Whether a field says nothing: null, NaN (as tables write null), or empty."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | list | dict) and not value)


def pictures_of(row: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Pictures under "image" or "images", and whether there are nulls among them.

    Each is a text, or {"path": text}, as tables store pictures.

    Raises:
      BadRecord: "malformed" for anything else, or for different pictures under the two keys.
    """
    given = [row[key] for key in ("image", "images") if not absent(row.get(key))]
    lists = [value if isinstance(value, list) else [value] for value in given]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise BadRecord("malformed", "different pictures under image and under images")
    listed = lists[0] if lists else []
    live = [_path(value) for value in listed if not absent(value)]
    if not all(isinstance(path, str) for path in live):
        raise BadRecord("malformed", f"image is {short(given[0])}")
    return live, len(live) < len(listed)


def _path(value: Any) -> Any:
    if isinstance(value, dict) and absent(value.get("bytes")):
        return value.get("path")
    return value


def _check_keys(row: Mapping[str, Any], pictures: Sequence[str]) -> None:
    """Raises BadRecord for a row that is about more than what is read of it."""
    for key, value in row.items():
        if key in ("image", "images") or absent(value) or value is False:
            continue
        if _MEDIA_KEY.fullmatch(key.lower()):
            raise BadRecord("media", f"{short(key)} is not read")
        # Beside pictures that are read, such a key repeats them ("image_name").
        if not pictures and _PICTURE_KEY.fullmatch(key.lower()):
            raise BadRecord("media", f"{short(key)} is not read; pictures lie under image")


def _turns(row: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], tuple]:
    """(pairs of (user, assistant) text, places of markers); system text goes in front."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("malformed", "no list of conversations")
    pairs, places, asked = [], [], []
    if not absent(row.get("system")):
        asked.append(_pieces(_text("system", row["system"])))
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord("malformed", f"turn is {short(turn)}")
        who, said = _either(turn, "from", "role"), _either(turn, "value", "content")
        role = who.strip().lower() if isinstance(who, str) else None
        if role in _ASSISTANT:
            if not isinstance(said, str) or not said.strip():
                raise BadRecord("no_label", "an answer without text")
            question, marks = _joined(asked)
            places += [(len(pairs), mark) for mark in marks]
            pairs.append((question, said))
            asked = []
        elif role in _USER or role == "system":
            asked.append(_pieces(_text(role, said)))
        else:
            raise BadRecord("malformed", f"turn from {short(who)}")
    if not pairs:
        raise BadRecord("no_label")
    if any(len(pieces) > 1 for pieces in asked):
        raise BadRecord("markers", f"{MARKER} behind the last answer")
    return tuple(pairs), tuple(places)


def _either(turn: Mapping[str, Any], *names: str) -> Any:
    """The value under one of two names of a field; BadRecord where they differ."""
    # An empty text is a value here: it says that nothing was said.
    given = [turn[n] for n in names if turn.get(n) == "" or not absent(turn.get(n))]
    if len(given) > 1 and given[0] != given[1]:
        raise BadRecord("malformed", f"different values under {names[0]} and {names[1]}")
    return given[0] if given else None


def _text(role: str, said: Any) -> str:
    if not isinstance(said, str):
        raise BadRecord("malformed", f"text of {role} is {short(said)}")
    if found := _MEDIA_MARKER.search(said):
        raise BadRecord("media", f"{found[0]} in a question")
    for found in _OTHER_MARKER.finditer(said):
        if found[0] != MARKER:
            raise BadRecord("markers", f"{short(found[0])}, where {MARKER} is read")
    return said


def _pieces(text: str) -> list[str]:
    """The text between its markers, without white space at both ends, markers there or not."""
    pieces = text.split(MARKER)
    for step, strip in ((1, str.lstrip), (-1, str.rstrip)):
        for i in range(len(pieces))[::step]:
            pieces[i] = strip(pieces[i])
            if pieces[i]:
                break
    return pieces


def _joined(asked: Sequence[Sequence[str]]) -> tuple[str, list[int]]:
    """One text of several, a line each, and the offsets in it at which pictures stand."""
    text, marks = "", []
    for pieces in asked:
        if text and any(pieces):
            text += "\n"
        for number, piece in enumerate(pieces):
            if number:
                marks.append(len(text))
            text += piece
    return text, marks
