"""Comparing a model with what the reference implementation gave: `import --verify=io.npz`.

The file holds in/<argument> of the reference's forward pass, out/logits, out/image_features and
gen/tokens (`tests/parity/make_fixtures.py` writes it).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from efficient_vlm.errors import UserError, first_line
from efficient_vlm.families.base import Config, Family
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.placing import Prompt, place

TOLERANCE = 1e-4  # Of the largest logit of the reference.


class Inputs(NamedTuple):
    """What a forward pass of ours takes, from the arguments of the reference's.

    Attributes:
      model: at the size of these images, which are normalised already.
      pictures: of all rows; None for none.
      prompts: one for each row.
      visual: visual tokens of a row, real or not.
      place: keyword arguments of `placing.place`.
    """

    model: VisionLanguageModel
    pictures: Pictures | None
    prompts: list[Prompt]
    visual: int
    place: dict[str, Any]

    def row(self, row: int, ids: np.ndarray, length: int) -> "Inputs":
        """One row alone with other ids, of which all are prompt; text padded to `length`."""
        prompt = self.prompts[row]._replace(ids=ids, types=None)
        cut = slice(row, row + 1)
        return self._replace(
            pictures=jax.tree.map(lambda x: x[cut], self.pictures),
            prompts=[prompt],
            place={**self.place, "length": length},
        )

    def placed(self) -> ModelInputs:
        """What the model reads."""
        text = place([[prompt] for prompt in self.prompts], visual=self.visual, **self.place)
        return text.replace(pictures=self.pictures)


def read_inputs(
    family: Family, config: Config, model: VisionLanguageModel, io: Mapping[str, np.ndarray]
) -> Inputs:
    """Inputs of ours from those of the reference implementation."""
    given = {key[3:]: np.asarray(io[key]) for key in io if key.startswith("in/")}
    ids = given["input_ids"]
    mask = given.get("attention_mask", np.ones_like(ids)).astype(bool)
    rows = [row[live] for row, live in zip(ids, mask, strict=True)]
    types = [None] * len(rows)
    if "token_type_ids" in given:
        types = [t[live] for t, live in zip(given["token_type_ids"], mask, strict=True)]
    options = family.rules(config)
    if model.encoder is None or not {"pixel_values", "images"} & set(given):
        none = np.zeros(0, np.int64)
        prompts = [Prompt(r, none, types=t) for r, t in zip(rows, types, strict=True)]
        return Inputs(model, None, prompts, 0, options)
    counts = [int((row == options["image_token"]).sum()) for row in rows]
    model = model.clone(encoder={**model.encoder, "pixel_mean": 0.0, "pixel_std": 1.0})
    pictures = _pictures(model, given, counts)
    prompts = [
        Prompt(r, pictures.slots[i], pictures.grids[i], t)
        for i, (r, t) in enumerate(zip(rows, types, strict=True))
    ]
    return Inputs(pictures.model, pictures.pictures, prompts, pictures.visual, options)


class _Pictures(NamedTuple):
    model: VisionLanguageModel
    pictures: Pictures
    slots: list[np.ndarray]
    grids: list[np.ndarray | None]
    visual: int


def _pictures(model, given, counts) -> _Pictures:
    if "image_grid_thw" in given:
        return _native(model, given, counts)
    if "image_token_pooling" in given:
        return _pooled(model, given, counts)
    if "images" in given:
        return _crops(model, given)
    pixels = given["pixel_values"]
    valid = slot_mask = None
    if pixels.ndim == 5:
        mask = np.abs(pixels).reshape(*pixels.shape[:2], -1).max(axis=2) > 0
        if "pixel_attention_mask" in given:
            patch = model.encoder["patch_size"]
            cells = given["pixel_attention_mask"][:, :, ::patch, ::patch].astype(bool)
            valid = np.stack([cells.any(axis=3).sum(axis=2), cells.any(axis=2).sum(axis=2)], -1)
            valid = np.maximum(valid, 1).astype(np.int32)
            # A tile's tokens are all in the prompt, also those that read padding alone.
        images = pixels.transpose(0, 1, 3, 4, 2)
    else:
        each = _tokens_each(model, pixels.shape[2:])
        numbers = [count // each for count in counts]
        images, mask = _spread(pixels.transpose(0, 2, 3, 1), numbers)
    model = model.sized(*images.shape[-3:-1])
    each = int(np.prod(model.slot_grid))
    slots = [_real_slots(mask[i], each, count) for i, count in enumerate(counts)]
    if valid is not None:
        slot_mask = np.repeat(mask[..., None], each, axis=2)
    pictures = Pictures(images, mask, valid=valid, slot_mask=slot_mask)
    return _Pictures(model, pictures, slots, [None] * len(counts), mask.shape[1] * each)


def _real_slots(mask: np.ndarray, each: int, count: int) -> np.ndarray:
    slots = np.concatenate([np.arange(each) + i * each for i in np.flatnonzero(mask)] or [[]])
    return slots.astype(np.int64)[:count]


def _tokens_each(model: VisionLanguageModel, size) -> int:
    return int(np.prod(model.sized(*size).slot_grid))


def _spread(images: np.ndarray, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Images in a row of all rows -> [B, M, ...] with zeros where there is none, and their mask."""
    most = max(max(numbers), 1)
    out = np.zeros((len(numbers), most, *images.shape[1:]), images.dtype)
    mask = np.zeros((len(numbers), most), bool)
    start = 0
    for row, number in enumerate(numbers):
        out[row, :number] = images[start : start + number]
        mask[row, :number] = True
        start += number
    return out, mask


def _native(model, given, counts) -> _Pictures:
    """Qwen: patches of all images in blocks of 2 x 2, each (channel, frame, row, column)."""
    patch, frames = model.encoder["patch_size"], model.encoder.get("temporal_patch", 1)
    sizes = given["image_grid_thw"][:, 1:].astype(int)
    side = model.projector["side"]
    height, width = sizes.max(axis=0)
    flat, start = [], 0
    for h, w in sizes:
        x = given["pixel_values"][start : start + h * w]
        start += h * w
        x = x.reshape(h // side, w // side, side, side, 3, frames, patch, patch)
        x = x.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(frames, h * patch, w * patch, 3)
        canvas = np.zeros((frames, height * patch, width * patch, 3), x.dtype)
        canvas[:, : h * patch, : w * patch] = x
        flat.append(canvas)
    each = sizes.prod(axis=1) // side**2
    numbers, image = [], 0
    for count in counts:
        first = image
        while count > 0:
            count, image = count - each[image], image + 1
        numbers.append(image - first)
    images, mask = _spread(np.stack(flat), numbers)
    valid, _ = _spread(sizes.astype(np.int32), numbers)
    model = model.sized(height * patch, width * patch)
    slot_grid = np.array(model.slot_grid)
    slots, grids = [], []
    for row in range(len(counts)):
        own = valid[row][mask[row]] // side
        index = np.arange(slot_grid.prod()).reshape(slot_grid)
        at = [index[:h, :w].reshape(-1) + i * slot_grid.prod() for i, (h, w) in enumerate(own)]
        slots.append(np.concatenate(at) if at else np.zeros(0, np.int64))
        grids.append(own)
    pictures = Pictures(images, mask)
    if (sizes != sizes.max(axis=0)).any():
        valid = np.where(mask[..., None], valid, slot_grid * side).astype(np.int32)
        pictures = pictures.replace(valid=valid)
    return _Pictures(model, pictures, slots, grids, mask.shape[1] * int(slot_grid.prod()))


def _unpatched(x: np.ndarray, patch: int) -> np.ndarray:
    """[n, patches of a square, (row, column, channel)] -> [n, H, W, 3]."""
    side = int(round(x.shape[1] ** 0.5))
    x = x.reshape(len(x), side, side, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), side * patch, side * patch, 3)


def _crops(model, given) -> _Pictures:
    """Molmo: overlapping crops, and where in the prompt each pooled token goes."""
    pixels, index = given["images"], given["image_input_idx"]
    rows, crops = pixels.shape[:2]
    images = _unpatched(pixels.reshape(-1, *pixels.shape[2:]), model.encoder["patch_size"])
    images = images.reshape(rows, crops, *images.shape[1:])
    index = index.reshape(rows, -1)
    order = [np.argsort(row, kind="stable") for row in index]
    slots = [at[row[at] >= 0] for at, row in zip(order, index, strict=True)]
    pictures = Pictures(
        images,
        np.ones((rows, crops), bool),
        slot_mask=(index >= 0).reshape(rows, crops, -1),
        padding_share=given["image_masks"],
    )
    model = model.sized(*images.shape[2:4])
    return _Pictures(model, pictures, slots, [None] * rows, index.shape[1])


def _pooled(model, given, counts) -> _Pictures:
    """Molmo2: crops of each image, and the patches that each token reads."""
    crops = given["image_num_crops"].astype(int)
    grids = given["image_grids"].astype(int)
    tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
    images = _unpatched(given["pixel_values"], model.encoder["patch_size"])
    patches = given["pixel_values"].shape[1]
    per_row, image = [], 0
    for count in counts:
        first = image
        while count > 0:
            count, image = count - tokens[image], image + 1
        per_row.append(range(first, image))
    images, mask = _spread(images, [sum(crops[i] for i in own) for own in per_row])
    most = max(counts)
    index = np.full((len(counts), most, given["image_token_pooling"].shape[1]), -1, np.int32)
    start = before = 0
    for row, count in enumerate(counts):
        part = given["image_token_pooling"][start : start + count]
        # Theirs count the patches of the batch, ours those of a row.
        index[row, :count] = np.where(part >= 0, part - before * patches, -1)
        start, before = start + count, before + sum(crops[i] for i in per_row[row])
    model = model.sized(*images.shape[2:4])
    model = model.clone(compressor={**model.compressor, "grid": (1, most)})
    slots = [np.arange(count) for count in counts]
    pictures = Pictures(images, mask, pool_index=index)
    return _Pictures(model, pictures, slots, [None] * len(counts), most)


def logits(inputs: Inputs, params: Any) -> list[np.ndarray]:
    """Logits behind each text token of each row: float32 [text tokens, vocab]."""
    placed = inputs.placed()
    forward = jax.jit(lambda params, given: inputs.model.apply({"params": params}, given).logits)
    out = np.asarray(forward(params, placed))
    return [row[:length] for row, length in zip(out, placed.lengths, strict=True)]


def greedy(inputs: Inputs, params: Any, new_tokens: int) -> np.ndarray:
    """The likeliest continuation of each row, int [R, new_tokens], through the cache."""
    out = generate(inputs.model, params, inputs.placed(), new_tokens=new_tokens, eos_id=-1)
    return out.tokens[:, 0]


def image_features(inputs: Inputs, params: Any) -> np.ndarray:
    """What enters the decoder for each slot, in the order of the slots: [slots, width]."""

    def features(model, given):  # The model is bound to its parameters here.
        tokens, signals = model.encode(given.pictures)
        return model.compress(tokens, signals, given, model.layout(given.pictures)).embed

    model = inputs.model.clone(slot_token=None)
    embed = model.apply({"params": params}, inputs.placed(), method=features)
    return np.concatenate(
        [np.asarray(row)[p.slots] for row, p in zip(embed, inputs.prompts, strict=True)]
    )


def verify(
    family: Family,
    config: Config,
    model: VisionLanguageModel,
    params: Any,
    io: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Compares logits, image features and greedy tokens with the reference's.

    Returns:
      max_abs_error: of logits, as a share of the largest of the reference, on real rows.
      features_error: of image features, likewise; None where the file has none.
      greedy_match: whether greedy tokens are identical; None where the file has none.
      ok: whether errors are at most TOLERANCE and tokens match.

    Raises:
      UserError: the file is not of this model.
    """
    try:
        return _compare(family, config, model, params, io)
    except (KeyError, ValueError, IndexError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"--verify: the file does not fit this model ({first_line(error)})",
            fix="use the file that tests/parity/make_fixtures.py wrote for these weights",
        ) from error


def _compare(family, config, model, params, io) -> dict[str, Any]:
    for name in ("out/logits", "in/input_ids"):
        if name not in io:
            raise ValueError(f"no {name}")
    wanted, ids = np.asarray(io["out/logits"]), np.asarray(io["in/input_ids"])
    mask = np.asarray(io.get("in/attention_mask", np.ones(ids.shape))).astype(bool)
    vocabulary = model.decoder.get("head_size") or model.vocab_size
    if wanted.shape != (*ids.shape, vocabulary) or mask.shape != ids.shape:
        raise ValueError(f"out/logits has the shape {wanted.shape}")
    if not mask.any(axis=1).all():
        raise ValueError("in/attention_mask leaves nothing of a row")
    scale, error = np.abs(wanted[mask]).max(), 0.0
    if not 0 < scale < np.inf:
        raise ValueError(f"the largest of out/logits is {scale}")
    inputs = read_inputs(family, config, model, io)
    token = inputs.place["image_token"]
    for row, ours in enumerate(logits(inputs, params)):
        theirs = wanted[row][mask[row]][inputs.prompts[row].ids != token]
        ours = ours[:, : theirs.shape[1]]
        # Not max(): that would drop a NaN.
        error = float(np.maximum(error, np.abs(ours - theirs).max() / scale))
    report: dict[str, Any] = dict(max_abs_error=error, features_error=None, greedy_match=None)
    if "out/image_features" in io and inputs.pictures is not None:
        theirs = np.asarray(io["out/image_features"])
        if theirs.ndim == 4:  # Molmo gives features without a slot, too.
            theirs = theirs.reshape(len(theirs), -1, theirs.shape[-1])
            pairs = zip(theirs, inputs.prompts, strict=True)
            theirs = np.concatenate([row[prompt.slots] for row, prompt in pairs])
        theirs = theirs.reshape(-1, theirs.shape[-1])
        ours = image_features(inputs, params)[:, : theirs.shape[1]]
        if len(ours) != len(theirs):
            raise ValueError(f"{len(theirs)} image features for {len(ours)} slots")
        report["features_error"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    for row in range(len(inputs.prompts)):
        key = "gen/tokens" if row == 0 else f"gen/tokens_{row}"
        if key not in io:
            continue
        whole = np.asarray(io[key]).reshape(-1)
        count = len(inputs.prompts[row].ids)
        if len(whole) <= count:
            raise ValueError(f"{key} has {len(whole)} tokens, the prompt {count}")
        alone = inputs.row(row, whole[:count], max(len(p.ids) for p in inputs.prompts))
        ours = greedy(alone, params, len(whole) - count)[0]
        report["greedy_match"] = bool(report["greedy_match"] is not False) and bool(
            np.array_equal(ours, whole[count:])
        )
    errors = [error, report["features_error"] or 0.0]
    report["ok"] = bool(np.max(errors) <= TOLERANCE) and report["greedy_match"] is not False
    return report
