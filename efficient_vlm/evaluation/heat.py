"""Where every patch went, and the numbers behind it: the heat map beside a token map.

A method shows the signal that it ranks patches by where it has one of its own, and otherwise what
it did with them: decoder layers that a patch lives through, patches that its token stands for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from efficient_vlm import sharding
from efficient_vlm.inference.programs import bounded_jit
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.variants import tokens_of_image
from efficient_vlm.models.vlm import VisionLanguageModel

_WHOSE = {
    "cls_row": "attention from CLS",
    "cls_row_full": "attention from CLS",
    "mean_query_row": "attention from the mean query",
    "column_mean": "attention from all patches",
}

LAYERS = "decoder layers it lives through"


class Heat(NamedTuple):
    """One number per patch, float [N] (NaN: none), and what it is."""

    scores: np.ndarray
    meaning: str


class Counts(NamedTuple):
    """Real tokens, and patches by what became of them.

    Attributes:
      tokens: that hold any patch.
      kept: patches with a token of their own.
      merged: patches that share a token.
      merged_into: tokens that hold several patches.
      dropped: patches that no token holds.
    """

    tokens: int
    kept: int
    merged: int
    merged_into: int
    dropped: int


def counts(source: np.ndarray) -> Counts:
    """Counts of int [N], for every patch the token that holds it, -1 for none."""
    source = np.asarray(source).reshape(-1)
    sizes = np.bincount(source[source >= 0])
    sizes = sizes[sizes > 0]
    several = sizes[sizes > 1]
    kept, merged = int((sizes == 1).sum()), int(several.sum())
    return Counts(sizes.size, kept, merged, several.size, int((source < 0).sum()))


def where_ended(sources: Sequence[np.ndarray]) -> np.ndarray:
    """Where the patches are in the last decoder run that still holds any of them.

    vtw and v2drop end with none: their last layers say nothing about which patches mattered.

    Args:
      sources: for each run of decoder layers, int [N]; a row of `Generated.sources`.
    """
    held = [source for source in map(np.asarray, sources) if (source >= 0).any()]
    return held[-1] if held else np.asarray(sources[0])


def layers_survived(layers: Sequence[int], sources: Sequence[np.ndarray]) -> np.ndarray:
    """float [N], decoder layers in which a patch is in some token.

    Args:
      layers: of each run.
      sources: for each run, int [N].
    """
    return sum(n * (np.asarray(s) >= 0).astype(float) for n, s in zip(layers, sources, strict=True))


def token_sizes(source: np.ndarray) -> np.ndarray | None:
    """float [N], patches in the token of each patch, NaN if dropped; None if all are alike."""
    source = np.asarray(source).reshape(-1)
    sizes = np.bincount(source[source >= 0], minlength=1)
    if np.unique(sizes[sizes > 0]).size < 2:
        return None
    return np.where(source >= 0, sizes[np.maximum(source, 0)], np.nan)


def heat(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    sources: Sequence[np.ndarray],
) -> Heat | None:
    """The heat map of one question under one method; None for a method without any number.

    Args:
      model: at one setting.
      params: its parameters.
      inputs: the question, one row, and its pictures.
      sources: for each run of decoder layers, int [N]; a row of `Generated.sources`.
    """
    method = model.make_compressor()
    asked = method.intermediates()
    if method.between and "attention_row" in asked:
        plain = model.clone(compressor={"name": "none"})
        row = _row(plain, asked["attention_row"], params, inputs.pictures)
        return Heat(np.asarray(row, float).reshape(-1), attention_meaning(asked["attention_row"]))
    if method.text_scores:
        scores = _relevance(model, params, inputs)
        return Heat(np.asarray(scores, float).reshape(-1), "relevance to the question")
    if any(not np.array_equal(source, sources[0]) for source in sources[1:]):
        layout = model.layout(inputs.pictures)
        entering = layout.images * tokens_of_image(model, layout.rows * layout.columns)
        runs = model.make_decoder().runs(entering)
        survived = layers_survived([run.stop - run.start for run in runs], sources)
        return Heat(survived, LAYERS)
    return merged(sources[0])


def merged(source: np.ndarray) -> Heat | None:
    """The heat map of a method that merges; None if its tokens are all of one size."""
    sizes = token_sizes(source)
    return None if sizes is None else Heat(sizes, "patches in its token")


def attention_meaning(intermediate: str) -> str:
    """What an attention row is, from its "name/layer"."""
    name, _, layer = intermediate.partition("/")
    return f"{_WHOSE[name]}, layer {layer}"


@bounded_jit(2)
def _row(plain: VisionLanguageModel, asked: str, params, pictures):
    """float32 [M, N] of the model without a method: those that read the same row share this."""
    row = {"attention_row": asked}
    _, signals = plain.apply({"params": params}, pictures, asked=row, method="encode")
    return sharding.replicated(signals.attention_row)


@bounded_jit(1)
def _relevance(model: VisionLanguageModel, params, inputs: ModelInputs):
    def scores(model):
        tokens, _ = model.encode(inputs.pictures)
        text = jnp.repeat(model.instruction(inputs), inputs.pictures.mask.shape[1], axis=0)
        return model.reduce.scores(tokens, text)

    return sharding.replicated(model.apply({"params": params}, method=scores))
