"""Keys and values of one layer between steps of generation.

They are a tuple of arrays, keys first, with the slots of a row on the second to last axis.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Shaped

from efficient_vlm.nn.linear import Dtype
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import CACHE_AXES, constrain

__all__ = ["LayerCache", "Slots", "empty", "fill", "write"]

# Keys and values of M slots per row.
LayerCache = tuple[Shaped[Array, "B Hkv M Dh"], ...]


@struct.dataclass
class Slots:
    """Slots of the cache for the new tokens of each row; the same in all layers of a segment.

    Attributes:
      at: int32 [B, S], distinct within a row; tokens with slots past the end are not written.
    """

    at: Int[Array, "B S"]


def empty(rows: int, slots: int, heads: int, dim: int, dtype: Dtype) -> LayerCache:
    """An empty cache of one layer."""
    part = jnp.zeros((rows, heads, slots, dim), dtype)
    return part, part


def fill(
    cache: LayerCache, k: Float[Array, "B S Hkv Dh"], v: Float[Array, "B S Hkv Dh"]
) -> LayerCache:
    """A cache with k and v in its first S slots."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(old.dtype)
        return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

    return _constrained(put(old, new) for old, new in zip(cache, (k, v), strict=True))


def write(
    cache: LayerCache,
    k: Float[Array, "B S Hkv Dh"],
    v: Float[Array, "B S Hkv Dh"],
    slots: Slots,
) -> LayerCache:
    """A cache with k and v written to the given slots of each row.

    A scatter of S tokens, which leaves the rest of a donated cache in place. (A
    `dynamic_update_slice` of each row would shift tokens that reach past the end.)
    """

    def row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return old.at[:, at].set(new, mode="drop", unique_indices=True)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.vmap(row)(old, new.swapaxes(1, 2).astype(old.dtype), slots.at)

    return _constrained(put(old, new) for old, new in zip(cache, (k, v), strict=True))


def _constrained(parts) -> LayerCache:
    return tuple(constrain(part, *CACHE_AXES) for part in parts)
