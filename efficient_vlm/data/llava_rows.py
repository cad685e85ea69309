"""One row of a LLaVA-style file -> its pictures and turns: taken whole, or refused with a reason.

Pictures stand where "<image>" stands in the questions, so their numbers must agree; without any
marker they stand in front of everything. Answers are what the model learns to write, and stay as
they are to the last space: a marker in them is text.
"""

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord

MARKER = "<image>"
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "model")
_PICTURE = r"(image|img|picture|photo|pixel_value)s?"
_MEDIA = r"(video|vid|audio|speech|sound|voice|music|point_?cloud|(video_?)?frame)s?"
# Keys that say that a row has more than text and the pictures that are read; in small letters, with
# underscores between words.
_FILES = r"_?\d*(_(path|file|url|name|bytes|base64|list)s?)?"
_MEDIA_KEY, _PICTURE_KEY = (re.compile(kind + _FILES) for kind in (_MEDIA, _PICTURE))
_NUMBERED_PICTURE = re.compile(_PICTURE + r"_?\d+")
# Values that say so, whatever their key.
_MEDIA_FILE = re.compile(r"\S+\.(mp4|avi|mov|mkv|webm|m4v|wav|mp3|flac|ogg|m4a|ply|pcd)", re.I)
_PICTURE_FILE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)", re.I)
# Placeholders: <video>, <image_1>, <|image_pad|>, </img>, [IMG]. With attributes they are HTML.
# One digit at a time: a repeated repetition would try all ways to part a long number.
_ENDS = r"([ _:-]?(\d|pad|(soft_)?token|placeholder|here|context|start|end|bos|eos))*"
_PLACEHOLDER = r"[<\[][\s|/]*(vila/|(start|end|begin|boi|eoi)_of_)?(%s)" + _ENDS + r"[\s|/]*[>\]]"
_MEDIA_MARKER = re.compile(_PLACEHOLDER % _MEDIA, re.I)
_PICTURE_MARKER = re.compile(_PLACEHOLDER % (_PICTURE + "|vision"), re.I)
_LONGEST = 4096  # Of a file's name; data: URLs are longer.
# Keys whose values are read, or name the row.
_READ = ("id", "task", "image", "images", "conversations", "messages", "from", "role", "value",
         "content", "system")  # fmt: skip
# Where trainers say of a turn that its answer is not learnt.
_DROPPED = frozenset(("weight", "train", "loss", "loss_weight", "loss_scale"))


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
    turns, places = _turns(row, pictures)
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
    """Whether a field says nothing: null, NaN (as tables write null), empty, or a structure of
    nothing but such fields."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, dict):
        return all(map(absent, value.values()))
    return value is None or (isinstance(value, str | list) and not value)


def pictures_of(row: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Pictures under "image" or "images", and whether there are nulls among them.

    Each is a text, or {"path": text}, as tables store pictures.

    Raises:
      BadRecord: "malformed" for anything else, or for different pictures under the two keys.
    """
    found, nulls = [], False
    for key in ("image", "images"):
        value = row.get(key)
        if absent(value):
            continue
        listed = value if isinstance(value, list) else [value]
        live = [_path(one) for one in listed if not absent(one)]
        if not all(isinstance(path, str) for path in live):
            raise BadRecord("malformed", f"{key} is {short(value)}")
        found.append(live)
        nulls |= len(live) < len(listed)
    live = [pictures for pictures in found if pictures]
    if len(live) == 2 and live[0] != live[1]:
        raise BadRecord("malformed", "different pictures under image and under images")
    return (live[0] if live else []), nulls


def _path(value: Any) -> Any:
    if isinstance(value, dict) and absent(value.get("bytes")):
        return value.get("path")
    return value


def _check_keys(row: Mapping[str, Any], pictures: Sequence[str]) -> None:
    """Raises BadRecord for a row, or a turn, that is about more than what is read of it."""
    names = {path.replace("\\", "/").split("/")[-1] for path in pictures}
    for key, value in row.items():
        silent = absent(value) or (isinstance(value, list) and all(map(absent, value)))
        if key in _READ or silent or value is False:
            continue
        word = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key).lower()
        files = [file for file in _files(value) if len(file) <= _LONGEST]
        if _MEDIA_KEY.fullmatch(word) or any(map(_MEDIA_FILE.fullmatch, files)):
            raise BadRecord("media", f"{short(key)} is not read")
        shown = [file for file in files if _PICTURE_FILE.fullmatch(file)]
        if pictures:  # They may be named again, or by the address that they came from.
            again = all("://" in file or file.split("/")[-1] in names for file in shown)
            other = not again or (_NUMBERED_PICTURE.fullmatch(word) and not shown)
        else:
            other = shown or _PICTURE_KEY.fullmatch(word)
        if other:
            raise BadRecord("media", f"{short(key)} is not read; pictures lie under image")


def _files(value: Any) -> list[str]:
    """The texts of a value that may name files."""
    values = value if isinstance(value, list) else [value]
    values = [one.get("path", one.get("url")) if isinstance(one, dict) else one for one in values]
    return [one for one in values if isinstance(one, str)]


def _turns(
    row: Mapping[str, Any], pictures: Sequence[str]
) -> tuple[tuple[tuple[str, str], ...], tuple]:
    """(pairs of (user, assistant) text, places of markers); system text goes in front."""
    turns = _either(row, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("malformed", "no list of conversations")
    pairs, places, asked = [], [], []
    system = _either(row, "system", "system_prompt", "system_message")
    if not absent(system):
        asked.append(_pieces(_text("system", system)))
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord("malformed", f"turn is {short(turn)}")
        if not set(pictures_of(turn)[0]) <= set(pictures):
            raise BadRecord("media", "a picture of a turn; pictures of a row lie under its image")
        _check_keys(turn, pictures)
        who, said = _either(turn, "from", "role"), _either(turn, "value", "content")
        role = who.strip().lower() if isinstance(who, str) else None
        if role in _ASSISTANT:
            if not (absent(said) or isinstance(said, str)):
                raise BadRecord("malformed", f"text of {role} is {short(said)}")
            if absent(said) or not said.strip():
                raise BadRecord("no_label", "an answer without text")
            if pairs and not asked:
                raise BadRecord("malformed", "two answers in a row")
            for key in _DROPPED & set(turn):
                if turn[key] in (0, "0"):  # False is one of them.
                    raise BadRecord("malformed", f"{key} 0: answers are learnt, or not in a row")
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
    """The value under one of several names of a field; BadRecord where they differ."""
    # An empty text is a value here: it says that nothing was said.
    given = [(n, turn[n]) for n in names if turn.get(n) == "" or not absent(turn.get(n))]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise BadRecord("malformed", f"different values under {given[0][0]} and {name}")
    return given[0][1] if given else None


def _text(role: str, said: Any) -> str:
    if not isinstance(said, str):
        raise BadRecord("malformed", f"text of {role} is {short(said)}")
    # As it looks: "&lt;image&gt;", full-width letters, characters that take no room.
    seen = html.unescape(said)
    if not seen.isascii():
        seen = unicodedata.normalize("NFKC", seen)
        seen = "".join(c for c in seen if unicodedata.category(c) != "Cf")
    if found := _MEDIA_MARKER.search(seen):
        raise BadRecord("media", f"{short(found[0])} in a question")
    for found in _PICTURE_MARKER.finditer(seen):
        if found[0] != MARKER:
            raise BadRecord("markers", f"{short(found[0])}, where {MARKER} is read")
    if seen.count(MARKER) != said.count(MARKER):
        raise BadRecord("markers", f"{MARKER} in other characters")
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
