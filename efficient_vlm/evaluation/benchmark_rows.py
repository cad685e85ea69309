"""One row of a benchmark's table -> questions with pictures and references, or a reason why not."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.data.llava_rows import absent
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.evaluation.benchmark_cells import (
    letter_of,
    listed,
    mask,
    options_of_row,
    picture,
    pictures_of_row,
    references_of,
)
from efficient_vlm.evaluation.metrics.choice import LETTERS
from efficient_vlm.processing.conversation import Conversation
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.messages import ANSWERING, pictures_in_order, read_messages

MARKER = re.compile(r"<image(?:[ _]?(\d{1,3}))?>")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkRow:
    """One question.

    Attributes:
      id: its name in the file.
      images: encoded pictures.
      question: text, with "<image>" or "<image 2>" where a picture stands; "" for a conversation.
      references: right answers.
      options: what the letters from A on stand for; () for an open question.
      group: what questions about the same pictures share, for intervals.
      category: of the question, or None.
      masks: bool [height, width] of each object asked about.
      messages: the conversation up to the answer; () for a question alone.
    """

    id: str
    images: tuple[bytes, ...]
    question: str
    references: tuple[Any, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    category: str | None = None
    masks: tuple[np.ndarray, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()

    def prompt(self, suffix: str = "") -> str:
        """The question with its options, a line each, and a suffix on a line of its own."""
        lettered = [f"{LETTERS[k]}. {option}" for k, option in enumerate(self.options)]
        return "\n".join(part for part in (self.question, *lettered, suffix) if part)

    def conversation(self, suffix: str = "") -> tuple[Conversation, list[bytes]]:
        """What `Pretrained.run` takes: a question or messages, and the pictures in order.

        Raises:
          BadRecord: "markers" where they do not match the pictures.
        """
        if self.messages:
            return _with_suffix(self.messages, suffix), list(self.images)
        text, images = self.prompt(suffix), list(self.images)
        places = list(MARKER.finditer(text))
        if not places:
            return text, images
        parts, order, at = [], [], 0
        for number, place in enumerate(places):
            which = int(place[1]) - 1 if place[1] else number
            if not 0 <= which < len(images):
                raise BadRecord("markers", f"{place[0]}, pictures: {len(images)}")
            order.append(which)
            parts += [_part(text[at : place.start()]), {"type": "image"}]
            at = place.end()
        unused = [k for k in range(len(images)) if k not in order]
        if unused and not any(place[1] for place in places):
            raise BadRecord("markers", f"{len(places)} markers, pictures: {len(images)}")
        # Pictures that a text with numbers leaves out stand in front of it.
        parts = [*({"type": "image"} for _ in unused), *filter(None, [*parts, _part(text[at:])])]
        pictures = [images[k] for k in (*unused, *order)]
        in_front = all(part["type"] == "text" for part in parts[len(pictures) :])
        if in_front and all(part["type"] == "image" for part in parts[: len(pictures)]):
            return "".join(part["text"] for part in parts[len(pictures) :]), pictures
        return [{"role": "user", "content": parts}], pictures


def _group(images: Sequence[bytes], name: str) -> str:
    """What questions about these pictures share; the name of a row without any."""
    if not images:
        return name
    digests = b"".join(hashlib.sha256(image).digest() for image in images)
    return hashlib.sha256(digests).hexdigest()[:16]


def _part(text: str) -> dict[str, str] | None:
    text = text.strip()
    return {"type": "text", "text": text} if text else None


def _with_suffix(messages: Sequence[Mapping[str, Any]], suffix: str) -> list[Mapping[str, Any]]:
    *before, last = messages
    if not suffix:
        return list(messages)
    content = last["content"]
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content}\n{suffix}"}]
    return [*before, {**last, "content": [*content, {"type": "text", "text": suffix}]}]


def read_row(
    row: Any, number: int, columns: Mapping[str, str], folder: Path, question: str | None
) -> Iterator[BenchmarkRow]:
    """The questions of one row of a table.

    Args:
      row: column -> value.
      number: of the row, which names it where no column does.
      columns: field -> column, see `benchmark_file.FIELDS`; of "image" and "options" several with
        commas.
      folder: of the pictures, which no path may leave.
      question: that of all rows, where there is no column of questions.

    Raises:
      BadRecord: "malformed", "markers", "no_label", or what is wrong with a picture.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("malformed", f"row {number} is no row")

    def value(field: str) -> Any:
        return row.get(columns[field]) if field in columns else None

    name = str(number) if absent(value("id")) else str(value("id"))
    images = pictures_of_row(row, columns, folder)
    group = value("group")
    if absent(group):
        group = _group(images, name)
    category = None if absent(value("category")) else str(value("category"))
    shared = dict(images=images, group=str(group), category=category)
    if "texts" in columns:
        yield from _pairs(name, value("texts"), shared)
        return
    references = references_of(value("references"))
    if "messages" in columns:
        yield _conversation(name, value("messages"), references, shared, folder)
        return
    options = options_of_row(row, columns)
    masks = tuple(mask(each) for each in listed(value("masks")))
    if not references and not masks:
        raise BadRecord("no_label", f"row {name}")
    text = question if "question" not in columns else value("question")
    if not isinstance(text, str) or not text.strip():
        raise BadRecord("malformed", f"question of row {name}: {short(text)}")
    references = tuple(letter_of(each, options) for each in references) if options else references
    made = BenchmarkRow(name, question=text, references=references, options=options, masks=masks,
                        **shared)  # fmt: skip
    made.conversation()
    yield made


# ---- conversations -------------------------------------------------------------------------------


def _pairs(name: str, texts: Any, shared: Mapping[str, Any]) -> Iterator[BenchmarkRow]:
    """Questions of a list of {"user", "assistant"}, each by itself about the row's pictures."""
    pairs = [pair for pair in listed(texts) if isinstance(pair, Mapping)]
    if not pairs:
        raise BadRecord("malformed", f"texts of row {name}: {short(texts)}")
    for number, pair in enumerate(pairs):
        user, assistant = pair.get("user"), pair.get("assistant")
        if not isinstance(user, str) or not user.strip():
            raise BadRecord("malformed", f"user of row {name}: {short(user)}")
        if not isinstance(assistant, str) or not assistant.strip():
            raise BadRecord("no_label", f"row {name}")
        own = f"{name}-{number}" if len(pairs) > 1 else name
        made = BenchmarkRow(own, question=user, references=(assistant,), **shared)
        made.conversation()
        yield made


def _conversation(
    name: str, messages: Any, references: tuple, shared: Mapping[str, Any], folder: Path
) -> BenchmarkRow:
    """The conversation up to its last answer, which is the reference unless there are others."""
    given = [_message(message) for message in listed(messages)]
    try:
        read, named = read_messages(given)
        if read and read[-1]["role"] in ANSWERING:
            last = read.pop()
            references = references or references_of(last["content"])
        pictures = pictures_in_order(named, shared["images"])
    except UserError as error:
        raise BadRecord("malformed", first_line(error)) from None
    if not read:
        raise BadRecord("malformed", f"messages of row {name}")
    if not references or not all(isinstance(each, str) for each in references):
        raise BadRecord("no_label", f"row {name}")
    own = {id(each) for each in shared["images"]}
    images = [each if id(each) in own else picture(each, folder) for each in pictures]
    marks = sum(
        part["type"] == "image"
        for m in read
        if isinstance(m["content"], list)
        for part in m["content"]
    )
    if marks != len(images):
        raise BadRecord("markers", f"{marks} markers, pictures: {len(images)}")
    # Of pictures that messages name, too.
    group = shared["group"] if shared["images"] else _group(images, shared["group"])
    return BenchmarkRow(name, tuple(images), "", references, group=group, messages=tuple(read),
                        category=shared["category"])  # fmt: skip


def _message(message: Any) -> Any:
    """A message with the roles and the parts that templates know."""
    if not isinstance(message, Mapping):
        return message
    message = {k: v for k, v in message.items() if not absent(v)}
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = str(message.get("role", "")).strip().lower()
    message["role"] = _ROLES.get(role, role)
    content = message.get("content")
    if isinstance(content, str) and "<image>" in content and message["role"] not in ANSWERING:
        texts = content.split("<image>")
        parts = [each for text in texts for each in (_part(text), {"type": "image"})][:-1]
        message["content"] = [part for part in parts if part]
    return message
