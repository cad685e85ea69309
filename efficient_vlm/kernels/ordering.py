"""The one door of every selection: how scores are ordered where comparing floats leaves it open.

XLA's `top_k` orders floats by their bits: 0.0 comes before -0.0, and the sign of a NaN decides
whether it is first or last. `argmax` takes the first NaN, `argsort` puts all of them last. Here, in
all functions: -0.0 equals 0.0; NaN of either sign equals the lowest score, as -inf does; equal
scores keep the order of their indices; what a mask leaves out comes after everything else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.shapes import Array

__all__ = ["best", "by_group", "comparable", "order", "ranks", "top_k"]


def comparable(
    scores: Float[Array, "*batch T"], mask: Bool[Array, "*#batch T"] | None = None
) -> Float[Array, "*batch T"]:
    """Scores that any comparison orders alike: no NaN, no -0.0, -inf only where `mask` is False."""
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(jnp.isnan(scores), lowest, jnp.maximum(scores, lowest))
    scores = jnp.where(scores == 0, 0.0, scores)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def top_k(
    scores: Float[Array, "*batch T"], k: int, mask: Bool[Array, "*#batch T"] | None = None
) -> tuple[Float[Array, "*batch K"], Int[Array, "*batch K"]]:
    """The k highest scores of the last axis, as `comparable` has them, and their int32 indices."""
    values, indices = jax.lax.top_k(comparable(scores, mask), k)
    return values, indices.astype(jnp.int32)


def best(
    scores: Float[Array, "*batch T"], mask: Bool[Array, "*#batch T"] | None = None, axis: int = -1
) -> Int[Array, "..."]:
    """The index of the highest score along an axis, int32."""
    return jnp.argmax(comparable(scores, mask), axis=axis).astype(jnp.int32)


def order(
    scores: Float[Array, "*batch T"], mask: Bool[Array, "*#batch T"] | None = None
) -> Int[Array, "*batch T"]:
    """Indices of the last axis from the highest score to the lowest, int32."""
    return jnp.argsort(-comparable(scores, mask), axis=-1, stable=True).astype(jnp.int32)


def ranks(
    scores: Float[Array, "*batch T"], mask: Bool[Array, "*#batch T"] | None = None
) -> Int[Array, "*batch T"]:
    """For each score how many come before it in `order`, int32."""
    return jnp.argsort(order(scores, mask), axis=-1).astype(jnp.int32)


def by_group(
    group: Int[Array, "B T"], scores: Float[Array, "B T"], tie: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Indices by rising group, then falling score, then rising `tie` (or index), int32."""
    index = jnp.broadcast_to(jnp.arange(group.shape[1], dtype=jnp.int32), group.shape)
    keys = (group, -comparable(scores), index if tie is None else tie)
    return jax.lax.sort((*keys, index), num_keys=3)[-1]
