"""Kept tokens moved together once, so that every layer behind works on fewer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import checks

__all__ = ["Compacted", "compact", "keep_blocks"]


class Compacted(NamedTuple):
    """Kept tokens in order; `most` places a row, of which the first `lengths` hold one.

    Attributes:
      values: what was given, each [B, most, ...]; 0 in places without a token.
      lengths: int32 [B], for `kv_lengths` and `q_lengths`.
      key_bias: float32 [B, most], logarithm of the size of each token; 0 without one.
      positions: [B, most], the original ones, for causal masks, windows and rotary positions.
      index: int32 [B, most], where each token came from; 0 without one.
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
    """Gathers the kept tokens of each row, in order, into `most` places.

    Rows may keep different numbers of tokens: attention behind skips the blocks that hold none.

    Args:
      values: arrays [B, N, ...], as a pytree.
      keep: bool [B, N].
      most: static, places a row; kept tokens beyond that many are left out, the last ones first.
      sizes: float [B, N], how many tokens each stands for; None for 1.
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
    there = jnp.arange(most) < lengths[:, None]
    index = jnp.where(there, order, 0)

    def take(x):
        wide = (slice(None), slice(None), *(None,) * (x.ndim - 2))
        taken = jnp.take_along_axis(x, index[wide], axis=1)
        return jnp.where(there[wide], taken, jnp.zeros_like(taken))

    if sizes is None:
        key_bias = jnp.zeros((len(keep), most), jnp.float32)
    else:
        # A place without a token would have the logarithm of 0.
        key_bias = jnp.log(jnp.where(there, take(sizes.astype(jnp.float32)), 1.0))
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32), keep.shape)
    return Compacted(jax.tree.map(take, values), lengths, key_bias, take(positions), index)


def keep_blocks(scores: jax.Array, block: int, count: int) -> jax.Array:
    """The blocks of keys with the greatest scores, without moving anything.

    Given to `make_mask` as `kv_live`, attention neither fetches nor computes the other blocks
    where its own blocks lie inside theirs.

    Args:
      scores: float [B, M]; a block counts as the sum of its scores.
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
            raise UserError(f"keep_blocks: {name}={x!r}", allowed="a whole number")
    block, count = int(block), int(count)
    blocks = -(-keys // block) if block > 0 else 0
    if not 1 <= count <= blocks:
        raise UserError(
            f"keep_blocks: count={count} of blocks of {block} of {keys} keys",
            allowed=f"count from 1 to {max(blocks, 1)}, block from 1 to {keys}",
        )
    padded = jnp.pad(scores, ((0, 0), (0, blocks * block - keys)))
    total = padded.reshape(len(scores), blocks, block).sum(axis=-1)
    _, best = jax.lax.top_k(total, count)
    kept = (
        jnp.zeros((len(scores), blocks), bool).at[jnp.arange(len(scores))[:, None], best].set(True)
    )
    return jnp.repeat(kept, block, axis=1)[:, :keys]
