"""The four programs of generation: encode, compress, prefill, decode.

They are separate because they are measured separately, and because they are shared: two compressors
with one budget use the same prefill and decode, all use the same encoder.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from efficient_vlm import sharding
from efficient_vlm.inference.programs import bounded_jit
from efficient_vlm.inference.sampling import (
    History,
    Sampling,
    draw,
    history,
    log_probabilities,
)
from efficient_vlm.models.cache import KVCache, constrained
from efficient_vlm.models.inputs import Layout, ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions
from efficient_vlm.nn.linear import intercepted

__all__ = [
    "Chosen",
    "Draws",
    "Programs",
    "TokenLogprobs",
    "compress_stage",
    "decode_stage",
    "encode_stage",
    "prefill_stage",
    "programs_of",
]


@struct.dataclass
class Draws:
    """State of drawing the next token of each row.

    Attributes:
      sampling: settings of B rows.
      history: earlier tokens of each row; None where no penalty needs them.
      step: int32 [B], tokens that each row has drawn so far.
    """

    sampling: Sampling
    history: History | None
    step: jax.Array

    def after(self, tokens: jax.Array) -> "Draws":
        """The state after one more token of each row, int32 [B]."""
        earlier = self.history
        if earlier is not None:
            earlier = earlier.add(tokens, jnp.ones(tokens.shape, bool))
        return self.replace(history=earlier, step=self.step + 1)


class TokenLogprobs(NamedTuple):
    """Log-probabilities by the raw logits, of the chosen tokens and of k alternatives.

    Attributes:
      chosen: float32 [...], of the chosen tokens.
      ids: int32 [..., k], the most likely tokens, the likeliest first.
      values: float32 [..., k], of these.
    """

    chosen: Any
    ids: Any
    values: Any


class Chosen(NamedTuple):
    """The choice of a stage.

    Attributes:
      tokens: int32 [B].
      logprobs: of the tokens, or None if not requested.
      draws: state for the next choice; None for greedy rows.
    """

    tokens: jax.Array
    logprobs: TokenLogprobs | None
    draws: Draws | None


class Programs(NamedTuple):
    """What decides which program of each stage runs: equal values share one.

    Attributes:
      encode: (model, patch grid of the image, signals asked for).
      compress, prefill, decode: models.
    """

    encode: tuple[VisionLanguageModel, Any, Any]
    compress: VisionLanguageModel
    prefill: VisionLanguageModel
    decode: VisionLanguageModel


def programs_of(model: VisionLanguageModel, layout: Layout) -> Programs:
    """The stages of a model, where a method does not touch one as those of the model without it.

    An encoder is the same on one grid with the same signals, prefill for tokens that come under one
    position policy, a further token behind caches of one shape in which text starts at one place.
    """
    patches = (layout.rows, layout.columns)
    count = patches[0] * patches[1]
    method, plain = model.make_compressor(), model.with_compressor("none", count)
    encode, prefill = (model, None, None), model
    if not method.in_encoder:
        asked = tuple(sorted(method.intermediates().items()))
        encode = (plain, method.image_grid(patches), asked)
    if not method.in_decoder:
        options = {"position_policy": method.position_policy}
        prefill = plain.with_compressor("none", count, **options)
    return Programs(encode, model, prefill, plain)


@bounded_jit(3)
def encode_stage(model: VisionLanguageModel, grid, asked, params, pictures):
    options = {"grid": grid, "asked": None if asked is None else dict(asked)}

    def encode(pictures):
        return model.apply({"params": params}, pictures, method="encode", **options)

    return picture_by_picture(encode, pictures, model.make_encoder())


# Below so many values of a picture's states all pictures fit a processor's cache.
_LEAST_VALUES = 1 << 18


def picture_by_picture(encode, pictures, vit):
    """`encode(pictures)`; on a CPU one large picture after another.

    What layers make of one picture stays in the processor's cache, and memory is that of one: five
    tiles of SmolVLM take .89 of the time so. Not for training: gradients, kept picture by picture,
    would take 1.3 times as long.

    Args:
      encode: what `VisualStages.encode` does.
      pictures: B rows of M.
      vit: the encoder.
    """
    patches = (side // vit.patch_size for side in pictures.pixels.shape[-3:-1])
    small = math.prod(patches) * vit.width < _LEAST_VALUES
    sharded = not jax.sharding.get_abstract_mesh().empty
    apart = pictures.pool_index is None and pictures.mask.size > 1
    if small or sharded or not apart or intercepted():
        return encode(pictures)

    def one(picture):
        found = encode(jax.tree.map(lambda x: x[None, None], picture))
        return jax.tree.map(lambda x: x[0], found)

    def in_turn(pictures):
        return jax.lax.map(one, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pictures))

    return jax.lax.platform_dependent(pictures, cpu=in_turn, default=encode)


@bounded_jit(2)
def compress_stage(
    model: VisionLanguageModel, layout: Layout, params, visual, signals, text: ModelInputs, rng
):
    given = (visual, signals, text, layout, rng)
    return model.apply({"params": params}, *given, method="compress")


@bounded_jit(3, static_argnames=("logprobs", "cache_options"))
def prefill_stage(
    model: VisionLanguageModel,
    layout: Layout,
    new_tokens: int,
    params,
    visual,
    text: ModelInputs,
    rng,
    sampling: Sampling | None = None,
    seen=None,
    *,
    logprobs: int | None = None,
    cache_options: CacheOptions = CONTIGUOUS,
) -> tuple[Chosen, KVCache, tuple[jax.Array, ...]]:
    """The first token of each row; its history begins with `seen`, int32 [B, L], -1 for none."""
    options = dict(new_tokens=new_tokens, cache_options=cache_options, rng=rng)
    logits, cache, sources = model.apply(
        {"params": params}, visual, text, layout, **options, method="prefill"
    )
    draws = None
    if sampling is not None:
        earlier = history(seen, logits.shape[-1]) if sampling.needs_history else None
        draws = Draws(sampling, earlier, jnp.zeros(len(logits), jnp.int32))
    return _choose(logits, draws, logprobs), constrained(cache), sources


@bounded_jit(1, donate=(3, 4), static_argnames="logprobs")
def decode_stage(
    model: VisionLanguageModel,
    params,
    tokens,
    cache: KVCache,
    draws: Draws | None = None,
    *,
    logprobs: int | None = None,
) -> tuple[Chosen, KVCache]:
    """The token after `tokens`, int32 [B], in each row."""
    logits, cache = model.apply({"params": params}, tokens, cache, method="decode")
    draws = None if draws is None else draws.after(tokens)
    return _choose(logits, draws, logprobs), constrained(cache)


def _choose(logits: jax.Array, draws: Draws | None, logprobs: int | None) -> Chosen:
    """A token for each row of logits [B, vocab]: drawn, or the most likely one."""
    if draws is None:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tokens = draw(logits, draws.sampling, draws.history, draws.step)
    listed = None
    if logprobs is not None:
        listed = TokenLogprobs(*log_probabilities(logits, tokens, logprobs))
    tokens, listed = sharding.replicated((tokens, listed))
    return Chosen(tokens, listed, draws)
