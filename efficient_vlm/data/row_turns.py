"""The turns of a row, whichever layout they are written in, as a list of {"role", "content"}."""

import collections
import numbers
from collections.abc import Mapping
from typing import Any

from efficient_vlm.data.row_pictures import absent, check_keys, names_of, picture_of
from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord

MARKER = "<image>"
# Columns of multiple choice, which a question must spell out to be answered by a letter.
_CHOICES = ("choices", "options")
_MEDIA_PARTS = ("video", "audio", "video_url", "audio_url", "input_audio", "file")


def turns_of(row: Mapping[str, Any]) -> list[Any]:
    """The turns of a row, each as it stands there or as {"role", "content"}.

    Raises:
      BadRecord: "malformed" where there are none, "media" as `check_keys`.
    """
    turns = either(row, "conversations", "messages")
    if absent(turns) and not absent(row.get("texts")):
        return _of_pairs(row, row["texts"])
    if absent(turns) and not absent(row.get("question")):
        return _of_question(row)
    if not isinstance(turns, list) or not turns:
        raise BadRecord("malformed", "no list of conversations")
    return turns


def _of_pairs(row: Mapping[str, Any], texts: Any) -> list[dict[str, Any]]:
    """Turns of [{"user", "assistant"}, ...]: one conversation, as the cards of these data say."""
    if not isinstance(texts, list):
        raise BadRecord("malformed", f"texts is {short(texts)}")
    turns = []
    for pair in texts:
        if not isinstance(pair, dict) or not {"user", "assistant"} <= set(pair):
            raise BadRecord("malformed", f"a pair of texts is {short(pair)}")
        check_keys(pair, ("maybe",), names_of(row))
        user = "" if pair["user"] is None else pair["user"]
        turns.append({"role": "user", "content": user})
        turns.append({"role": "assistant", "content": pair["assistant"]})
    return turns


def _of_question(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two turns of "question" and the answer, see `answers_of`."""
    for name in _CHOICES:
        if not absent(row.get(name)):
            raise BadRecord("malformed", f"{name} is not read; write it into data.template")
    answer = _words(row.get("answer"))
    if isinstance(answer, list) or absent(answer):
        # The most frequent of several, the first of those that are equally frequent.
        counts = collections.Counter(text for text in answers_of(row) if text.strip())
        answer = max(counts, key=counts.__getitem__) if counts else ""
    question = _words(row["question"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def answers_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """All answers under "answers", or a list under "answer": texts, numbers or {"answer": text}.

    Raises:
      BadRecord: "malformed" for anything else.
    """
    given = row.get("answers")
    if absent(given):
        given = row.get("answer")
        if not isinstance(given, list):
            return ()
    listed = given if isinstance(given, list) else [given]
    answers = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    texts = [_words(answer) for answer in answers if not absent(answer)]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord("malformed", f"answers is {short(given)}")
    return tuple(texts)


def _words(value: Any) -> Any:
    """A number as it is written; anything else as it is."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return str(value) if number and value == value else value


def text_of(content: Any) -> Any:
    """The text of content in parts, a marker for each picture; anything else as it is.

    Raises:
      BadRecord: "media" for a part that is neither text nor a picture, "malformed" for a part
        without its text.
    """
    if not _in_parts(content):
        return content
    text = ""
    for part in content:
        kind = part.get("type")
        if kind in ("image", "image_url"):
            text += MARKER
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in _MEDIA_PARTS:
            raise BadRecord("media", f"a part of type {short(kind)}")
        else:
            raise BadRecord("malformed", f"a part of a turn is {short(part)}")
    return text


def pictures_of_parts(row: Mapping[str, Any]) -> list[str | bytes]:
    """Pictures that lie inside the parts of turns, in order; [] where parts only mark them.

    Raises:
      BadRecord: "malformed" where some parts hold a picture and others do not.
    """
    turns = row.get("messages") or row.get("conversations")
    marks, pictures = 0, []
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if _in_parts(content) else ():
            kind = part.get("type")
            if kind not in ("image", "image_url"):
                continue
            marks += 1
            given = [part.get(name) for name in ("image", "image_url", "path", "url", "bytes")]
            given = [picture_of(value) for value in given if not absent(value)]
            if given and not isinstance(given[0], str | bytes):
                raise BadRecord("malformed", f"the picture of a part is {short(given[0])}")
            pictures += given[:1]
    if pictures and len(pictures) != marks:
        raise BadRecord("malformed", f"{len(pictures)} of {marks} parts hold a picture")
    return pictures


def _in_parts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, dict) for part in content)
    )


def either(turn: Mapping[str, Any], *names: str) -> Any:
    """The value under one of several names of a field; BadRecord where they differ."""
    # An empty text is a value here: it says that nothing was said.
    given = [(n, turn[n]) for n in names if turn.get(n) == "" or not absent(turn.get(n))]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise BadRecord("malformed", f"different values under {given[0][0]} and {name}")
    return given[0][1] if given else None
