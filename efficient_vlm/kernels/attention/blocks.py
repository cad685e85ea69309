"""Which blocks of a map have visible keys, from O(N + M) data; kernels skip all others."""

import jax
import jax.numpy as jnp

from efficient_vlm.kernels.attention.mask import SHARED, Mask

__all__ = [
    "expected_blocks",
    "listed",
    "live_blocks",
    "pad_mask",
    "padded",
    "weighed_blocks",
    "whole_blocks",
]


def padded(count: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-count // block) * block


def pad_mask(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask of arrays that are padded to more queries and keys."""

    def pad(x, count, value):
        if x is None:
            return None
        return jnp.pad(x, ((0, 0), (0, count - x.shape[1])), constant_values=value)

    return mask.replace(
        high=pad(mask.high, queries, -jnp.inf),
        low=pad(mask.low, queries, 0),
        q_segment=pad(mask.q_segment, queries, -1),
        q_block=pad(mask.q_block, queries, -1),
        position=pad(mask.position, keys, jnp.inf),
        near=pad(mask.near, keys, 0),
        kv_segment=pad(mask.kv_segment, keys, -3),
        kv_block=pad(mask.kv_block, keys, -2),
    )


def expected_blocks(mask: Mask | None, queries: int, keys: int, block_q: int, block_k: int) -> int:
    """Estimated number of `live_blocks` of a map: tokens in order, no padding.

    The real number depends on the data. Only causality is known statically, with the last query at
    the last key: blocks that windows, segments and padding skip are counted.

    Args:
      mask: of the call.
      queries, keys: of the map, before they are padded.
      block_q, block_k: of a block.
    """
    blocks_q, blocks_k = padded(queries, block_q) // block_q, padded(keys, block_k) // block_k
    if mask is None or not mask.causal:
        return blocks_q * blocks_k
    ends = (min((i + 1) * block_q, queries) + keys - queries for i in range(blocks_q))
    return sum(padded(max(0, end), block_k) // block_k for end in ends)


def live_blocks(mask: Mask, block_q: int, block_k: int) -> jax.Array:
    """bool [B, N / block_q, M / block_k]: False only where no query sees any key.

    Lengths must be multiples of the blocks (`pad_mask`). A True block may still be empty, because
    bounds of positions and segments are compared, not pairs of tokens.
    """
    q = _Bounds(mask.high > -jnp.inf, block_q)
    k = _Bounds(mask.position < jnp.inf, block_k)
    seen = _pair(q.max(mask.high), k.min(mask.position), lambda high, at: at <= high)
    same = False
    if mask.q_block is not None:
        # Tokens outside of blocks have negative numbers, which must not enter the bounds.
        same = _overlap(q, k, mask.q_block, mask.kv_block, mask.q_block >= 0, mask.kv_block >= 0)
        seen |= same
    if mask.low is not None:
        near = _pair(q.min(mask.low), k.max(mask.near), lambda low, at: at > low)
        seen &= (near | same) if mask.spares else near
    if mask.q_segment is not None:
        unshared = mask.kv_segment != SHARED
        shared = k.any(~unshared)[:, None]
        seen &= shared | _overlap(q, k, mask.q_segment, mask.kv_segment, True, unshared)
    return seen & _pair(q.any(True), k.any(True), lambda a, b: a & b)


def whole_blocks(mask: Mask, block_q: int, block_k: int) -> jax.Array:
    """bool, as `live_blocks`: True only where every query sees every key."""
    q, k = _Bounds(None, block_q), _Bounds(None, block_k)
    seen = _pair(q.min(mask.high), k.max(mask.position), lambda high, at: at <= high)
    if mask.low is not None:
        seen &= _pair(q.max(mask.low), k.min(mask.near), lambda low, at: at > low)
    if mask.q_segment is not None:
        shared = k.max(mask.kv_segment) == SHARED  # No other segment is lower.
        one = _pair(q.min(mask.q_segment), k.max(mask.kv_segment), lambda a, b: a == b)
        two = _pair(q.max(mask.q_segment), k.min(mask.kv_segment), lambda a, b: a == b)
        seen &= shared[:, None] | (one & two)
    return seen


def weighed_blocks(weights: jax.Array, queries: int, block_q: int) -> jax.Array:
    """bool [B, blocks]: those with a query of positive weight; weights [B, N], padded `queries`."""
    weighs = jnp.pad(weights > 0, ((0, 0), (0, queries - weights.shape[1])))
    return weighs.reshape(len(weights), -1, block_q).any(axis=-1)


def listed(live: jax.Array, first: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The live blocks of each row, packed to the front; those in `first` before the others.

    Returns:
      int32 like `live`: the numbers of the live blocks in order, then the last one repeated (a
      kernel does not fetch the same block twice in a row); int32 [B, rows], their number.
    """
    count = jnp.sum(live, axis=-1, dtype=jnp.int32)
    rank = 2 * ~live + (0 if first is None else ~first)
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.maximum(count - 1, 0)[..., None]
    slots = jnp.minimum(jnp.arange(live.shape[-1], dtype=jnp.int32), last)
    return jnp.take_along_axis(order, slots, axis=-1), count


class _Bounds:
    """Least and greatest value of each block, over tokens that are not padding."""

    def __init__(self, real, block: int):
        self.real, self.block = real, block

    def _split(self, x, among, fill):
        real = self.real if among is True or among is None else self.real & among
        if real is not None:
            x = jnp.where(real, x, fill)
        return x.reshape(x.shape[0], -1, self.block)

    def min(self, x, among=True):
        return self._split(x, among, _top(x)).min(axis=-1)

    def max(self, x, among=True):
        return self._split(x, among, -_top(x)).max(axis=-1)

    def any(self, x):
        x = jnp.broadcast_to(x, self.real.shape) & self.real
        return x.reshape(x.shape[0], -1, self.block).any(axis=-1)


def _top(x):
    # The minimum of an empty block is the greatest value, so that comparisons with it are False.
    return jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(jnp.int32).max


def _pair(q, k, compare):
    return compare(q[:, :, None], k[:, None, :])


def _overlap(q, k, one, two, among_q, among_k):
    start = _pair(q.min(one, among_q), k.max(two, among_k), lambda a, b: a <= b)
    return start & _pair(q.max(one, among_q), k.min(two, among_k), lambda a, b: b <= a)
