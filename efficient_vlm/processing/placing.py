"""Token ids with image slots among them -> text tokens and where everything stands."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import NO_LABEL, ModelInputs
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT


class Prompt(NamedTuple):
    """One conversation: token ids, and what the visual tokens in its slots are.

    Attributes:
      ids: int [L], with a placeholder in each slot.
      slots: int [P], which of the row's V visual tokens stands in each slot, in order.
      grids: int [images, 2], rows and columns of visual tokens of each image, for M-RoPE; images
        follow each other in the slots.
      types: int [L], what HF calls token types, where blocks depend on them; or None.
      targets: bool [L], ids that are to be predicted (answers); None outside of training.
    """

    ids: np.ndarray
    slots: np.ndarray
    grids: np.ndarray | None = None
    types: np.ndarray | None = None
    targets: np.ndarray | None = None


class _Placed(NamedTuple):
    """A prompt of L ids, with what is known of each.

    Attributes:
      is_slot, position, block: [L]; a last axis of `position` for several position axes.
      targets: bool [L + 1].
      seen: how many ids, from the first on, are visual tokens or seen by them.
    """

    prompt: Prompt
    is_slot: np.ndarray
    position: np.ndarray
    block: np.ndarray
    targets: np.ndarray
    seen: int


def place(
    rows: Sequence[Sequence[Prompt]],
    image_token: int | None,
    visual: int,
    *,
    length: int | None = None,
    multiple: int = 1,
    blocks: str | None = None,
    block_ids: Collection[int] = (),
    positions: str = "sequence",
    apart: bool = False,
) -> ModelInputs:
    """Splits prompts into text and slots.

    Prompts of a row are about the same pictures. They are packed behind one copy of the visual
    tokens where that changes nothing: all that visual tokens see must be the same. Where it is not
    (pictures that see the whole prompt), each prompt gets a row of its own.

    Args:
      rows: B rows of prompts.
      image_token: id of the placeholder; None for prompts without images.
      visual: V, visual tokens of a row, real or not.
      length: S, text tokens of a row; None for the least multiple of `multiple`.
      multiple: see `length`.
      blocks: see `families.base.Family`; with "prefix" tokens of type 0 (without types: those in
        front of the first target).
      block_ids: ids of the tokens beside the slots that belong to images ("images").
      positions: "sequence" or "mrope".
      apart: whether the prompts of a row are about pictures of their own, whose slots are theirs
        alone. They then lie in one row whatever pictures see, as many as there are.

    Returns:
      B rows of text, or B*Q with Q prompts in the longest row (missing ones are empty), their
      placement, and labels where there are targets; without pictures. NumPy.

    Raises:
      UserError: another number of slots than visual tokens for them, or an answer that follows on
        an image.
    """
    placed, number = [], 0
    for row in rows:
        placed.append([])
        for prompt in row:
            options = (image_token, blocks, block_ids, positions)
            placed[-1].append(_placed(prompt, number, *options))
            number += 1
    questions = 1 if apart else max(map(len, placed))
    if not (apart or all(map(_packs, placed))):
        placed = [row[i : i + 1] for row in placed for i in range(questions)]
        questions = 1
    parts = [_parts_apart(row) if apart else _parts(row, questions) for row in placed]
    longest = max(sum(len(index) for *_, index in row) for row in parts)
    size = -(-longest // multiple) * multiple if length is None else length
    inputs = _arrays(parts, size, visual, axes=(3,) if positions == "mrope" else ())
    if apart:
        segment = np.zeros((len(parts), visual), np.int32)
        for row, own in enumerate(parts):
            for number, each, _ in own:
                segment[row, each.prompt.slots] = number
        inputs = inputs.replace(placement=inputs.placement.replace(visual_segment=segment))
    every = [each for row in placed for each in row]
    # Rows of one process may all be empty; they are of a batch for training nevertheless.
    if every and not any(each.prompt.targets is not None for each in every):
        inputs = inputs.replace(labels=None, prompt=None)
    if questions > 1:
        longest = max(int((~each.is_slot).sum()) for each in every)
        inputs = inputs.replace(questions=questions, longest=longest)
    return inputs


def _placed(prompt: Prompt, number: int, image_token, blocks, block_ids, positions) -> _Placed:
    ids = np.asarray(prompt.ids)
    is_slot = np.zeros(ids.shape, bool) if image_token is None else ids == image_token
    if is_slot.sum() != len(prompt.slots):
        raise UserError(
            f"prompt {number}: {is_slot.sum()} visual slots for {len(prompt.slots)} visual tokens",
            fix="one image placeholder per picture, and no special image tokens in the text",
        )
    targets = np.zeros(len(ids) + 1, bool)
    if prompt.targets is not None:
        targets[:-1] = prompt.targets
    if (targets[:-1] & np.append(True, is_slot[:-1])).any():
        raise UserError(
            f"prompt {number}: an answer follows on an image, or on nothing",
            fix="put text in front of it, such as the name of the one who answers",
        )
    position = np.arange(len(ids))
    if positions == "mrope":
        position = mrope_positions(is_slot, prompt.grids)
    block = _blocks(prompt, is_slot, blocks, block_ids)
    seen = np.flatnonzero(is_slot | (block > 0)).max(initial=-1) + 1
    return _Placed(prompt._replace(ids=ids), is_slot, position, block, targets, int(seen))


def _packs(row: Sequence[_Placed]) -> bool:
    """Whether visual tokens see the same whichever prompt follows."""
    if len(row) < 2:
        return True
    first, *others = row
    seen = first.seen
    # What is seen by all is read once, so it cannot predict the beginning of several answers.
    if any(each.seen != seen for each in others) or any(each.targets[seen] for each in row):
        return False
    return all(
        np.array_equal(first.prompt.ids[:seen], each.prompt.ids[:seen])
        and np.array_equal(first.block[:seen], each.block[:seen])
        and np.array_equal(first.targets[:seen], each.targets[:seen])
        for each in others
    )


def _parts(row: Sequence[_Placed], questions: int) -> list[tuple[int, _Placed, np.ndarray]]:
    """(segment, prompt, places in it of the text that lies there), in order of a row's text."""
    if questions == 1:
        return [(SHARED_SEGMENT, each, np.flatnonzero(~each.is_slot)) for each in row]
    shared = [
        (SHARED_SEGMENT, each, np.flatnonzero(~each.is_slot[: each.seen])) for each in row[:1]
    ]
    own = [(1 + q, each, np.arange(each.seen, len(each.is_slot))) for q, each in enumerate(row)]
    return shared + own


def _parts_apart(row: Sequence[_Placed]) -> list[tuple[int, _Placed, np.ndarray]]:
    """As `_parts`, of prompts that share nothing."""
    return [(1 + number, each, np.flatnonzero(~each.is_slot)) for number, each in enumerate(row)]


def _arrays(
    parts: Sequence[Sequence[tuple]], size: int, visual: int, axes: tuple[int, ...]
) -> ModelInputs:
    """Rows of `_parts` as arrays, with positions of these axes."""
    rows = len(parts)
    segments = np.full((rows, size), PADDING_SEGMENT, np.int32)
    tokens, labels = np.zeros((rows, size), np.int32), np.full((rows, size), NO_LABEL, np.int32)
    prompt = np.zeros((rows, size), bool)
    text = [np.zeros((rows, size, *shape), np.int32) for shape in ((), axes, ())]
    slots = [np.zeros((rows, visual, *shape), np.int32) for shape in ((), axes, ())]
    after = np.zeros((2, rows), np.int32)
    for row, own in enumerate(parts):
        start = 0
        for segment, each, index in own:
            here = slice(start, start + len(index))
            start += len(index)
            ids, targets = each.prompt.ids, each.targets
            tokens[row, here], segments[row, here] = ids[index], segment
            following = np.append(ids, 0)[index + 1]
            labels[row, here] = np.where(targets[index + 1], following, NO_LABEL)
            answer = np.flatnonzero(targets).min(initial=len(ids))
            prompt[row, here] = index < answer
            values = (np.arange(len(ids)), each.position, each.block)
            for target, value in zip(text, values, strict=True):
                target[row, here] = value[index]
            for target, value in zip(slots, values, strict=True):
                target[row, each.prompt.slots] = value[each.is_slot]
            after[:, row] = len(ids), each.position.max() + 1
    placement = Placement(
        visual_index=slots[0],
        text_index=text[0],
        visual_position=slots[1],
        text_position=text[1],
        visual_block=slots[2],
        text_block=text[2],
        next_index=after[0],
        next_position=after[1],
    )
    return ModelInputs(tokens, segments, placement=placement, prompt=prompt, labels=labels)


def _blocks(
    prompt: Prompt, is_slot: np.ndarray, blocks: str | None, block_ids: Collection[int]
) -> np.ndarray:
    if blocks == "prefix":
        if prompt.types is not None:
            return (np.asarray(prompt.types) == 0).astype(np.int32)
        answer = len(is_slot)
        if prompt.targets is not None:
            answer = np.flatnonzero(prompt.targets).min(initial=answer)
        return (np.arange(len(is_slot)) < answer).astype(np.int32)
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
