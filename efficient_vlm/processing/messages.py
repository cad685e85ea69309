"""Messages of a conversation, in the forms in which clients and tables write them -> one form.

Typed clients and Arrow tables write every field, null where it is unused; chat templates ask
whether a field is there, not what it holds. So nulls go, parts get the two forms that templates
know ({"type": "text", "text": ...} and {"type": "image"}), and pictures that parts name are handed
over beside the messages.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_vlm.errors import UserError, short

Message = Mapping[str, Any]
# What a part may be called, and under which of its keys the picture lies. OpenAI's chat and
# responses API, Hugging Face's processors.
_TEXT = ("text", "input_text", "output_text")
_PICTURE = ("image", "image_url", "input_image")
_NAMED = ("image", "image_url", "url", "path", "base64", "data")
# Keys that say how a picture is to be treated elsewhere, and have no meaning here.
_HINTS = ("type", "detail", "cache_control", "annotations", "id", "index", "logprobs")
# Keys of a message under which some clients put what belongs into its content.
_OUTSIDE = ("image", "images", "video", "videos", "audio", "audios")
# Whose turn an answer is, in templates and in the conversations of their users.
ANSWERING = ("assistant", "model")
# Variables that templates write around {% generation %} blocks; nothing where they are not given.
GENERATION_MARKS = ("generation_begins", "generation_ends")
FORM = (
    '{"role": ..., "content": text, or a list of {"type": "text", "text": ...} and '
    '{"type": "image"}, which may name its picture under "image", "url" or "image_url"}'
)


def absent(value: Any) -> bool:
    """Whether a field is unused: null, NaN, which tables write for it, or a mapping of such fields,
    which is how they write a structure that is not there."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(absent, value.values()))
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_nulls(message: Any) -> Any:
    """A message without unused fields of its own and of its parts; anything else as it is.

    `content` stays where it is null: a message of calls alone has none, and templates ask for it.
    """
    if not isinstance(message, Mapping):
        return message
    kept = {k: v for k, v in message.items() if k == "content" or not absent(v)}
    content = kept.get("content")
    if "content" in kept and (absent(content) or (content == [] and kept.get("tool_calls"))):
        kept["content"] = None
    elif isinstance(content, list | tuple):
        kept["content"] = [
            {k: v for k, v in part.items() if not (absent(v) or v == [])}
            if isinstance(part, Mapping)
            else part
            for part in content
        ]
    return kept


def read_messages(
    messages: Sequence[Message], first: int = 0
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in one form, and what they name as pictures.

    Args:
      messages: each {"role", "content"} and other fields for the template. A content is a text or a
        list of parts; a part is a text, {"type": "text" or "input_text", "text": ...}, or a picture
        of type "image", "image_url" or "input_image", with or without the picture itself (anything
        that `pictures.base.load_picture` takes, under "image", "url", "path" or "image_url", there
        also as {"url": ...}). Fields that are null or NaN are unused.
      first: number of the first message, for errors.

    Returns:
      Messages whose content is a text, a list of the two forms of parts, or None beside tool calls;
      and for each part that is a picture, in order, the picture, or None for one that is to be
      given beside.

    Raises:
      UserError: a message of another form.
    """
    read, pictures = [], []
    for number, message in enumerate(messages, first):
        message = without_nulls(message)
        right = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if right and any(message.get(name) not in (None, [], "") for name in _OUTSIDE):
            raise UserError(
                f"messages: number {number}, {short(message)}: media outside of its content",
                allowed=FORM,
            )
        content = message.get("content") if right else None
        if isinstance(content, list | tuple) and content:
            parts = [_part(part, number, message) for part in content]
            pictures += [picture for form, picture in parts if form["type"] == "image"]
            message["content"] = [form for form, _ in parts]
        elif not right or not (isinstance(content, str) or _calls(message)):
            raise _refused(number, message)
        read.append(message)
    return read, pictures


def _calls(message: Message) -> bool:
    """Whether a message is of calls of tools alone, which come without a text."""
    return message.get("content") is None and bool(message.get("tool_calls"))


def parts_of(message: Any, number: int) -> list[str | None]:
    """The parts of one message: texts, and None for pictures; UserError if it is of another form.

    Args:
      message: see `read_messages`.
      number: of the message, for the error.
    """
    ((message,), _) = read_messages([message], first=number)
    content = message["content"]
    if content is None:
        raise _refused(number, message)
    if isinstance(content, str):
        return [content]
    return [part.get("text") for part in content]


def _part(part: Any, number: int, message: Message) -> tuple[dict[str, Any], Any]:
    """A part in one of the two forms, and the picture that it names."""
    if isinstance(part, str):
        return {"type": "text", "text": part}, None
    if not isinstance(part, Mapping):
        raise _refused(number, message, part)
    kind, text = part.get("type"), part.get("text")
    named = [picture for name in _NAMED if (picture := _named(part.get(name))) is not None]
    if kind is None:  # Some write the picture or the text alone.
        kind = "image" if named else "text"
    strange = set(part) - {*_HINTS, *_NAMED, "text"}
    if kind in _TEXT and isinstance(text, str) and not named and not strange:
        return {"type": "text", "text": text}, None
    if kind not in _PICTURE or text or strange or len(named) > 1:
        raise _refused(number, message, part)
    return {"type": "image"}, named[0] if named else None


def _named(picture: Any) -> Any:
    """The picture under a key of a part; None where that is unused."""
    if isinstance(picture, Mapping) and "url" in picture:
        picture = picture["url"]
    unused = absent(picture) or (isinstance(picture, str) and not picture)
    return None if unused else picture


def ends_with_answer(messages: Sequence[Message]) -> bool:
    """Whether the last message is the assistant's."""
    last = messages[-1]
    return isinstance(last, Mapping) and last.get("role") in ANSWERING


def with_mark(message: Message, mark: str) -> dict[str, Any] | None:
    """The message with a mark behind its text; None where it does not end with a text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}
    if content and isinstance(content[-1], Mapping) and "text" in content[-1]:
        last = {**content[-1], "text": content[-1]["text"] + mark}
        return {**message, "content": [*content[:-1], last]}
    return None


def _refused(number: int, message: Any, part: Any = None) -> UserError:
    what = f"message {short(message)}" if part is None else f"part {short(part)}"
    return UserError(f"messages: number {number}, {what}", allowed=FORM)


def pictures_in_order(named: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The pictures of a conversation: those that its messages name, and those given beside it.

    Args:
      named: from `read_messages`.
      given: for the parts that name none, in order.

    Raises:
      UserError: there are fewer than parts that name none, or more where some are named.
    """
    open_parts = sum(picture is None for picture in named)
    if open_parts == len(named) <= len(given):
        return list(given)  # More are for placeholders in texts, which the prompt will count.
    if open_parts != len(given):
        raise UserError(
            f"images: {len(given)} for {open_parts} pictures of the messages that are not named",
            fix='give one for each {"type": "image"} that has no picture under "image" or "url"',
        )
    rest = iter(given)
    return [next(rest) if picture is None else picture for picture in named]
