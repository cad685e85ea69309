"""Arrays of our own benchmark (`data.transforms`) -> `ModelInputs`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_vlm.models.inputs import NO_LABEL, ModelInputs, Pictures
from efficient_vlm.nn.attention import PADDING_SEGMENT


def training_inputs(batch: Mapping[str, np.ndarray]) -> ModelInputs:
    """Conversations with answers, those of a record packed behind one copy of its pictures.

    Args:
      batch: images uint8 [B, M, H, W, 3], image_mask bool [B, M], tokens int32 [B, Q, L], lengths
        and prompt_lengths int32 [B, Q], loss_mask bool [B, Q, L] (True at tokens to predict).

    Returns:
      B rows of Q*(L-1) tokens: the last of a conversation is only ever predicted.
    """
    tokens, target = np.asarray(batch["tokens"]), np.asarray(batch["loss_mask"])
    rows, questions, length = tokens.shape
    place = np.arange(length - 1)
    live = place < np.asarray(batch["lengths"])[..., None]
    prompt = live & (place < np.asarray(batch["prompt_lengths"])[..., None])
    number = np.arange(1, questions + 1, dtype=np.int32)[:, None]
    labels = np.where(target[..., 1:], tokens[..., 1:], np.int32(NO_LABEL))
    return ModelInputs(
        text=tokens[..., :-1].reshape(rows, -1),
        segments=np.where(live, number, np.int32(PADDING_SEGMENT)).reshape(rows, -1),
        pictures=_pictures(batch),
        prompt=prompt.reshape(rows, -1),
        labels=labels.reshape(rows, -1),
        questions=questions,
        longest=length - 1,
    )


def question_inputs(batch: Mapping[str, np.ndarray]) -> ModelInputs:
    """Questions without their answers, each a row of its own: B*Q rows, empty for empty slots."""
    tokens = np.asarray(batch["tokens"])
    lengths = np.where(batch["lengths"] > 0, batch["prompt_lengths"], 0)
    text = np.where(np.arange(tokens.shape[-1]) < lengths[..., None], tokens, 0)
    text = text.reshape(-1, tokens.shape[-1])
    return ModelInputs.of_rows(text, lengths.reshape(-1), pictures=_pictures(batch))


def one_question(pixels: Any, ids: Any, length: int | None = None) -> ModelInputs:
    """One question about the pictures uint8 [M, H, W, 3], padded to `length` tokens."""
    text = np.zeros((1, max(len(ids), length or 0)), np.int32)
    text[0, : len(ids)] = ids
    pictures = Pictures(pixels[None], np.ones((1, len(pixels)), bool))
    return ModelInputs.of_rows(text, [len(ids)], pictures=pictures)


def _pictures(batch: Mapping[str, Any]) -> Pictures:
    return Pictures(batch["images"], batch["image_mask"])
