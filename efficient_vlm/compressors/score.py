"""Scores: one float32 number per token; tokens with higher scores are kept. Pure functions.

Scores ignore the mask, which `select` applies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, PRNGKeyArray

from efficient_vlm.shapes import Array


def unit(x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
    """x / |x| over the last axis, in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def min_max(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Scores shifted and scaled to 0..1 over the real tokens of each row.

    A row of equal scores (within 1e-6) becomes ones; padding becomes 0.
    """
    low = jnp.min(jnp.where(mask, x, jnp.inf), axis=1, keepdims=True)
    high = jnp.max(jnp.where(mask, x, -jnp.inf), axis=1, keepdims=True)
    spread = high - low
    scaled = jnp.where(spread > 1e-6, (x - low) / jnp.where(spread > 1e-6, spread, 1.0), 1.0)
    return jnp.where(mask, scaled, 0.0)


def random(rng: PRNGKeyArray, shape: tuple[int, int]) -> Float32[Array, "B T"]:
    """Uniform scores: their top K are a uniform draw without replacement."""
    return jax.random.uniform(rng, shape, jnp.float32)


def text_relevance(
    query: Float[Array, "B heads d"], keys: Float[Array, "B T heads d"]
) -> Float[Array, "B T"]:
    """Relevance of each token to the instruction, by scaled dot products.

    One head gives <q, k> / sqrt(d). Several heads give their soft maximum, log mean exp, because
    the mean of their dot products would be a single dot product again.

    Args:
      query: float32 [B, heads, d].
      keys: float32 [B, T, heads, d].
    """
    heads, depth = query.shape[-2:]
    scores = jnp.einsum("bhd,bthd->bth", query, keys) / jnp.sqrt(jnp.float32(depth))
    if heads == 1:
        return scores[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - jnp.log(jnp.float32(heads))
