"""Batches of unlike sizes below each other, as one `ModelInputs`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import NO_LABEL, Layout, ModelInputs, Pictures
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PADDING_SEGMENT


def concatenate(model: VisionLanguageModel, parts: Sequence[ModelInputs]) -> ModelInputs:
    """The rows of all parts, padded to the longest text and the largest pictures of any.

    Each row is read as in its own part. The result is for the model at the size of its pictures,
    see `request.fitted`.

    Args:
      model: of any picture size.
      parts: NumPy, of any numbers of rows, tokens, pictures and pixels.

    Raises:
      UserError: parts of which some have what others lack (a placement, a pool index, frames), that
        differ in the rows of text for a row of pictures, or unlike pictures without a placement.
    """
    layouts = [model.layout(part.pictures) for part in parts]
    _check(model, parts, layouts)
    layout = Layout(*(max(sizes) for sizes in zip(*layouts, strict=True)))
    length = max(part.text.shape[1] for part in parts)
    rows = [_texts(part, old, layout, length) for part, old in zip(parts, layouts, strict=True)]
    questions = max(part.questions for part in parts)
    longest = max(part.longest or part.text.shape[1] for part in parts)
    return ModelInputs(
        text=_below(rows, "text"),
        segments=_below(rows, "segments"),
        pictures=_pictures(model, parts, layouts, layout),
        placement=_placements([row.placement for row in rows]),
        prompt=_below(rows, "prompt", keep=any(p.prompt is not None for p in parts)),
        labels=_below(rows, "labels", keep=any(p.labels is not None for p in parts)),
        questions=questions,
        longest=longest if questions > 1 else None,
        uneven=model.make_compressor().in_decoder
        and (len(set(layouts)) > 1 or any(part.uneven for part in parts)),
    )


def _below(parts: Sequence[Any], name: str, keep: bool = True) -> np.ndarray | None:
    return np.concatenate([getattr(part, name) for part in parts]) if keep else None


def _check(model, parts: Sequence[ModelInputs], layouts: Sequence[Layout]) -> None:
    pictured = [part.pictures for part in parts if part.pictures is not None]
    facts = {
        "placement": [part.placement is not None for part in parts],
        "pictures.pool_index": [pictures.pool_index is not None for pictures in pictured],
        "pictures.pixels, frames": [pictures.pixels.ndim == 6 for pictures in pictured],
    }
    for name, given in facts.items():
        if any(given) and not all(given):
            raise UserError(
                f"inputs.{name}: {sum(given)} of {len(given)} parts have them",
                allowed="all parts, or none",
                fix="make all parts by the same function",
            )
    repeats = {len(part.text) // part.picture_rows for part in parts if part.pictures is not None}
    if len(repeats) > 1:
        raise UserError(
            f"inputs: parts with {sorted(repeats)} rows of text for one of pictures",
            allowed="the same number in all parts",
        )
    sizes = {pictures.pixels.shape[-3:-1] for pictures in pictured}
    if (len(sizes) > 1 or len(set(layouts)) > 1) and parts[0].placement is None:
        raise UserError(
            "inputs.pictures: unlike pictures without a placement",
            fix="give a placement: without one, positions of text depend on the size of pictures",
        )
    if len(sizes) > 1 and model.make_encoder().class_feature:
        raise UserError(
            "inputs.pictures: of several sizes, but features of this model include a CLS token",
            fix="resize the pictures as the model's image processor does",
        )


def _grown(x: np.ndarray, old: Sequence[int], new: Sequence[int], fill: Any = 0) -> np.ndarray:
    """[R, prod(old), ...] -> [R, prod(new), ...]: each axis padded at its end."""
    rest = x.shape[2:]
    x = x.reshape(len(x), *old, *rest)
    more = [(0, b - a) for a, b in zip(old, new, strict=True)]
    x = np.pad(x, [(0, 0), *more, *[(0, 0)] * len(rest)], constant_values=fill)
    return x.reshape(len(x), math.prod(new), *rest)


def _texts(part: ModelInputs, old: Layout, layout: Layout, length: int) -> ModelInputs:
    """A part with everything that it may have, texts of one length, and slots of all pictures."""

    def longer(x: np.ndarray, fill: Any = 0) -> np.ndarray:
        return _grown(x, x.shape[1:2], (length,), fill)

    prompt = part.live if part.prompt is None else part.prompt
    labels = np.full_like(part.text, NO_LABEL) if part.labels is None else part.labels
    placement = part.placement
    if placement is not None:
        arrays = {
            name: longer(x) if name.startswith("text") else _grown(x, old, layout)
            for name, x in vars(placement).items()
            if not (name.startswith("next") or x is None)
        }
        placement = placement.replace(**arrays)
    return part.replace(
        text=longer(part.text),
        segments=longer(part.segments, PADDING_SEGMENT),
        prompt=longer(prompt, False),
        labels=longer(labels, NO_LABEL),
        placement=placement,
    )


def _placements(parts: Sequence[Placement | None]) -> Placement | None:
    if parts[0] is None:
        return None
    given = {name for name, value in vars(parts[0]).items() if value is not None}
    return Placement(**{name: _below(parts, name) for name in given})


def _pictures(model, parts: Sequence[ModelInputs], layouts, layout: Layout) -> Pictures | None:
    pictured = [part.pictures for part in parts if part.pictures is not None]
    if not pictured:
        return None
    repeats = next(len(p.text) // p.picture_rows for p in parts if p.pictures is not None)
    shapes = [p.pixels.shape[1:] for p in pictured]
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    dtypes = {p.pixels.dtype for p in pictured}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    names = ("valid", "slot_mask", "padding_share", "pool_index")
    kept = {name for name in names if any(getattr(p, name) is not None for p in pictured)}
    if len({shape[-3:] for shape in shapes}) > 1:
        kept.add("valid")
    width = max(p.pool_index.shape[2] for p in pictured) if "pool_index" in kept else 0
    patch = model.make_encoder().patch_size
    whole = []
    for part, old in zip(parts, layouts, strict=True):
        own = part.pictures
        if own is None:  # Rows of no pictures.
            rows = len(part.text) // repeats
            index = np.zeros((rows, 0, width), np.int32) if width else None
            none = np.zeros((rows, 0, *shape[1:]), dtype), np.zeros((rows, 0), bool)
            own = Pictures(*none, pool_index=index)
        whole.append(_picture_rows(own, patch, old, layout, shape, dtype, kept, width))
    return Pictures(
        _below(whole, "pixels"),
        _below(whole, "mask"),
        **{name: _below(whole, name, keep=name in kept) for name in names},
    )


def _picture_rows(own: Pictures, patch: int, old, layout, shape, dtype, kept, width) -> Pictures:
    """Pictures of one part at the shape of all, with the arrays that are `kept`."""
    (rows, count), pixels = own.mask.shape, own.pixels
    if pixels.dtype != dtype:
        pixels = pixels.astype(dtype) / 255
    more = [(0, new - size) for new, size in zip(shape, pixels.shape[1:], strict=True)]
    sides = [side // patch for side in pixels.shape[-3:-1]]
    whole = [side // patch for side in shape[-3:-1]]
    valid, slots, share, index = own.valid, own.slot_mask, own.padding_share, own.pool_index
    if valid is None:
        valid = np.broadcast_to(np.int32(sides), (rows, count, 2))
    if "slot_mask" in kept:
        slots = _read_patches(valid, sides, old) if slots is None else slots
        slots = _grown(slots.reshape(rows, -1), old, layout, False).reshape(rows, shape[0], -1)
    if "padding_share" in kept:
        share = np.ones((rows, count, sides[0] * sides[1]), np.float32) if share is None else share
        grids = (count, *sides), (shape[0], *whole)
        share = _grown(share.reshape(rows, -1), *grids, 1.0).reshape(rows, shape[0], -1)
    if "pool_index" in kept:
        image, place = np.divmod(index, sides[0] * sides[1])
        moved = (image * whole[0] + place // sides[1]) * whole[1] + place % sides[1]
        longer = (0, layout.columns - index.shape[1]), (0, width - index.shape[2])
        moved = np.where(index < 0, -1, moved).astype(np.int32)
        index = np.pad(moved, ((0, 0), *longer), constant_values=-1)
    missing = np.broadcast_to(np.int32(whole), (rows, shape[0] - count, 2))
    return Pictures(
        pixels=np.pad(pixels, [(0, 0), *more]),
        mask=np.pad(own.mask, ((0, 0), (0, shape[0] - count))),
        valid=np.concatenate([valid, missing], axis=1),
        slot_mask=slots,
        padding_share=share,
        pool_index=index,
    )


def _read_patches(valid: np.ndarray, sides: Sequence[int], old: Layout) -> np.ndarray:
    """bool [B, M, tokens], tokens that read a real patch, of int [B, M, 2] patches of each."""
    inside = []
    for axis, cells in enumerate((old.rows, old.columns)):
        side = max(1, sides[axis] // cells)
        inside.append(np.arange(cells) * side < valid[..., axis, None])
    both = inside[0][..., :, None] & inside[1][..., None, :]
    return both.reshape(*valid.shape[:2], old.rows * old.columns)
