"""Arrays of our own data (`data.transforms`) -> `ModelInputs`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_vlm.models.inputs import NO_LABEL, ModelInputs, Pictures
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PADDING_SEGMENT

# A batch with image_places is of rows with one conversation each (`data.pipeline.make_spec`).


def training_inputs(
    batch: Mapping[str, np.ndarray], model: VisionLanguageModel | None = None
) -> ModelInputs:
    """Conversations with answers, those of a record packed behind one copy of its pictures.

    Args:
      batch: images uint8 [B, M, H, W, 3], image_mask bool [B, M], tokens int32 [B, Q, L], lengths
        and prompt_lengths int32 [B, Q], loss_mask bool [B, Q, L] (True at tokens to predict); where
        pictures may stand among the text (Q = 1) also image_places int32 [B, 1, M], the tokens in
        front of each.
      model: with any compressor; needed for image_places alone.

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
    pictures, placement = _pictures(batch), None
    if "image_places" in batch:
        lengths = np.minimum(batch["lengths"][:, 0], length - 1)
        placement = _placement(model, pictures, batch["image_places"][:, 0], lengths, length - 1)
    return ModelInputs(
        text=tokens[..., :-1].reshape(rows, -1),
        segments=np.where(live, number, np.int32(PADDING_SEGMENT)).reshape(rows, -1),
        pictures=pictures,
        placement=placement,
        prompt=prompt.reshape(rows, -1),
        labels=labels.reshape(rows, -1),
        questions=questions,
        longest=length - 1,
    )


def question_inputs(
    batch: Mapping[str, np.ndarray], model: VisionLanguageModel | None = None
) -> ModelInputs:
    """Questions without their answers, each a row of its own: B*Q rows, empty for empty slots.

    Args:
      batch, model: see `training_inputs`. Pictures of later turns are left out.
    """
    tokens = np.asarray(batch["tokens"])
    lengths = np.where(batch["lengths"] > 0, batch["prompt_lengths"], 0)
    text = np.where(np.arange(tokens.shape[-1]) < lengths[..., None], tokens, 0)
    text, lengths = text.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)
    pictures, placement = _pictures(batch), None
    if "image_places" in batch:
        places = batch["image_places"][:, 0]
        pictures = pictures.replace(mask=pictures.mask & (places < lengths[:, None]))
        placement = _placement(model, pictures, places, lengths, text.shape[1])
    return ModelInputs.of_rows(text, lengths, pictures=pictures, placement=placement)


def _placement(
    model: VisionLanguageModel,
    pictures: Pictures,
    places: np.ndarray,
    lengths: np.ndarray,
    size: int,
) -> Placement:
    """Places of R rows of `size` text tokens, one conversation each, in sequence.

    Args:
      model: any budget.
      pictures: R rows of M.
      places: int [R, M], text tokens in front of each picture, not falling.
      lengths: int [R], text tokens.
      size: S.
    """
    layout, mask = model.layout(pictures), np.asarray(pictures.mask)
    each = layout.rows * layout.columns
    rows, count = mask.shape
    before = np.cumsum(mask, axis=1) - mask  # Pictures in front of each picture.
    start = places + each * before
    visual = np.where(mask[..., None], start[..., None] + np.arange(each), 0).reshape(rows, -1)
    text = np.arange(size)
    behind = (mask[:, None] & (places[:, None] <= text[:, None])).sum(axis=2)
    text = np.where(text < lengths[:, None], text + each * behind, 0)
    block = np.zeros((rows, count), np.int32)
    if model.make_decoder().bidirectional_visual:
        # Pictures that follow each other see each other, as they do in front of all text.
        block = 1 + (np.diff(places, axis=1, prepend=places[:, :1]) > 0).cumsum(axis=1)
    visual, text = visual.astype(np.int32), text.astype(np.int32)
    after = (lengths + each * mask.sum(axis=1)).astype(np.int32)
    return Placement(
        visual_index=visual,
        text_index=text,
        visual_position=visual,
        text_position=text,
        visual_block=np.repeat(np.where(mask, block, 0), each, axis=1).astype(np.int32),
        text_block=np.zeros_like(text),
        next_index=after,
        next_position=after,
    )


def one_question(pixels: Any, ids: Any, length: int | None = None) -> ModelInputs:
    """One question about the pictures uint8 [M, H, W, 3], padded to `length` tokens."""
    text = np.zeros((1, max(len(ids), length or 0)), np.int32)
    text[0, : len(ids)] = ids
    pictures = Pictures(pixels[None], np.ones((1, len(pixels)), bool))
    return ModelInputs.of_rows(text, [len(ids)], pictures=pictures)


def _pictures(batch: Mapping[str, Any]) -> Pictures:
    return Pictures(batch["images"], batch["image_mask"])
