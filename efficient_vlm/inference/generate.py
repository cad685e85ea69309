"""Greedy generation: encode once per image, compress, prefill, then decode token by token."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.models.vlm import VisionLanguageModel, repeat_rows


def make_generate(
    model: VisionLanguageModel, *, new_tokens: int, eos_id: int
) -> Callable[..., tuple[jax.Array, VisualTokens]]:
    """A jitted greedy generator for one model, that is for one compressor at one budget.

    Args:
      model: the model; its parameters are an argument of the result.
      new_tokens: the most tokens to generate per prompt.
      eos_id: the token that ends an answer; everything behind it is `eos_id` too.

    Returns:
      f(params, images [B, M, H, W, 3], image_mask [B, M], prompts int32 [B, Q, P],
      lengths int32 [B, Q], rng) -> (tokens int32 [B, Q, new_tokens], the visual tokens of each
      question with a leading axis B*Q).
    """

    @jax.jit
    def generate(params, images, image_mask, prompts, lengths, rng=None):
        questions = prompts.shape[1]
        apply = functools.partial(model.apply, {"params": params})
        layout = model.layout(images)
        visual, signals = apply(images, image_mask, method="encode")
        visual, signals = repeat_rows((visual, signals), layout.images, questions)
        rows, row_lengths = prompts.reshape(-1, prompts.shape[-1]), lengths.reshape(-1)
        instruction = apply(rows, row_lengths, method="instruction")
        visual = apply(visual, signals, instruction, layout, rng, method="compress")
        logits, cache = apply(
            visual, rows, row_lengths, layout, new_tokens=new_tokens, rng=rng, method="prefill"
        )
        tokens = decode_greedily(apply, logits, cache, new_tokens, eos_id)
        return tokens.reshape(*prompts.shape[:2], new_tokens), visual

    return generate


def decode_greedily(
    apply: Callable[..., Any], logits: jax.Array, cache: Any, new_tokens: int, eos_id: int
) -> jax.Array:
    """The most likely token at each step, from the logits behind the prompt: int32 [R, new]."""

    def choose(logits, done):
        token = jnp.where(done, eos_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return token, done | (token == eos_id)

    def body(carry, _):
        token, done, cache = carry
        logits, cache = apply(token, cache, method="decode")
        token, done = choose(logits, done)
        return (token, done, cache), token

    first, done = choose(logits, jnp.zeros(logits.shape[0], bool))
    _, rest = jax.lax.scan(body, (first, done, cache), length=new_tokens - 1)
    return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
