"""Selections: which K of T tokens to keep, with K static. Pure functions.

Each returns (indices int32 [B, K], valid bool [B, K]): distinct real tokens first, then slots that
are not valid where a row has fewer than K real tokens. The order is the method's own; `fold` brings
the kept tokens into source order.
"""

import jax
import jax.numpy as jnp


def top_k(scores: jax.Array, mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best real tokens; equal scores go to the lowest index, NaN counts as the worst score.

    Args:
      scores: float32 [B, T].
      mask: bool [B, T].
      k: static, at most T.
    """
    worst = jnp.finfo(jnp.float32).min
    # Padding alone is -inf, so a real token comes first whatever its score. -0.0 is made 0.0, for
    # a sort may tell them apart.
    scores = jnp.where(jnp.isnan(scores), worst, jnp.maximum(scores, worst))
    scores = jnp.where(scores == 0, 0.0, scores)
    values, indices = jax.lax.top_k(jnp.where(mask, scores, -jnp.inf), k)
    return indices.astype(jnp.int32), values > -jnp.inf


def stride(mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """k tokens evenly spaced, in raster order, over the real tokens of each row.

    With r real tokens the j-th kept one has rank floor((j + 1/2) r / k) among them: the middles of
    k equal parts. All are kept if r <= k.

    Args:
      mask: bool [B, T].
      k: static, at most T.
    """
    real = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    slot = jnp.arange(k, dtype=jnp.int32)[None, :]
    rank = jnp.where(real > k, (2 * slot + 1) * real // (2 * k), slot)
    real_first = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    return jnp.take_along_axis(real_first, rank, axis=1), slot < real
