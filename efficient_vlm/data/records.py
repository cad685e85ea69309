"""What one sample is before it becomes arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_vlm.processing.decode_image import BadRecord

__all__ = ["REASONS", "BadRecord", "Conversation", "Record"]

# Why a `BadRecord` is skipped.
REASONS = {
    "malformed": "no list of turns, a turn of an unknown role or without text, or no paths",
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
    "refused": "a conversation that the model's chat template or picture processor refuses",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of (user text, assistant text) about the images of one record.

    Attributes:
      turns: at least one pair.
      task: name under which results are grouped.
      places: for each image of the record, where it stands: (turn, characters of that user text in
        front of it), in order; () for all images in front of everything.
      system: system prompt; "" for none.
    """

    turns: tuple[tuple[str, str], ...]
    task: str = "conversation"
    places: tuple[tuple[int, int], ...] = ()
    system: str = ""

    @classmethod
    def single(cls, prompt: str, answer: str, task: str = "conversation") -> "Conversation":
        """One question and one answer."""
        return cls(turns=((prompt, answer),), task=task)

    @property
    def prompt(self) -> str:
        """Text of the first question."""
        return self.turns[0][0]

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
