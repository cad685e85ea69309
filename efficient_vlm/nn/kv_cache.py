"""The keys and values of one layer between steps of generation: how new ones are written.

A layer keeps them as a tuple of arrays, keys first, with a row's slots on the last axis but one.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Shaped

from efficient_vlm.nn.linear import Dtype
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import CACHE_AXES, constrain

__all__ = ["LayerCache", "Slots", "empty", "fill", "write"]

# Keys and values of M slots a row.
LayerCache = tuple[Shaped[Array, "B Hkv M Dh"], ...]


@struct.dataclass
class Slots:
    """Where in the cache the new tokens of each row go; the same in all layers of a segment.

    Attributes:
      at: int32 [B, S], no slot twice in a row; a slot behind the last one writes nothing.
    """

    at: Int[Array, "B S"]


def empty(rows: int, slots: int, heads: int, dim: int, dtype: Dtype) -> LayerCache:
    """A layer's cache without a token."""
    part = jnp.zeros((rows, heads, slots, dim), dtype)
    return part, part


def fill(
    cache: LayerCache, k: Float[Array, "B S Hkv Dh"], v: Float[Array, "B S Hkv Dh"]
) -> LayerCache:
    """A cache with k and v in its first S slots."""

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(kept.dtype)
        return jax.lax.dynamic_update_slice(kept, new, (0,) * kept.ndim)

    return _constrained(put(kept, new) for kept, new in zip(cache, (k, v), strict=True))


def write(
    cache: LayerCache,
    k: Float[Array, "B S Hkv Dh"],
    v: Float[Array, "B S Hkv Dh"],
    slots: Slots,
) -> LayerCache:
    """A cache with k and v in slots of their own in each row.

    A scatter of S tokens: where the cache is donated nothing else of it is touched or copied. (A
    `dynamic_update_slice` of each row would move tokens that reach over the end to its front.)
    """

    def row(kept: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return kept.at[:, at].set(new, mode="drop", unique_indices=True)

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        return jax.vmap(row)(kept, new.swapaxes(1, 2).astype(kept.dtype), slots.at)

    return _constrained(put(kept, new) for kept, new in zip(cache, (k, v), strict=True))


def _constrained(parts) -> LayerCache:
    return tuple(constrain(part, *CACHE_AXES) for part in parts)
