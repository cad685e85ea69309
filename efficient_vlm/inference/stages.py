"""The four programs of generation: encode, compress, prefill, decode.

They are separate because they are measured separately, and because they are shared: two compressors
with one budget use the same prefill and decode, all use the same encoder.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from efficient_vlm import sharding
from efficient_vlm.inference.sampling import (
    History,
    Sampling,
    draw,
    history,
    log_probabilities,
)
from efficient_vlm.models.cache import KVCache, constrained
from efficient_vlm.models.image_inputs import Layout, repeat_rows
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions

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
    """What drawing the next token of each row needs beside logits.

    Attributes:
      sampling: settings of B rows.
      history: which tokens came before, where a setting asks for it.
      step: int32 [B], how many tokens each row has drawn.
    """

    sampling: Sampling
    history: History | None
    step: jax.Array

    def after(self, tokens: jax.Array) -> "Draws":
        """Behind one token more of each row, int32 [B]."""
        before = self.history
        if before is not None:
            before = before.add(tokens, jnp.ones(tokens.shape, bool))
        return self.replace(history=before, step=self.step + 1)


class TokenLogprobs(NamedTuple):
    """Log-probabilities by the raw logits, of tokens and of k alternatives to each.

    Attributes:
      chosen: float32 [...], of the tokens themselves.
      ids: int32 [..., k], the likeliest tokens there, the likeliest first.
      values: float32 [..., k], theirs.
    """

    chosen: Any
    ids: Any
    values: Any


class Chosen(NamedTuple):
    """What a stage has chosen: tokens int32 [B], their log-probabilities or None, and what the next
    choice needs, or None where the likeliest token is taken."""

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
    if method.where != "encoder":
        asked = tuple(sorted(method.intermediates().items()))
        encode = (plain, method.image_grid(patches), asked)
    if method.where != "decoder":
        options = {"position_policy": method.position_policy}
        prefill = plain.with_compressor("none", count, **options)
    return Programs(encode, model, prefill, plain)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def encode_stage(model: VisionLanguageModel, grid, asked, params, images, image_mask, extras):
    options = {"grid": grid, "asked": None if asked is None else dict(asked), "extras": extras}
    return model.apply({"params": params}, images, image_mask, method="encode", **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compress_stage(
    model: VisionLanguageModel, layout: Layout, params, visual, signals, prompts, lengths, rng
):
    apply = functools.partial(model.apply, {"params": params})
    questions = prompts.shape[1]
    # Where the question does not matter, images are compressed once; each question has a random
    # draw of its own.
    each = model.selects_by_text or model.compressor["name"] == "random"
    instruction = apply(prompts, lengths, method="instruction")
    if each:
        visual, signals = repeat_rows((visual, signals), layout.images, questions)
        instruction = instruction.reshape(-1, instruction.shape[-1])
    else:
        instruction = instruction[:, 0]
    visual = apply(visual, signals, instruction, layout, rng, method="compress")
    return visual if each else repeat_rows(visual, 1, questions)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("logprobs", "cache_options"))
def prefill_stage(
    model: VisionLanguageModel,
    layout: Layout,
    new_tokens: int,
    params,
    visual,
    prompts,
    lengths,
    rng,
    placement,
    sampling: Sampling | None = None,
    seen=None,
    *,
    logprobs: int | None = None,
    cache_options: CacheOptions = CONTIGUOUS,
) -> tuple[Chosen, KVCache, tuple[jax.Array, ...]]:
    """The first token of each row; `seen` int32 [B, L] are the tokens that its history begins with,
    -1 for none."""
    rows, row_lengths = prompts.reshape(-1, prompts.shape[-1]), lengths.reshape(-1)
    logits, cache, sources = model.apply(
        {"params": params},
        visual,
        rows,
        row_lengths,
        layout,
        new_tokens=new_tokens,
        rng=rng,
        placement=placement,
        cache_options=cache_options,
        method="prefill",
    )
    draws = None
    if sampling is not None:
        before = history(seen, logits.shape[-1]) if sampling.needs_history else None
        draws = Draws(sampling, before, jnp.zeros(len(logits), jnp.int32))
    return _choose(logits, draws, logprobs), constrained(cache), sources


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4), static_argnames="logprobs")
def decode_stage(
    model: VisionLanguageModel,
    params,
    tokens,
    cache: KVCache,
    draws: Draws | None = None,
    *,
    logprobs: int | None = None,
) -> tuple[Chosen, KVCache]:
    """The token behind `tokens` int32 [B] in each row."""
    logits, cache = model.apply({"params": params}, tokens, cache, method="decode")
    draws = None if draws is None else draws.after(tokens)
    return _choose(logits, draws, logprobs), constrained(cache)


def _choose(logits: jax.Array, draws: Draws | None, logprobs: int | None) -> Chosen:
    """A token of each row of logits [B, vocab]: drawn, or the most likely one."""
    if draws is None:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tokens = draw(logits, draws.sampling, draws.history, draws.step)
    found = None
    if logprobs is not None:
        found = TokenLogprobs(*log_probabilities(logits, tokens, logprobs))
    tokens, found = sharding.replicated((tokens, found))
    return Chosen(tokens, found, draws)
