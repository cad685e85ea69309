"""Which blocks of a mask hold anything: what kernels leave out, from O(N + M) data."""

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
    """The mask of longer arrays, whose added queries and keys are not there."""

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
    """How many `live_blocks` a map has if tokens are in order and none is padding: for estimates.

    Which they are is in the data. Causality alone is known before, with the last query at the last
    key: what windows, segments and padding leave out is not taken off.

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

    Lengths are multiples of the blocks (`pad_mask`). A True block may still be empty: bounds of
    positions and of segments are compared, not each pair.
    """
    q = _Bounds(mask.high > -jnp.inf, block_q)
    k = _Bounds(mask.position < jnp.inf, block_k)
    seen = _pair(q.max(mask.high), k.min(mask.position), lambda high, at: at <= high)
    same = False
    if mask.q_block is not None:
        # Numbers of no block are negative, and no bound of a block's.
        same = _overlap(q, k, mask.q_block, mask.kv_block, mask.q_block >= 0, mask.kv_block >= 0)
        seen |= same
    if mask.low is not None:
        near = _pair(q.min(mask.low), k.max(mask.near), lambda low, at: at > low)
        seen &= (near | same) if mask.spares else near
    if mask.q_segment is not None:
        own = mask.kv_segment != SHARED
        shared = k.any(~own)[:, None]
        seen &= shared | _overlap(q, k, mask.q_segment, mask.kv_segment, True, own)
    return seen & _pair(q.any(True), k.any(True), lambda a, b: a & b)


def whole_blocks(mask: Mask, block_q: int, block_k: int) -> jax.Array:
    """bool, as `live_blocks`: True only where every query sees every key."""
    q, k = _Bounds(None, block_q), _Bounds(None, block_k)
    seen = _pair(q.min(mask.high), k.max(mask.position), lambda high, at: at <= high)
    if mask.low is not None:
        seen &= _pair(q.max(mask.low), k.min(mask.near), lambda low, at: at > low)
    if mask.q_segment is not None:
        shared = k.max(mask.kv_segment) == SHARED  # Those of others are not below it.
        one = _pair(q.min(mask.q_segment), k.max(mask.kv_segment), lambda a, b: a == b)
        two = _pair(q.max(mask.q_segment), k.min(mask.kv_segment), lambda a, b: a == b)
        seen &= shared[:, None] | (one & two)
    return seen


def weighed_blocks(weights: jax.Array, queries: int, block_q: int) -> jax.Array:
    """bool [B, blocks], which hold a row of any weight; weights [B, N], `queries` with padding."""
    weighs = jnp.pad(weights > 0, ((0, 0), (0, queries - weights.shape[1])))
    return weighs.reshape(len(weights), -1, block_q).any(axis=-1)


def listed(live: jax.Array, first: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The live blocks of each row, packed to the front; those that are `first` before others.

    Returns:
      int32 like `live`: the numbers of the live blocks in order, then the last of them again (a
      kernel that asks for the same block twice does not fetch it twice); int32 [B, rows], how many
      there are.
    """
    count = jnp.sum(live, axis=-1, dtype=jnp.int32)
    rank = 2 * ~live + (0 if first is None else ~first)
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.maximum(count - 1, 0)[..., None]
    place = jnp.minimum(jnp.arange(live.shape[-1], dtype=jnp.int32), last)
    return jnp.take_along_axis(order, place, axis=-1), count


class _Bounds:
    """Least and greatest value of each block, among what is there."""

    def __init__(self, there, block: int):
        self.there, self.block = there, block

    def _split(self, x, among, fill):
        there = self.there if among is True or among is None else self.there & among
        if there is not None:
            x = jnp.where(there, x, fill)
        return x.reshape(x.shape[0], -1, self.block)

    def min(self, x, among=True):
        return self._split(x, among, _top(x)).min(axis=-1)

    def max(self, x, among=True):
        return self._split(x, among, -_top(x)).max(axis=-1)

    def any(self, x):
        x = jnp.broadcast_to(x, self.there.shape) & self.there
        return x.reshape(x.shape[0], -1, self.block).any(axis=-1)


def _top(x):
    # Comparisons of an empty block's bounds come out as "nothing": its minimum is the greatest.
    return jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(jnp.int32).max


def _pair(q, k, compare):
    return compare(q[:, :, None], k[:, None, :])


def _overlap(q, k, one, two, among_q, among_k):
    start = _pair(q.min(one, among_q), k.max(two, among_k), lambda a, b: a <= b)
    return start & _pair(q.max(one, among_q), k.min(two, among_k), lambda a, b: b <= a)
