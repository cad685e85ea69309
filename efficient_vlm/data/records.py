"""What one sample is before it becomes arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_vlm.processing.decode_image import BadRecord

__all__ = ["REASONS", "BadRecord", "Conversation", "Record"]

# Why a `BadRecord` is skipped.
REASONS = {
    "malformed": "no list of turns, a turn of an unknown role or without text, or no picture where "
    "one should be",
    "markers": "<image> in the questions and pictures that do not match",
    "media": "video, audio, or pictures under a key that is not read",
    "outside": "image path that leaves the folder of the pictures",
    "missing": "image file not found or not readable",
    "corrupt": "image damaged or truncated",
    "too_large": "image above the pixel or byte limit",
    "format": "not an image, or of a kind or a range of values that is not read",
    "too_many_images": "more images than data.max_images",
    "too_long": "conversation longer than data.max_length tokens",
    "no_label": "no answer to learn from",
    "no_pair": "no chosen or no rejected answer, or two that differ in more, or in nothing",
    "refused": "a conversation that the model's chat template or picture processor refuses",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of (user text, assistant text) about the images of one record.

    Attributes:
      turns: at least one pair.
      task: name under which results are grouped.
      places: for each image of the record, where it stands: (turn, characters of that user text in
        front of it), in order; () for all images in front of everything, `system` included.
      system: system prompt, "" for none; a chat template has a place for it, `flat` puts it in
        front of the first question.
    """

    turns: tuple[tuple[str, str], ...]
    task: str = "conversation"
    places: tuple[tuple[int, int], ...] = ()
    system: str = ""

    @classmethod
    def single(cls, prompt: str, answer: str, task: str = "conversation") -> "Conversation":
        """One question and one answer."""
        return cls(turns=((prompt, answer),), task=task)

    def flat(self) -> "Conversation":
        """The same words without a system prompt: it is the first line of the first question."""
        if not self.system:
            return self
        (question, answer), *others = self.turns
        head = self.system + ("\n" if question else "")
        places = tuple((turn, at + len(head) * (turn == 0)) for turn, at in self.places)
        return Conversation(((head + question, answer), *others), self.task, places)

    @property
    def prompt(self) -> str:
        """Text of the first question, with the system prompt in front of it."""
        return self.flat().turns[0][0]

    @property
    def answer(self) -> str:
        """Text of the first answer."""
        return self.turns[0][1]


@dataclasses.dataclass(frozen=True)
class Record:
    """Images and the independent conversations about them.

    Attributes:
      id: name in the source.
      images: encoded files (PNG, JPEG, ...); empty for a text-only sample.
      conversations: each sees the images and itself, none sees another.
      meta: whatever the source knows beside (glyph cells of a scene, ...).
    """

    id: str
    images: tuple[bytes, ...]
    conversations: tuple[Conversation, ...]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
