"""Kept tokens gathered once, so that all later layers work on fewer tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.kernels import ordering
from efficient_vlm.kernels.attention import checks

__all__ = ["Compacted", "compact", "keep_blocks"]


class Compacted(NamedTuple):
    """Kept tokens in order: `most` slots per row, of which the first `lengths` hold a token.

    Attributes:
      values: the gathered arrays, each [B, most, ...]; 0 in empty slots.
      lengths: int32 [B], for `kv_lengths` and `q_lengths`.
      key_bias: float32 [B, most], logarithm of the size of each token; 0 in empty slots.
      positions: [B, most], the original ones, for causal masks, windows and rotary positions.
      index: int32 [B, most], original index of each token; 0 in empty slots.
    """

    values: Any
    lengths: jax.Array
    key_bias: jax.Array
    positions: jax.Array
    index: jax.Array


def compact(
    values: Any,
    keep: jax.Array,
    most: int,
    *,
    sizes: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> Compacted:
    """Gathers the kept tokens of each row, in order, into `most` slots.

    Rows may keep different numbers of tokens: later attention skips the blocks that hold none.

    Args:
      values: arrays [B, N, ...], as a pytree.
      keep: bool [B, N].
      most: slots per row, static; of more kept tokens the last ones are dropped.
      sizes: float [B, N], number of original tokens in each; None for 1.
      positions: [B, N]; None for 0 .. N - 1.

    Raises:
      UserError: `most` out of range, or shapes that do not fit.
    """
    keep, sizes, positions = jnp.asarray(keep, bool), *checks.arrays(sizes, positions)
    if keep.ndim != 2 or not 1 <= most <= keep.shape[1]:
        raise UserError(
            f"compact: most={most} for keep of shape {keep.shape}",
            allowed="keep [B, N] and most from 1 to N",
        )
    for x in (*jax.tree.leaves(values), sizes, positions):
        if x is not None and x.shape[:2] != keep.shape:
            raise UserError(
                f"compact: shape {x.shape} with keep {keep.shape}", allowed="[B, N, ...]"
            )
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :most].astype(jnp.int32)
    lengths = jnp.minimum(keep.sum(axis=1, dtype=jnp.int32), most)
    filled = jnp.arange(most) < lengths[:, None]
    index = jnp.where(filled, order, 0)

    def take(x):
        wide = (slice(None), slice(None), *(None,) * (x.ndim - 2))
        taken = jnp.take_along_axis(x, index[wide], axis=1)
        return jnp.where(filled[wide], taken, jnp.zeros_like(taken))

    if sizes is None:
        key_bias = jnp.zeros((len(keep), most), jnp.float32)
    else:
        # An empty slot has size 0, whose logarithm is -inf.
        key_bias = jnp.log(jnp.where(filled, take(sizes.astype(jnp.float32)), 1.0))
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32), keep.shape)
    return Compacted(jax.tree.map(take, values), lengths, key_bias, take(positions), index)


def keep_blocks(scores: jax.Array, block: int, count: int) -> jax.Array:
    """The blocks of keys with the greatest scores, kept in place.

    With the result as `kv_live` of `make_mask`, attention neither fetches nor computes the other
    blocks, as far as blocks of its kernels lie inside them.

    Args:
      scores: float [B, M]; a block counts as the sum of its scores, and with NaN of either sign
        among them as the lowest; of equal blocks the first are kept.
      block: keys in a block; the last one may be shorter.
      count: how many blocks are kept, static.

    Returns:
      bool [B, M].

    Raises:
      UserError: `block` or `count` out of range.
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 2:
        raise UserError(f"keep_blocks: scores of shape {scores.shape}", allowed="[B, M]")
    keys = scores.shape[1]
    for name, x in (("block", block), ("count", count)):
        if not isinstance(x, int | np.integer):
            raise UserError(f"keep_blocks: {name}={short(x)}", allowed="a whole number")
    block, count = int(block), int(count)
    blocks = -(-keys // block) if block > 0 else 0
    if not 1 <= count <= blocks:
        raise UserError(
            f"keep_blocks: count={count} of blocks of {block} of {keys} keys",
            allowed=f"count from 1 to {max(blocks, 1)}, block from 1 to {keys}",
        )
    padded = jnp.pad(scores, ((0, 0), (0, blocks * block - keys)))
    total = padded.reshape(len(scores), blocks, block).sum(axis=-1)
    _, best = ordering.top_k(total, count)
    kept = (
        jnp.zeros((len(scores), blocks), bool).at[jnp.arange(len(scores))[:, None], best].set(True)
    )
    return jnp.repeat(kept, block, axis=1)[:, :keys]
