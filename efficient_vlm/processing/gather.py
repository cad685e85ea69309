"""Pictures of several rows as arrays of one shape, and the model at that shape."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.pictures.base import Pictured


@dataclasses.dataclass(frozen=True)
class Room:
    """What a row has room for, so that batches of unlike rows share one program.

    Attributes:
      text: text tokens.
      images: images of all pictures together.
      size: height and width of an image in pixels.
      visual: visual tokens in the decoder, where images have unlike numbers of them; else 0, for
        all of `images`.
      pooled: whether tokens read patches of any image (`Pictured.pool_index`).
    """

    text: int
    images: int
    size: tuple[int, int] = (0, 0)
    visual: int = 0
    pooled: bool = False


def gather(
    model: VisionLanguageModel,
    pictured: Sequence[Sequence[Pictured]],
    variable: bool = False,
    room: Room | None = None,
):
    """Pictures of R rows as arrays of one shape.

    Args:
      model, pictured: see `Request`.
      variable: see `capped`.
      room: what a row is to have room for; None for what the largest needs.

    Returns:
      The model at that size; the pictures, None for none; for each row its slots and the grids of
      its images (`placing.Prompt`).
    """
    rows = len(pictured)
    nothing = [np.zeros(0, np.int64)] * rows
    most = max(sum(len(p.images) for p in row) for row in pictured)
    if room is not None:
        most = room.images
    if most == 0:
        return fitted(model, None), None, nothing, [None] * rows
    patch = model.encoder["patch_size"]
    every = [p for row in pictured for p in row]
    size = [max((p.images.shape[axis] for p in every), default=0) for axis in (1, 2)]
    if room is not None:
        _check_room(model, pictured, size, room)
        size = list(room.size)
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
    pooled = any(p.pool_index is not None for p in every) if room is None else room.pooled
    padded |= room is not None and variable and not pooled
    pictures = Pictures(images, mask, valid=valid if padded else None)
    if pooled:
        width = model.make_projector().side ** 2
        pictures, slots = _gather_pooled(patch, pictured, pictures, width, room)
        return fitted(model, pictures, variable), pictures, slots, [None] * rows
    model = fitted(model, pictures, variable)
    shares = any(p.padding_share is not None for p in every)
    if shares or (room is not None and model.padding_embedding):
        share = np.zeros((rows, most, math.prod(size) // patch**2), np.float32)
        for row, each in enumerate(pictured):
            if each:
                whole = np.concatenate([p.padding_share for p in each])
                share[row, : len(whole)] = whole
        pictures = pictures.replace(padding_share=share)
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
    # With a room the arrays that are given depend on the model alone, not on the batch.
    if padded or room is not None or any(p.slots is not None for p in every):
        has_slot = np.zeros((rows, most * grid.prod()), bool)
        for row, at in enumerate(slots):
            has_slot[row, at] = True
        pictures = pictures.replace(slot_mask=has_slot.reshape(rows, most, -1))
    return model, pictures, slots, grids


def fitted(
    model: VisionLanguageModel, pictures: Pictures | None, variable: bool = False
) -> VisionLanguageModel:
    """A model at the size of some pictures.

    Args:
      model: of any picture size.
      pictures: None for none: there is nothing to compress, which methods inside the decoder
        refuse.
      variable: see `capped`.
    """
    if pictures is None:
        return model.clone(compressor={"name": "none"})
    model = model.sized(*pictures.pixels.shape[-3:-1])
    if pictures.pool_index is None:
        model = model.with_room(pictures)
        return capped(model, math.prod(model.slot_grid), pictures.mask.shape[1], variable)
    count = pictures.pool_index.shape[1]
    model = model.clone(compressor={**model.compressor, "grid": (1, count)})
    return capped(model, count, 1, True)


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


def _check_room(model: VisionLanguageModel, pictured, size: Sequence[int], room: Room) -> None:
    images = max(sum(len(p.images) for p in row) for row in pictured)
    if images > room.images or any(a > b for a, b in zip(size, room.size, strict=True)):
        raise UserError(
            f"pictures: {images} images of {size[0]} x {size[1]} pixels in a row",
            allowed=f"up to {room.images} of {room.size[0]} x {room.size[1]}",
        )
    visual = max(sum(_kept(model, p) for p in row) for row in pictured)
    if room.visual and visual > room.visual:
        raise UserError(
            f"pictures: {visual} visual tokens in a row",
            allowed=f"up to {room.visual}",
            fix="put fewer pictures into it",
        )


def _kept(model: VisionLanguageModel, pictured: Pictured) -> int:
    """Visual tokens of a picture that may enter the decoder."""
    if pictured.pool_index is not None:
        return len(pictured.pool_index)
    counts = pictured.grids.prod(axis=1)
    inside = model.make_compressor().in_decoder
    budget = None if inside else model.compressor.get("budget")
    return int(counts.sum() if budget is None else np.minimum(counts, budget).sum())


def _gather_pooled(patch: int, pictured, pictures: Pictures, width: int, room: Room | None):
    """Pictures whose tokens read patches across crops (Molmo2), and the slots of each row."""
    patches = math.prod(side // patch for side in pictures.pixels.shape[2:4])
    counts = [sum(len(p.pool_index) for p in each) for each in pictured]
    most = max(counts) if room is None else room.visual
    index = np.full((len(pictured), most, width), -1, np.int32)
    for row, each in enumerate(pictured):
        at = start = 0
        for p in each:
            moved = np.where(p.pool_index >= 0, p.pool_index + start * patches, -1)
            index[row, at : at + len(moved), : moved.shape[1]] = moved
            at, start = at + len(moved), start + len(p.images)
    return pictures.replace(pool_index=index), [np.arange(count) for count in counts]
