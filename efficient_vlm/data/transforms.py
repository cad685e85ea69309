"""A record to arrays of fixed shape. Nothing is ever cut: what does not fit is a `BadRecord`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.processing import decode_image as image_ops
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.tokenizer import Tokenizer


class Spec(NamedTuple):
    """Shapes and limits of an example.

    Attributes:
      image_size: (height, width).
      resize: "stretch" or "letterbox".
      max_images: M.
      questions: Q, conversations per example.
      max_length: L, tokens per conversation.
      max_pixels, max_bytes: limits of one image file.
      tasks: names; `task` is an index into them.
      placed: whether pictures may stand behind some of the text.
    """

    image_size: tuple[int, int]
    resize: str
    max_images: int
    questions: int
    max_length: int
    max_pixels: int
    max_bytes: int
    tasks: tuple[str, ...]
    placed: bool = False


class Tokens(NamedTuple):
    """One conversation as ids.

    Attributes:
      ids: of all turns.
      target: target[i] is True where ids[i] is to be predicted: every assistant turn, as it is
        written, with its end token.
      prompt_length: how many ids are in front of the first answer.
      places: for each picture, how many ids are in front of it; [] for all pictures in front.
    """

    ids: list[int]
    target: list[bool]
    prompt_length: int
    places: list[int]


def tokenize(conversation: Conversation, tokenizer: Tokenizer) -> Tokens:
    """One conversation as ids. Text on the two sides of a picture is tokenised by itself.

    Raises:
      BadRecord: "no_label" when no turn has an answer.
    """
    conversation = conversation.flat()
    ids, target, places, prompt_length = [], [], [], 0
    for number, (user, assistant) in enumerate(conversation.turns):
        answer = tokenizer.encode(assistant) if assistant.strip() else []
        if not answer:
            continue
        prompt, start = [], 0
        for mark in (at for turn, at in conversation.places if turn == number):
            prompt += tokenizer.encode(user[start:mark])
            places.append(len(ids) + len(prompt))
            start = mark
        prompt += tokenizer.encode_prompt(user[start:])
        prompt_length = prompt_length or len(prompt)
        ids += [*prompt, *answer, tokenizer.eos_id]
        target += [False] * len(prompt) + [True] * (len(answer) + 1)
    if not ids:
        raise BadRecord("no_label")
    return Tokens(ids, target, prompt_length, places)


def text_arrays(record: Record, spec: Spec, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Arrays of all P conversations of a record; `choose` takes Q of them.

    All are checked, so whether a record can be used does not depend on the draw.

    Returns:
      tokens int32 [P, L], lengths int32 [P], prompt_lengths int32 [P], loss_mask bool [P, L],
      task int32 [P]; where `spec.placed` also image_places int32 [P, M], the tokens in front of
      each picture.

    Raises:
      BadRecord: "no_label" or "too_long".
    """
    if not record.conversations:
        raise BadRecord("no_label")
    rows = [tokenize(conversation, tokenizer) for conversation in record.conversations]
    longest = max(len(row.ids) for row in rows)
    if longest > spec.max_length:
        raise BadRecord("too_long", f"{longest} tokens, data.max_length={spec.max_length}")
    arrays = _empty_text(len(rows), spec, tokenizer.pad_id)
    for number, row in enumerate(rows):
        arrays["tokens"][number, : len(row.ids)] = row.ids
        arrays["loss_mask"][number, : len(row.ids)] = row.target
        arrays["lengths"][number] = len(row.ids)
        arrays["prompt_lengths"][number] = row.prompt_length
        if spec.placed:  # More pictures than `max_images` are refused with the pictures.
            kept = row.places[: spec.max_images]
            arrays["image_places"][number, : len(kept)] = kept
        arrays["task"][number] = spec.tasks.index(record.conversations[number].task)
    return arrays


def choose(
    arrays: dict[str, np.ndarray], choice: Sequence[int], spec: Spec, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of `text_arrays` for at most Q chosen conversations; free slots stay empty."""
    if len(choice) == spec.questions:
        return {key: value[choice] for key, value in arrays.items()}
    chosen = _empty_text(spec.questions, spec, pad_id)
    for key, value in arrays.items():
        chosen[key][: len(choice)] = value[choice]
    return chosen


def _empty_text(number: int, spec: Spec, pad_id: int) -> dict[str, np.ndarray]:
    length = spec.max_length
    places = {"image_places": np.zeros((number, spec.max_images), np.int32)}
    return {
        **(places if spec.placed else {}),
        "tokens": np.full((number, length), pad_id, np.int32),
        "lengths": np.zeros(number, np.int32),
        "prompt_lengths": np.zeros(number, np.int32),
        "loss_mask": np.zeros((number, length), bool),
        "task": np.full(number, -1, np.int32),
    }


def image_arrays(record: Record, spec: Spec) -> dict[str, np.ndarray]:
    """Decoded and resized images.

    Returns:
      images uint8 [M, H, W, 3] (zeros where there is none) and image_mask bool [M].

    Raises:
      BadRecord: "too_many_images", or the reasons of `decode_image.BadImage`.
    """
    if len(record.images) > spec.max_images:
        raise BadRecord(
            "too_many_images", f"{len(record.images)}, data.max_images={spec.max_images}"
        )
    pixels = np.zeros((spec.max_images, *spec.image_size, 3), np.uint8)
    for slot, data in enumerate(record.images):
        pixels[slot] = image_ops.load(
            data,
            spec.image_size,
            mode=spec.resize,
            max_pixels=spec.max_pixels,
            max_bytes=spec.max_bytes,
        )
    return {"images": pixels, "image_mask": np.arange(spec.max_images) < len(record.images)}


def empty(spec: Spec, pad_id: int) -> dict[str, np.ndarray]:
    """An example without images and conversations; it fills up the last batch of an evaluation."""
    return _empty_text(spec.questions, spec, pad_id) | {
        "images": np.zeros((spec.max_images, *spec.image_size, 3), np.uint8),
        "image_mask": np.zeros(spec.max_images, bool),
        "index": np.int64(-1),
    }


def stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples to one batch."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
