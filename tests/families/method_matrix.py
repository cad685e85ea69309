"""Every training-free method on every family of published models: what is run, and what cannot be.

`test_matrix.py` runs it on the files of tests/golden. Their decoders have two layers; so that a
method can cut twice, layers are repeated up to three.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import verify
from efficient_vlm.compressors import Signals, VisualTokens, reachable
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.families import architecture, load
from efficient_vlm.families.table import FAMILIES, family_of
from efficient_vlm.inference import generate
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = 3  # Of a decoder in which a method cuts twice.

# Methods with weights of their own, which a published checkpoint does not hold.
TRAINED = {
    "pixel_shuffle",
    "resampler",
    "mlp",
    "deco",
    "c_abstractor",
    "ldp",
    "ldpv2",
    "tokenpacker",
    "perceiver",
    "qformer",
    "mqt",
    "molmo_pool",
    "minicpm_merger",
    "text_topk",
    "visionselector",
}
TRAINING_FREE = tuple(name for name in METHODS if name not in TRAINED)
# Part of the plain `pytest` for every family: method -> policy.
FEW = {"stride": "reindex", "pool": "reindex", "fastv": "retain", "tome": "retain"}
FEW["encoder_cut"] = "reindex"
# Methods whose cache is compared with a pass without one; of LLaVA, all.
CACHED = {"stride", "pool", "fastv"}

# What cannot be: method -> golden model -> part of the message.
BLOCKS = "reads blocks of the whole grid"
_SIZES = "read patches across crops, or images of several sizes"
_TILED = ("idefics3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")
_CROPPED = ("molmo2", "molmo2_olmo", "molmo_olmo", "molmo_olmoe", "molmo_qwen2")
_PROJECTED = ("gemma3", "internvl", "mobilevlm", "mobilevlm_v2")
_OF_UNITS = {
    **dict.fromkeys(("mobilevlm", "mobilevlm_v2"), BLOCKS),
    **dict.fromkeys(("molmo2", "molmo2_olmo"), "read patches across crops"),
}
REFUSED: dict[str, dict[str, str]] = {
    "tome": _OF_UNITS,
    "tofu": _OF_UNITS,
    "downsample": dict.fromkeys((*_TILED, *_CROPPED), _SIZES),
    "encoder_cut": _OF_UNITS,
    "pixelprune": _OF_UNITS,
}
# Of those, what can be where all pictures, or tiles, have one size and no padding.
OF_ONE_SIZE = {"downsample": _TILED}
ONE_SIZE = ", pictures of one size"


def in_decoder(method: str, first: int | float, second: int | float, layers: int) -> dict[str, Any]:
    """Options of a method inside a decoder that keep so much behind layers 1 and 2."""
    if method in ("fastv", "dart"):
        return dict(layer=1, keep=first)
    if method == "vtw":
        return dict(layer=2)
    if method == "fitprune":
        return dict(counts=(first, *(second,) * (layers - 2)))
    if method == "feather":
        return dict(layers=(1, 2), keep=first, stride=2)
    return dict(layers=(1, 2), keep=(first, second))


class Subject:
    """A golden model with a batch of two rows: one picture, two pictures.

    A name that ends in `ONE_SIZE` has no padding in any of them.

    Attributes:
      model, params: with at least `LAYERS` decoder layers.
    """

    def __init__(self, name: str):
        directory = GOLDEN / name.removesuffix(ONE_SIZE)
        self.name, self.config = name, architecture.read_config(directory)
        self.family = family_of(self.config)
        plain = architecture.build_model(self.config)
        source = load.FamilyCheckpoint(Checkpoint.open(directory), self.family, self.config, plain)
        self.model, self.params = deepened(plain, load.stacked(source))
        with np.load(directory / "io.npz") as io:
            self.io = dict(io)
        if name.endswith(ONE_SIZE):
            self.io = of_one_size(self.io, self.family.image_token(self.config))

    @property
    def has_class_token(self) -> bool:
        return bool(self.model.encoder.get("class_token"))

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens that a compressor sees at once."""
        inputs = self.inputs(self.model)
        return inputs.model.compressor.get("grid", inputs.model.slot_grid)

    def inputs(self, model: VisionLanguageModel) -> verify.Inputs:
        """Two rows for a model with any compressor."""
        inputs = verify.read_inputs(self.family, self.config, model, self.io)
        if len(inputs.prompts) == 1:
            return without_last_crop(inputs)
        rows = slice(0, 2)
        pictures = jax.tree.map(lambda x: x[rows], inputs.pictures)
        return inputs._replace(pictures=pictures, prompts=inputs.prompts[rows])

    @functools.cached_property
    def slots(self) -> list[np.ndarray]:
        """Slots of each picture, tile or crop of each row (of all of a row where they are one)."""
        count = self.grid[0] * self.grid[1]
        prompts = self.inputs(self.model).prompts
        return [np.unique(prompt.slots // count, return_counts=True)[1] for prompt in prompts]

    def options(self, method: str, full: bool) -> dict[str, Any] | None:
        """Options of a method that keep half of the tokens, or all; None if it cannot keep all.

        Half of the real ones of the smallest picture, or row: padding is in no one's way.
        """
        if method == "none":
            return {}
        if METHODS[method].where == "decoder":
            layers = self.model.decoder["segments"][0]["layers"]
            if full:
                return None if method == "vtw" else in_decoder(method, 1.0, 1.0, layers)
            row = min(int(each.sum()) for each in self.slots)
            return in_decoder(method, row // 2, max(1, row // 4), layers)
        count = self.grid[0] * self.grid[1]
        options = {}
        if looks_at_class_token(method) and not self.has_class_token:
            options["attention"] = "column_mean"
        if method == "encoder_cut":
            options |= dict(layers=(1,))  # Of two.
        if method == "encoder_exit":
            return None if full else dict(layer=1)
        if method == "ipcv":
            if full:
                return None  # Its budget counts patches; models/test_whole_grid.py has the case.
            options |= dict(layer=1, stabilised=0)
        if method == "hiprune":
            options |= dict(middle_layer=0.5, alpha=1.0)
        if full:
            # Units of these inputs are part padding, which no processor makes.
            partly = method == "pixelprune" and self.name in ("idefics3", "smolvlm")
            return None if partly else {**options, "budget": count}
        half = (min(int(each.min()) for each in self.slots) + 1) // 2
        if method in ("tome", "tofu"):
            return {**options, "r": max(1, half // 2)}
        return {**options, "budget": next(b for b in reachable(method, self.grid) if b <= half)}

    def at(self, model: VisionLanguageModel) -> "Reading":
        """Visual tokens of a model in front of its decoder; UserError if it cannot be."""
        inputs = self.inputs(model)
        model, given = inputs.model, inputs.placed()
        layout = model.layout(given.pictures)
        programs = generate.programs_of(model, layout)
        found = generate.encode_stage(*programs.encode, self.params, given.pictures)
        text = given.replace(pictures=None)
        visual = generate.compress_stage(
            model, layout, self.params, *found, text, jax.random.key(0)
        )
        return Reading(programs.prefill, layout, self.params, visual, text)


class Reading(NamedTuple):
    """A model whose decoder is about to read visual tokens and prompts.

    Attributes:
      model, layout: static.
      visual: visual tokens.
      text: the prompts, without pictures.
    """

    model: VisionLanguageModel
    layout: Any
    params: Any
    visual: VisualTokens
    text: ModelInputs

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the last prompt token of each row."""
        lengths = self.text.lengths
        return np.arange(len(lengths)), lengths - 1

    def whole(self, follow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits behind each token of the prompts and of one token [R] more, in one pass.

        Returns:
          float32 [R, S + 1, vocab]; int32 [R, slots], which token of the last layer holds each
          slot, -1 for none.
        """
        found = _whole(self.model, self.layout, self.params, self.visual, self.text, follow)
        return tuple(map(np.asarray, found))

    def cached(self, follow: np.ndarray) -> tuple[np.ndarray, int]:
        """Logits behind the prompts and behind one token more, through the cache.

        Returns:
          float32 [R, 2, vocab]; keys of the last layer's cache that are visual tokens.
        """
        given = (self.params, self.visual, self.text, follow)
        logits, keys = _cached(self.model, self.layout, *given)
        return np.asarray(logits), keys.shape[1] - self.text.text.shape[1] - 1


def deepened(model: VisionLanguageModel, params: Any) -> tuple[VisionLanguageModel, Any]:
    """The model with its decoder layers repeated in turn until there are `LAYERS`, and those of an
    encoder of which one layer gives features (LLaVA) until two do."""
    count = model.decoder["segments"][0]["layers"]
    order = np.arange(max(count, LAYERS)) % count
    decoder = {**model.decoder, "segments": [{"layers": len(order)}]}
    if decoder.get("layer_types"):
        decoder["layer_types"] = [decoder["layer_types"][i] for i in order]
    language = {
        name: jax.tree.map(lambda x: x[order], part) if name == "layers" else part
        for name, part in params["language"].items()
    }
    model, params = model.clone(decoder=decoder), {**params, "language": language}
    if model.make_encoder().layers_run > 1:
        return model, params
    depth = model.encoder["depth"]
    order = np.arange(depth + 1) % depth
    vit = {**params["vit"], "layers": jax.tree.map(lambda x: x[order], params["vit"]["layers"])}
    return model.clone(encoder={**model.encoder, "depth": depth + 1}), {**params, "vit": vit}


def of_one_size(io: dict[str, np.ndarray], token: int) -> dict[str, np.ndarray]:
    """Inputs without padding: whole tiles, or for Qwen three pictures of 8 x 8 patches."""
    io = {key: value for key, value in io.items() if key != "in/pixel_attention_mask"}
    if "in/image_grid_thw" not in io:
        pixels = io["in/pixel_values"]
        noise = np.random.default_rng(0).standard_normal(pixels.shape).astype(pixels.dtype)
        return io | {"in/pixel_values": np.where(pixels.any((2, 3, 4), keepdims=True), noise, 0)}
    dim, side, each = io["in/pixel_values"].shape[1], 8, 16
    one, two = (
        np.concatenate([[5], *([np.full(each, token), [6]] * n), [7, 8, 9]]) for n in (1, 2)
    )
    ids = np.stack([np.pad(row, (0, len(two) - len(row))) for row in (one, two)])
    return {
        "in/input_ids": ids,
        "in/attention_mask": (ids > 0).astype(np.int64),
        "in/image_grid_thw": np.tile([1, side, side], (3, 1)),
        "in/pixel_values": np.random.default_rng(0)
        .standard_normal((3 * side * side, dim))
        .astype(np.float32),
    }


def without_last_crop(inputs: verify.Inputs) -> verify.Inputs:
    """One row, and behind it the same without the last crop of its picture."""
    pictures = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), inputs.pictures)
    mask = pictures.mask
    crops = mask.shape[1]
    each = inputs.visual // crops
    mask[1, -1] = False
    (prompt,) = inputs.prompts
    there = prompt.slots < each * (crops - 1)
    keep = np.ones(len(prompt.ids), bool)
    keep[np.flatnonzero(prompt.ids == inputs.place["image_token"])[~there]] = False
    shorter = prompt._replace(ids=prompt.ids[keep], slots=prompt.slots[there])
    return inputs._replace(
        pictures=pictures.replace(slot_mask=pictures.slot_mask & mask[..., None]),
        prompts=[prompt, shorter],
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cached(model, layout, params, visual, text, follow):
    apply = functools.partial(model.apply, {"params": params})
    first, cache, _ = apply(visual, text, layout, new_tokens=1, method="prefill")
    live = cache.segments[-1].index
    second, _ = apply(follow, cache, method="decode")
    return jnp.stack([first, second], axis=1), live


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole(model, layout, params, visual, text, follow):
    given = (visual, *appended(text, follow), text.lengths, layout)
    return model.apply({"params": params}, *given, method=without_cache)


def appended(text: ModelInputs, token):
    """Texts with one token more behind each, and their placement."""
    rows, lengths, placement = jnp.arange(len(text.text)), text.lengths, text.placement

    def put(x, value):
        x = jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
        value = jnp.asarray(value).reshape(-1, *(1,) * (x.ndim - 2))
        return x.at[rows, lengths].set(jnp.broadcast_to(value, (len(rows), *x.shape[2:])))

    return put(text.text, token), placement.replace(
        text_index=put(placement.text_index, placement.next_index),
        text_position=put(placement.text_position, placement.next_position),
        text_block=put(placement.text_block, jnp.zeros_like(lengths)),
    )


def without_cache(model, visual: VisualTokens, tokens, placement, prompt_lengths, layout):
    """Logits of texts in one pass, of which methods inside the decoder see the prompt only; and
    where the slots are in the last layer."""
    place = jnp.arange(tokens.shape[1])
    prompt = place < prompt_lengths[:, None]
    live = place <= prompt_lengths[:, None]
    behind = placement.text_index > placement.visual_index.max(axis=1, keepdims=True)
    embedded = model.language.embed(tokens)
    total = (embedded * prompt[..., None]).sum(axis=1)
    hidden, _, _, sources = model.language(
        visual,
        embedded,
        jnp.broadcast_to(place, tokens.shape),
        jnp.where(live, SHARED_SEGMENT, PADDING_SEGMENT),
        columns=layout.columns,
        signals=Signals(text=total / prompt_lengths[:, None]),
        prompt=prompt & behind,
        position_policy=model._position_policy(),
        placement=placement,
    )
    return model.language.logits(hidden), sources[-1]


def golden_models() -> list[str]:
    """Golden models that see pictures, of the families that can be loaded."""
    folders = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
    found = []
    for path in folders:
        kind = architecture.read_config(path)["model_type"]
        if kind in FAMILIES and FAMILIES[kind].image_token is not None:
            found.append(path.name)
    return found


def looks_at_class_token(method: str) -> bool:
    """Whether the attention of a CLS token is a method's default."""
    return getattr(METHODS[method], "attention", None) == "cls"
