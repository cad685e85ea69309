"""One row of a file -> its pictures and turns: taken whole, or refused with a reason.

Pictures stand where "<image>" stands in the questions (or where a part {"type": "image"} does), so
their numbers must agree; without any marker they stand in front of everything. Answers are what the
model learns to write, and stay as they are to the last space: a marker in them is text.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from efficient_vlm.data.row_pictures import (
    MEDIA_MARKER,
    PICTURE_MARKER,
    absent,
    check_keys,
    names_of,
    pictures_of,
)
from efficient_vlm.data.row_turns import (
    MARKER,
    answers_of,
    either,
    pictures_of_parts,
    text_of,
    turns_of,
)
from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord

__all__ = ["MARKER", "Row", "absent", "pictures_of", "read_row", "read_turns"]

_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "model")
# Where trainers say of a turn that its answer is not learnt.
_DROPPED = frozenset(("weight", "train", "loss", "loss_weight", "loss_scale"))


class Row(NamedTuple):
    """What a row holds.

    Attributes:
      pictures: paths, URLs, base64 or the bytes of files, in the order of the text.
      turns: (user, assistant) texts.
      places: for each picture (turn, characters of its user text in front of it); () for all
        pictures in front of everything.
      system: the system prompt, "" for none.
      answers: all answers that the row accepts for its last question, () where it says none.
    """

    pictures: tuple[str | bytes, ...]
    turns: tuple[tuple[str, str], ...]
    places: tuple[tuple[int, int], ...] = ()
    system: str = ""
    answers: tuple[str, ...] = ()


def read_row(row: Any) -> Row:
    """Pictures and turns of a parsed row.

    A question behind the last answer is left out: nothing is learnt from it.

    Args:
      row: turns under "conversations" or "messages"; or under "texts", a list of {"user",
        "assistant"}; or one pair under "question" and "answer" or "answers".

    Raises:
      BadRecord: "malformed", "media", "markers" or "no_label"; see `records.REASONS`.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("malformed", "no JSON object")
    pictures, nulls = all_pictures(row)
    names = names_of(row)
    check_keys(row, pictures, names)
    turns, places, system = _turns(row, pictures, names)
    answered = [answer for _, answer in turns]
    if not places and nulls:
        raise BadRecord("malformed", "a null among the pictures, and no <image> says how many")
    if not places and pictures and any(MARKER in answer for answer in answered):
        raise BadRecord("markers", f"{MARKER} in an answer, and in no question")
    if places and len(places) != len(pictures):
        raise BadRecord("markers", f"{len(places)} {MARKER}, pictures: {len(pictures)}")
    return Row(tuple(pictures), turns, _behind(places, system), system, answers_of(row))


def read_turns(row: Any) -> Row:
    """`read_row` of a row whose pictures were left out, so that nothing is said of them."""
    if not isinstance(row, Mapping):
        raise BadRecord("malformed", "no JSON object")
    turns, places, system = _turns(row, None, ())
    return Row((), turns, _behind(places, system), system, answers_of(row))


def all_pictures(row: Mapping[str, Any]) -> tuple[list[str | bytes], bool]:
    """`pictures_of`, or the pictures inside the parts of the turns.

    Raises:
      BadRecord: "malformed" for different pictures in the two places.
    """
    pictures, nulls = pictures_of(row)
    inside = pictures_of_parts(row)
    if inside and pictures and pictures != inside:
        raise BadRecord("malformed", "different pictures in the turns and under images")
    return inside or pictures, nulls


def _behind(places: tuple[tuple[int, int], ...], system: str) -> tuple[tuple[int, int], ...]:
    """() where all pictures stand in front of everything, which a system prompt belongs to."""
    return () if not system and all(place == (0, 0) for place in places) else places


def _turns(
    row: Mapping[str, Any], pictures: Sequence | None, names: Sequence[str] | set[str]
) -> tuple[tuple[tuple[str, str], ...], tuple, str]:
    """(pairs of (user, assistant) text, places of markers, system prompt).

    System text in front of the first question is the system prompt, unless a picture stands in it;
    all other is part of the next question. Pictures of turns are looked at unless `pictures` is
    None.
    """
    turns = turns_of(row)
    pairs, places, asked, spoken = [], [], [], False
    system = either(row, "system", "system_prompt", "system_message")
    if not absent(system):
        asked.append(_pieces(_checked("system", system)))
    leading = len(asked)  # Texts of `asked` that are the system prompt.
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord("malformed", f"turn is {short(turn)}")
        if pictures is not None:
            _check_turn(turn, pictures, names)
        who, content = either(turn, "from", "role"), either(turn, "value", "content")
        role, said = who.strip().lower() if isinstance(who, str) else None, text_of(content)
        if role in _ASSISTANT:
            if said is not content and MARKER in said:
                raise BadRecord("media", "a picture in an answer")
            _check_answer(turn, role, said)
            if pairs and not asked:
                raise BadRecord("malformed", "two answers in a row")
            if not pairs and any(len(pieces) > 1 for pieces in asked[:leading]):
                leading = 0
            question, marks = _joined(asked if pairs else asked[leading:])
            if not pairs:
                prompt = "\n".join(text for pieces in asked[:leading] if (text := pieces[0]))
            places += [(len(pairs), mark) for mark in marks]
            pairs.append((question, said))
            asked = []
        elif role in _USER or role == "system":
            spoken |= role != "system"
            leading += not (pairs or spoken)
            asked.append(_pieces(_checked(role, said)))
        else:
            raise BadRecord("malformed", f"turn from {short(who)}")
    if not pairs:
        raise BadRecord("no_label")
    if any(len(pieces) > 1 for pieces in asked):
        raise BadRecord("markers", f"{MARKER} behind the last answer")
    return tuple(pairs), tuple(places), prompt


def _check_turn(turn: Mapping[str, Any], pictures: Sequence, names: Any) -> None:
    if any(picture not in pictures for picture in pictures_of(turn)[0]):
        raise BadRecord("media", "a picture of a turn; pictures of a row lie under its image")
    check_keys(turn, pictures, names)


def _check_answer(turn: Mapping[str, Any], role: str, said: Any) -> None:
    if not (absent(said) or isinstance(said, str)):
        raise BadRecord("malformed", f"text of {role} is {short(said)}")
    if absent(said) or not said.strip():
        raise BadRecord("no_label", "an answer without text")
    for key in _DROPPED & set(turn):
        if turn[key] in (0, "0"):  # False is one of them.
            raise BadRecord("malformed", f"{key} 0: answers are learnt, or not in a row")


def _checked(role: str, said: Any) -> str:
    if not isinstance(said, str):
        raise BadRecord("malformed", f"text of {role} is {short(said)}")
    # As it looks: "&lt;image&gt;", full-width letters, characters that take no room.
    seen = html.unescape(said)
    if not seen.isascii():
        seen = unicodedata.normalize("NFKC", seen)
        seen = "".join(c for c in seen if unicodedata.category(c) != "Cf")
    if found := MEDIA_MARKER.search(seen):
        raise BadRecord("media", f"{short(found[0])} in a question")
    for found in PICTURE_MARKER.finditer(seen):
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
