"""A record's conversation in the form that published models are asked in."""

from collections.abc import Sequence
from typing import Any

from efficient_vlm.data.records import Conversation
from efficient_vlm.errors import UserError, short


def record_messages(conversation: Conversation, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with the pictures where they stand in the questions.

    Args:
      conversation: its system prompt, turns and places.
      images: of the record: anything that `pictures.base.load_picture` takes.

    Returns:
      Messages as `processing.messages.read_messages` reads them: {"role", "content"} of the system,
      where there is a system prompt, and of user and assistant in turn. Content is a list of
      {"type": "image", "image": ...} and {"type": "text", "text": ...} where a question has
      pictures, else a text.

    Raises:
      UserError: there are places for another number of pictures, or one outside of its question.
    """
    places = conversation.places or ((0, 0),) * len(images)
    if len(places) != len(images):
        raise UserError(f"conversation: {len(places)} places for {len(images)} pictures")
    messages = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    rest, used = list(images), 0
    for number, (question, answer) in enumerate(conversation.turns):
        marks = [mark for turn, mark in places if turn == number]
        own, used = rest[used : used + len(marks)], used + len(marks)
        messages.append({"role": "user", "content": _content(question, marks, own)})
        messages.append({"role": "assistant", "content": answer})
    if used != len(images) or list(places) != sorted(places):
        raise UserError("conversation: places of pictures that are not in the order of its turns")
    return messages


def _content(text: str, marks: Sequence[int], images: Sequence[Any]) -> str | list[dict[str, Any]]:
    if not marks:
        return text
    if not 0 <= marks[0] <= marks[-1] <= len(text):
        raise UserError(
            f"conversation: pictures at {short(list(marks))} of a text of {len(text)} characters"
        )
    parts, start = [], 0
    for mark, image in zip(marks, images, strict=True):
        parts += [text[start:mark], {"type": "image", "image": image}]
        start = mark
    parts.append(text[start:])
    return [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts if p != ""]
