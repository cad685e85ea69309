"""Pictures and prompts of a published family as arrays of one shape."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.gather import Room, gather
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
    soft: int = 0,
) -> Request:
    """Arrays of examples of a published family.

    Args:
      model: of any picture size.
      examples: a row of pictures each; see `placing.place` for the rows of text.
      rules: of the family, see `Family.rules`.
      variable: see `capped`.
      multiple: of which the number of text tokens of a row is to be a multiple.
      soft: learned tokens that the model has behind its vocabulary (`adapt.prompts.soft_ids`).

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
    check_tables(model, inputs, soft)
    # Of methods inside the decoder alone, as programs are compiled for either.
    uneven = any(len(own) != visual for own in slots) and model.make_compressor().in_decoder
    return Request(model, inputs.replace(pictures=pictures, uneven=uneven), pictured)


def pack_request(
    model: VisionLanguageModel,
    packs: Sequence[Sequence[Example]],
    rules: Mapping[str, Any],
    room: Room,
    *,
    variable: bool = False,
    soft: int = 0,
) -> Request:
    """Arrays of rows of a given size, each with any number of unrelated examples.

    Every example sees its own pictures and itself, and what it makes of them is what it would alone
    (`Placement.visual_segment`). Compressors must treat each picture by itself: see `packs`.

    Args:
      model, rules, variable, soft: see `make_request`.
      packs: R rows of examples, each of one conversation; a row may be empty.
      room: of a row.

    Raises:
      UserError: see `make_request`; and examples that the room does not hold.
    """
    pictured = tuple(tuple(p for example in pack for p in example.pictured) for pack in packs)
    model, pictures, slots, grids = gather(model, pictured, variable, room)
    token, rows = rules["image_token"] if room.images else None, []
    for pack, own, grid in zip(packs, slots, grids, strict=True):
        rows.append([])
        slot = image = 0
        for example in pack:
            (ids,) = map(np.asarray, example.ids)
            targets = None if example.targets is None else example.targets[0]
            count = 0 if token is None else int((ids == token).sum())
            if count == len(ids):
                raise UserError("prompt: no text", fix="ask something about the picture")
            images = sum(len(p.images) for p in example.pictured)
            its = None if grid is None else grid[image : image + images]
            rows[-1].append(Prompt(ids, own[slot : slot + count], its, targets=targets))
            slot, image = slot + count, image + images
    longest = max(sum(len(p.ids) - len(p.slots) for p in row) for row in rows)
    if longest > room.text:
        raise UserError(f"prompt: {longest} text tokens in a row", allowed=f"up to {room.text}")
    visual = math.prod(model.layout(pictures))
    given = dict(visual=visual, length=room.text, apart=True)
    inputs = place(rows, **given, **{**rules, "image_token": token})
    check_tables(model, inputs, soft)
    fields = dict(pictures=pictures, uneven=model.make_compressor().in_decoder)
    if room.visual and not room.pooled:
        fields["visual_room"] = room.visual
    return Request(model, inputs.replace(**fields), pictured)


def packs(model: VisionLanguageModel, pooled: bool = False) -> bool:
    """Whether unrelated examples may share a row of this model: its compressor looks at one picture
    at a time.

    Args:
      model: with any compressor.
      pooled: whether tokens read patches of all pictures of a row (`Pictured.pool_index`).
    """
    method = model.make_compressor()
    alone = model.selects_by_text or method.in_decoder
    return not alone and not (pooled and model.compressor["name"] != "none")


def check_tables(model: VisionLanguageModel, inputs: ModelInputs, soft: int = 0) -> None:
    """JAX reads tables beyond their end without an error."""
    if inputs.text.max() >= model.vocab_size + soft:
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
