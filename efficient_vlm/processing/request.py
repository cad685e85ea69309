"""Pictures and prompts of a batch as arrays of one shape."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.image_inputs import NO_EXTRAS, ImageExtras
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.pictures.base import Pictured


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts as arrays; see `VisionLanguageModel.text_logits`.

    Attributes:
      model: at the size of these pictures.
      tokens, lengths, placement: of R rows.
      images, image_mask, extras: of R rows; images None for none.
      pictured: for each row what each of its pictures became.
    """

    model: VisionLanguageModel
    tokens: np.ndarray
    lengths: np.ndarray
    placement: Placement
    images: np.ndarray | None
    image_mask: np.ndarray | None
    extras: ImageExtras
    pictured: tuple[tuple[Pictured, ...], ...]


def gather(
    model: VisionLanguageModel, pictured: Sequence[Sequence[Pictured]], variable: bool = False
):
    """Pictures of R rows as arrays of one shape.

    Args:
      model, pictured: see `Request`.
      variable: see `capped`.

    Returns:
      The model at that size; images [R, M, H, W, 3], mask [R, M] and extras; for each row its
      slots and the grids of its images (`placing.Prompt`).
    """
    rows = len(pictured)
    nothing = [np.zeros(0, np.int64)] * rows
    most = max(sum(len(p.images) for p in row) for row in pictured)
    if most == 0:  # There is nothing to compress, which methods inside the decoder refuse.
        plain = model.clone(compressor={"name": "none"})
        return plain, None, None, NO_EXTRAS, nothing, [None] * rows
    patch = model.encoder["patch_size"]
    every = [p for row in pictured for p in row]
    size = [max(p.images.shape[axis] for p in every) for axis in (1, 2)]
    model = model.sized(*size)
    if every[0].pool_index is None:
        model = capped(model, math.prod(model.slot_grid), most, variable)
    images = np.zeros((rows, most, *size, 3), np.float32)
    mask = np.zeros((rows, most), bool)
    valid = np.tile(np.array(size) // patch, (rows, most, 1)).astype(np.int32)
    for row, each in enumerate(pictured):
        at = 0
        for p in each:
            count, height, width = p.images.shape[:3]
            images[row, at : at + count, :height, :width] = p.images
            mask[row, at : at + count] = True
            valid[row, at : at + count] = p.valid
            at += count
    padded = (valid[mask] != np.array(size) // patch).any()
    extras = ImageExtras(valid=valid if padded else None)
    if every[0].pool_index is not None:
        return _gather_pooled(model, pictured, images, mask, extras)
    if every[0].padding_share is not None:
        share = np.zeros((rows, most, every[0].padding_share.shape[1]), np.float32)
        for row, each in enumerate(pictured):
            if each:
                whole = np.concatenate([p.padding_share for p in each])
                share[row, : len(whole)] = whole
        extras = extras.replace(padding_share=share)
    grid = np.array(model.slot_grid)
    index = np.arange(grid.prod()).reshape(grid)
    slots, grids = [], []
    for each in pictured:
        own, start = [np.zeros(0, np.int64)], 0
        for p in each:
            tokens = np.concatenate(
                [
                    index[:h, :w].reshape(-1) + (start + i) * grid.prod()
                    for i, (h, w) in enumerate(p.grids)
                ]
            )
            if p.slots is not None:
                tokens = p.slots + start * grid.prod()
            own.append(tokens)
            start += len(p.images)
        slots.append(np.concatenate(own))
        grids.append(np.concatenate([p.grids for p in each]) if each else None)
    if every[0].slots is not None or padded:
        has_slot = np.zeros((rows, most * grid.prod()), bool)
        for row, at in enumerate(slots):
            has_slot[row, at] = True
        extras = extras.replace(slot_mask=has_slot.reshape(rows, most, -1))
    return model, images, mask, extras, slots, grids


def capped(
    model: VisionLanguageModel, tokens: int, images: int, variable: bool
) -> VisionLanguageModel:
    """A model whose compressor keeps all tokens where it asks for more than there are.

    Args:
      model: with any compressor.
      tokens, images: tokens of an image, and most images of a prompt.
      variable: whether pictures have sizes of their own (`families.base.Family`). Else only methods
        inside the decoder meet different numbers of tokens, those of all images of a prompt.
    """
    inside = model.make_compressor().in_decoder
    if not (variable or inside):
        return model
    most = tokens * images if inside else tokens

    def fewer(value):
        if isinstance(value, (list, tuple)):
            return tuple(map(fewer, value))
        return min(value, most) if isinstance(value, int) else value

    counts = {"budget", "keep", "counts"} & set(model.compressor)
    return model.clone(
        compressor={**model.compressor, **{name: fewer(model.compressor[name]) for name in counts}}
    )


def _gather_pooled(model, pictured, images, mask, extras):
    """Pictures whose tokens read patches across crops (Molmo2)."""
    patches = math.prod(side // model.encoder["patch_size"] for side in images.shape[2:4])
    counts = [sum(len(p.pool_index) for p in each) for each in pictured]
    width = max(p.pool_index.shape[1] for each in pictured for p in each)
    index = np.full((len(pictured), max(counts), width), -1, np.int32)
    for row, each in enumerate(pictured):
        at = start = 0
        for p in each:
            moved = np.where(p.pool_index >= 0, p.pool_index + start * patches, -1)
            index[row, at : at + len(moved), : moved.shape[1]] = moved
            at, start = at + len(moved), start + len(p.images)
    model = model.clone(compressor={**model.compressor, "grid": (1, max(counts))})
    model = capped(model, max(counts), 1, True)
    slots = [np.arange(count) for count in counts]
    extras = extras.replace(pool_index=index)
    return model, images, mask, extras, slots, [None] * len(pictured)


def visual_tokens(model: VisionLanguageModel, mask: np.ndarray, extras: ImageExtras) -> int:
    """Slots of a row, real or not."""
    if extras.pool_index is not None:
        return extras.pool_index.shape[1]
    return mask.shape[1] * math.prod(model.slot_grid)


def check_tables(model: VisionLanguageModel, tokens: np.ndarray, placement: Placement) -> None:
    """JAX reads tables beyond their end without an error."""
    if tokens.max() >= model.vocab_size:
        raise UserError(
            f"prompt: token {tokens.max()}, but the model has {model.vocab_size} tokens",
            fix="take tokenizer and weights from the same release",
        )
    if model.decoder.get("position") != "learned":
        return
    positions, longest = model.decoder["max_positions"], int(placement.next_position.max())
    if longest > positions:
        raise UserError(
            f"prompt: {longest} tokens", allowed=f"up to {positions}, the positions of this model"
        )
