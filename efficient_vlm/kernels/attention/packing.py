"""Operands of attention kernels: arrays in whole blocks, lists of live blocks, numbers per token.

The numbers of a query and of a key (mask, bias, lse, delta) are stored together, 8 numbers or 32
bytes per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention.mask import K_FIELDS, Q_FIELDS, Mask, Rule, all_seen

__all__ = ["COLUMNS", "NUMBERS", "ROWS", "Packed", "Static"]

NUMBERS = 8
# The numbers of a query and of a key, in order. "weight" and "gain" are the cotangents of
# importance: their product is added to the gradient of each probability.
ROWS = (*Q_FIELDS, "lse", "delta", "weight")
COLUMNS = (*K_FIELDS, "bias", "gain")


class Static(NamedTuple):
    """The static properties that a kernel is specialised for.

    Attributes:
      rule: of the mask; None where nothing is hidden.
      biased, weighed: whether the numbers include a bias, and a weight and a gain.
      groups: query heads that share a key head.
      own: queries or keys in a block that a kernel owns.
      step: keys or queries in one step through its list.
      stages: steps whose blocks are in fast memory at the same time.
      list_rows: batch rows with their own lists; 1 if all share them.
      lines: lists per batch row, one for each owned block.
      steps: length of a list.
    """

    scale: float
    softcap: float | None
    rule: Rule | None
    biased: bool
    weighed: bool
    groups: int
    own: int
    step: int
    stages: int
    list_rows: int
    lines: int
    steps: int


class Packed:
    """Arrays and lists of one pass over the map.

    Attributes:
      lists: int32: the number of blocks of each list [lines]; how many of them, at its start, hide
        nothing [lines]; and the numbers of the blocks [lines * steps], flat.

    Args:
      by: "queries" if a kernel owns blocks of queries and loops over keys, or "keys".
      own, step: queries or keys in an owned block, and in a block of the loop.
      q, k, v, key_bias, mask, scale, softcap: see `attention`; v None where it is not needed.
      weights: float [B, N]; blocks of queries with weight 0 are in no list.
      gain: float [B, M] or None, see COLUMNS.
      stages: see Static.
      lanes: head dim -> head dim of the kernels, padded with zeros.
      dtype: of the products; None for that of q.
    """

    def __init__(
        self,
        by: str,
        own: int,
        step: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        key_bias: jax.Array | None,
        mask: Mask | None,
        scale: float,
        softcap: float | None,
        *,
        lanes: Callable[[int], int],
        weights: jax.Array | None = None,
        gain: jax.Array | None = None,
        stages: int = 2,
        dtype=None,
    ):
        self.batch, self.heads, self.count, self.dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.value_dim = 0 if v is None else v.shape[-1]
        self.lanes, self.dtype = lanes, dtype or q.dtype
        self.block_q, self.block_k = (own, step) if by == "queries" else (step, own)
        self.padded_q = tables.padded(self.count, self.block_q)
        self.padded_k = tables.padded(self.num_keys, self.block_k)
        if mask is None and (self.padded_q, self.padded_k) != (self.count, self.num_keys):
            mask = all_seen(self.count, self.num_keys)
        self.mask = None if mask is None else tables.pad_mask(mask, self.padded_q, self.padded_k)
        self.q, self.k = self.queries(q), self._whole(k, self.padded_k)
        self.v = None if v is None else self._whole(v, self.padded_k)
        self.columns = self._columns(key_bias, gain)
        live, whole = self._blocks(weights)
        if by == "keys":
            live, whole = live.swapaxes(1, 2), whole.swapaxes(1, 2)
        table, count = tables.listed(live, whole)
        whole = jnp.sum(live & whole, axis=-1, dtype=jnp.int32)
        self.lists = count.reshape(-1), whole.reshape(-1), table.reshape(-1)
        self.static = Static(
            scale=scale,
            softcap=softcap,
            rule=None if mask is None else mask.rule,
            biased=key_bias is not None,
            weighed=gain is not None,
            groups=self.heads // self.kv_heads,
            own=own,
            step=step,
            stages=stages,
            list_rows=live.shape[0],
            lines=live.shape[1],
            steps=live.shape[2],
        )

    def expected(self) -> tuple[int, int]:
        """Estimated number of live blocks per head, and of map entries in those of all heads."""
        block = self.block_q, self.block_k
        live = tables.expected_blocks(self.mask, self.count, self.num_keys, *block)
        return live, self.batch * self.heads * live * self.block_q * self.block_k

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, H, N, C] in whole blocks and lanes."""
        return self._whole(x, self.padded_q)

    def _whole(self, x, count):
        more = count - x.shape[2], self.lanes(x.shape[3]) - x.shape[3]
        return jnp.pad(x.astype(self.dtype), ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def rows(self, lse=None, delta=None, weight=None) -> jax.Array:
        """float32 [B, 1 or H, 8, N], the numbers ROWS of the queries, H with lse [B, H, N].

        Args:
          lse, delta: [B, H, N].
          weight: [B, N].
        """
        parts = dict.fromkeys(ROWS)
        if self.mask is not None:
            parts |= {name: getattr(self.mask, name) for name in Q_FIELDS}
        parts = {name: None if x is None else x[:, None] for name, x in parts.items()}
        more = self.padded_q - self.count
        for name, x, fill in (("lse", lse, jnp.inf), ("delta", delta, 0)):
            if x is not None:
                parts[name] = jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=fill)
        if weight is not None:
            parts["weight"] = jnp.pad(weight, ((0, 0), (0, more)))[:, None]
        heads = 1 if lse is None else self.heads
        return _side_by_side(parts.values(), (self.batch, heads, self.padded_q))

    def _columns(self, bias, gain):
        """float32 [B, 8, M], the numbers COLUMNS of the keys."""
        parts = dict.fromkeys(COLUMNS)
        if self.mask is not None:
            parts |= {name: getattr(self.mask, name) for name in K_FIELDS}
        for name, x in (("bias", bias), ("gain", gain)):
            if x is not None:
                parts[name] = jnp.pad(x, ((0, 0), (0, self.padded_k - self.num_keys)))
        return _side_by_side(parts.values(), (self.batch, self.padded_k))

    def _blocks(self, weights):
        """bool [B or 1, query blocks, key blocks]: which are live, and which hide nothing."""
        sizes = self.padded_q // self.block_q, self.padded_k // self.block_k
        live = whole = jnp.ones((1, *sizes), bool)
        if self.mask is not None:
            live = tables.live_blocks(self.mask, self.block_q, self.block_k)
            whole = tables.whole_blocks(self.mask, self.block_q, self.block_k)
        if weights is not None:
            live = live & tables.weighed_blocks(weights, self.padded_q, self.block_q)[..., None]
        return live, jnp.broadcast_to(whole, live.shape)


def _side_by_side(parts, shape):
    """Arrays like [..., count], or None for 0 -> float32 [..., 8, count]."""
    parts = [0.0 if x is None else x for x in parts]
    parts += [0.0] * (NUMBERS - len(parts))
    parts = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in parts]
    return jnp.stack(parts, axis=-2)
