"""Pictures and prompts of a published family as arrays of one shape."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.pictures.base import Pictured
from efficient_vlm.processing.placing import Prompt, place


@dataclasses.dataclass(frozen=True)
class Example:
    """Conversations about the same pictures.

    Attributes:
      ids: token ids of Q conversations, each with a placeholder for every visual token.
      pictured: the pictures, in their order in every conversation.
      targets: bool, which of those ids are to be predicted; None outside of training.
    """

    ids: Sequence[Sequence[int]]
    pictured: Sequence[Pictured] = ()
    targets: Sequence[Sequence[bool]] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of conversations as arrays.

    Attributes:
      model: at the size of these pictures.
      inputs: NumPy.
      pictured: for each row of pictures what each of them became.
    """

    model: VisionLanguageModel
    inputs: ModelInputs
    pictured: tuple[tuple[Pictured, ...], ...]


def make_request(
    model: VisionLanguageModel,
    examples: Sequence[Example],
    rules: Mapping[str, Any],
    *,
    variable: bool = False,
    multiple: int = 1,
) -> Request:
    """Arrays of examples of a published family.

    Args:
      model: of any picture size.
      examples: a row of pictures each; see `placing.place` for the rows of text.
      rules: of the family, see `Family.rules`.
      variable: see `capped`.
      multiple: of which the number of text tokens of a row is to be a multiple.

    Raises:
      UserError: a conversation without text, slots that are not those of the pictures, or token
        ids or positions that the model does not have.
    """
    pictured = tuple(tuple(example.pictured) for example in examples)
    model, pictures, slots, grids = gather(model, pictured, variable)
    rows = []
    for example, own, grid in zip(examples, slots, grids, strict=True):
        targets = [None] * len(example.ids) if example.targets is None else example.targets
        pairs = zip(example.ids, targets, strict=True)
        rows.append([Prompt(np.asarray(ids), own, grid, targets=t) for ids, t in pairs])
        if any(len(prompt.ids) == len(own) for prompt in rows[-1]):
            raise UserError("prompt: no text", fix="ask something about the picture")
    if pictures is None:
        rules = {**rules, "image_token": None}
    visual = math.prod(model.layout(pictures))
    inputs = place(rows, visual=visual, multiple=multiple, **rules)
    check_tables(model, inputs)
    # Of methods inside the decoder alone, as programs are compiled for either.
    uneven = any(len(own) != visual for own in slots) and model.make_compressor().in_decoder
    return Request(model, inputs.replace(pictures=pictures, uneven=uneven), pictured)


def gather(
    model: VisionLanguageModel, pictured: Sequence[Sequence[Pictured]], variable: bool = False
):
    """Pictures of R rows as arrays of one shape.

    Args:
      model, pictured: see `Request`.
      variable: see `capped`.

    Returns:
      The model at that size; the pictures, None for none; for each row its slots and the grids of
      its images (`placing.Prompt`).
    """
    rows = len(pictured)
    nothing = [np.zeros(0, np.int64)] * rows
    most = max(sum(len(p.images) for p in row) for row in pictured)
    if most == 0:
        return fitted(model, None), None, nothing, [None] * rows
    patch = model.encoder["patch_size"]
    every = [p for row in pictured for p in row]
    size = [max(p.images.shape[axis] for p in every) for axis in (1, 2)]
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
    pictures = Pictures(images, mask, valid=valid if padded else None)
    if every[0].pool_index is not None:
        pictures, slots = _gather_pooled(patch, pictured, pictures)
        return fitted(model, pictures, variable), pictures, slots, [None] * rows
    model = fitted(model, pictures, variable)
    if every[0].padding_share is not None:
        share = np.zeros((rows, most, every[0].padding_share.shape[1]), np.float32)
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
    if every[0].slots is not None or padded:
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


def _gather_pooled(patch: int, pictured, pictures: Pictures):
    """Pictures whose tokens read patches across crops (Molmo2), and the slots of each row."""
    patches = math.prod(side // patch for side in pictures.pixels.shape[2:4])
    counts = [sum(len(p.pool_index) for p in each) for each in pictured]
    width = max(p.pool_index.shape[1] for each in pictured for p in each)
    index = np.full((len(pictured), max(counts), width), -1, np.int32)
    for row, each in enumerate(pictured):
        at = start = 0
        for p in each:
            moved = np.where(p.pool_index >= 0, p.pool_index + start * patches, -1)
            index[row, at : at + len(moved), : moved.shape[1]] = moved
            at, start = at + len(moved), start + len(p.images)
    return pictures.replace(pool_index=index), [np.arange(count) for count in counts]


def check_tables(model: VisionLanguageModel, inputs: ModelInputs) -> None:
    """JAX reads tables beyond their end without an error."""
    if inputs.text.max() >= model.vocab_size:
        raise UserError(
            f"prompt: token {inputs.text.max()}, but the model has {model.vocab_size} tokens",
            fix="take tokenizer and weights from the same release",
        )
    if model.decoder.get("position") != "learned":
        return
    positions, longest = model.decoder["max_positions"], int(inputs.placement.next_position.max())
    if longest > positions:
        raise UserError(
            f"prompt: {longest} tokens", allowed=f"up to {positions}, the positions of this model"
        )
