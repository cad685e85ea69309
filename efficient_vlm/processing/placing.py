"""Token ids with image slots among them -> text tokens and where everything stands."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.prompt_layout import Placement


class Prompt(NamedTuple):
    """One row: token ids, and what the visual tokens in its slots are.

    Attributes:
      ids: int [L], with a placeholder in each slot.
      slots: int [P], which of the row's V visual tokens stands in each slot, in order.
      grids: int [images, 2], rows and columns of visual tokens of each image, for M-RoPE; images
        follow each other in the slots.
      types: int [L], what HF calls token types, where blocks depend on them; or None.
    """

    ids: np.ndarray
    slots: np.ndarray
    grids: np.ndarray | None = None
    types: np.ndarray | None = None


def place(
    prompts: Sequence[Prompt],
    image_token: int | None,
    visual: int,
    *,
    length: int | None = None,
    blocks: str | None = None,
    block_ids: Collection[int] = (),
    positions: str = "sequence",
) -> ModelInputs:
    """Splits prompts into text and slots.

    Args:
      prompts: R rows.
      image_token: id of the placeholder; None for prompts without images.
      visual: V, visual tokens of a row, real or not.
      length: text tokens to pad to; None for the longest row.
      blocks: see `families.base.Family`; with "prefix" tokens of type 0 (all, without types).
      block_ids: ids of the tokens beside the slots that belong to images ("images").
      positions: "sequence" or "mrope".

    Returns:
      R rows of text and their placement, without pictures (NumPy).

    Raises:
      UserError: another number of slots than visual tokens for them.
    """
    rows, parts = len(prompts), []
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt.ids)
        is_slot = np.zeros(ids.shape, bool) if image_token is None else ids == image_token
        if is_slot.sum() != len(prompt.slots):
            raise UserError(
                f"prompt {row}: {is_slot.sum()} visual slots for {len(prompt.slots)} visual tokens",
                fix="one image placeholder per picture, and no special image tokens in the text",
            )
        position = np.arange(len(ids))
        if positions == "mrope":
            position = mrope_positions(is_slot, prompt.grids)
        parts.append((ids, is_slot, position, _blocks(prompt, is_slot, blocks, block_ids)))
    lengths = np.array([int((~part[1]).sum()) for part in parts], np.int32)
    longest = int(lengths.max()) if length is None else length
    axes = parts[0][2].shape[1:]
    tokens = np.zeros((rows, longest), np.int32)
    text = [np.zeros((rows, longest, *shape), np.int32) for shape in ((), axes, ())]
    seen = [np.zeros((rows, visual, *shape), np.int32) for shape in ((), axes, ())]
    after = np.zeros((2, rows), np.int32)
    for row, (ids, is_slot, position, block) in enumerate(parts):
        index = np.arange(len(ids))
        tokens[row, : lengths[row]] = ids[~is_slot]
        for target, values in zip(text, (index, position, block), strict=True):
            target[row, : lengths[row]] = values[~is_slot]
            # Padding stands behind everything.
        for target, values in zip(seen, (index, position, block), strict=True):
            target[row, prompts[row].slots] = values[is_slot]
        after[:, row] = len(ids), position.max() + 1
    placement = Placement(
        visual_index=seen[0],
        text_index=text[0],
        visual_position=seen[1],
        text_position=text[1],
        visual_block=seen[2],
        text_block=text[2],
        next_index=after[0],
        next_position=after[1],
    )
    return ModelInputs.of_rows(tokens, lengths, placement=placement)


def _blocks(
    prompt: Prompt, is_slot: np.ndarray, blocks: str | None, block_ids: Collection[int]
) -> np.ndarray:
    if blocks == "prefix":
        types = prompt.types
        return np.ones(is_slot.shape, np.int32) if types is None else (types == 0).astype(np.int32)
    if blocks == "image":
        starts = is_slot & ~np.concatenate([[False], is_slot[:-1]])
        return np.where(is_slot, np.cumsum(starts), 0)
    if blocks == "images":
        return (is_slot | np.isin(prompt.ids, list(block_ids))).astype(np.int32)
    return np.zeros(is_slot.shape, np.int32)


def mrope_positions(is_slot: np.ndarray, grids: np.ndarray | None) -> np.ndarray:
    """int [L, 3], position in time, row and column (M-RoPE, arXiv 2409.12191, section 2.1).

    Text has one position on all axes; an image stands still in time, and text behind it goes on
    from the largest position so far.

    Args:
      is_slot: bool [L].
      grids: int [images, 2], rows and columns of the visual tokens of each image.
    """
    out = np.zeros((len(is_slot), 3), np.int64)
    at, start, image = 0, 0, 0
    while at < len(is_slot):
        if not is_slot[at]:
            out[at] = start
            at, start = at + 1, start + 1
            continue
        rows, columns = grids[image]
        row, column = np.divmod(np.arange(rows * columns), columns)
        out[at : at + rows * columns] = start + np.stack([0 * row, row, column], axis=1)
        at, start, image = at + rows * columns, start + max(rows, columns), image + 1
    return out
