"""How a call of attention becomes blocks on a Hopper GPU: padding, lists, numbers of tokens."""

from typing import NamedTuple

import jax.numpy as jnp

from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention.mask import Mask, all_seen

WARPGROUPS = 2  # That compute; a third one fetches.
ROWS = 64  # Of the map that one warpgroup holds: those of one wgmma.
OWN = WARPGROUPS * ROWS  # Queries, or keys, of one thread block.
NUMBERS = 8  # Of a token, side by side.
# Which of the numbers of a query, and of a key, is which.
HIGH, LOW, SEGMENT, BLOCK, LSE, DELTA, WEIGHT = range(7)
POSITION, NEAR, KEY_SEGMENT, KEY_BLOCK, BIAS, GAIN = range(6)
LOG2E = 1.4426950408889634


class Static(NamedTuple):
    """What a kernel is specialised for."""

    scale: float
    softcap: float | None
    masked: bool
    windowed: bool
    segmented: bool
    blocked: bool
    spares: bool
    biased: bool
    weighed: bool  # Whether the cotangent of importance is among the numbers.
    step: int  # Keys, or queries, of one step of the pipeline.
    lines: int  # Lists of a batch row.
    steps: int  # Places of a list.
    list_rows: int  # Batch rows of the lists; 1 where all rows share them.
    groups: int


class Call:
    """One pass over the map: arrays in whole blocks and lists of the blocks that hold anything.

    Args:
      by: "queries" where a thread block owns queries and goes through keys, else "keys".
      step: keys, or queries, that it goes through at a time.
    """

    def __init__(
        self, by, step, q, k, v, key_bias, mask: Mask | None, scale, softcap, weights=None
    ):
        self.batch, self.heads, self.count, self.dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.by, self.step = by, step
        self.block_q, self.block_k = (OWN, step) if by == "queries" else (step, OWN)
        self.padded_q = tables.padded(self.count, self.block_q)
        self.padded_k = tables.padded(self.num_keys, self.block_k)
        if mask is None and (self.padded_q, self.padded_k) != (self.count, self.num_keys):
            mask = all_seen(self.count, self.num_keys)
        self.mask = None if mask is None else tables.pad_mask(mask, self.padded_q, self.padded_k)
        self.q, self.k = self.queries(q), self._keys(k)
        self.v = None if v is None else self._keys(v)
        self.key_bias, self.scale, self.softcap = key_bias, scale, softcap
        self.lists, self.list_rows, self.lines, self.steps = self._lists(weights)

    def static(self, weighed: bool = False) -> Static:
        """For the kernel."""
        mask = self.mask
        return Static(
            scale=self.scale,
            softcap=self.softcap,
            masked=mask is not None,
            windowed=mask is not None and mask.low is not None,
            segmented=mask is not None and mask.q_segment is not None,
            blocked=mask is not None and mask.q_block is not None,
            spares=mask is not None and mask.spares,
            biased=self.key_bias is not None,
            weighed=weighed,
            step=self.step,
            lines=self.lines,
            steps=self.steps,
            list_rows=self.list_rows,
            groups=self.groups,
        )

    def queries(self, x):
        """[B, H, N, C] -> whole blocks, and C in whole swizzles of 64."""
        more = self.padded_q - self.count, tables.padded(x.shape[-1], 64) - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def _keys(self, x):
        more = self.padded_k - self.num_keys, tables.padded(x.shape[-1], 64) - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def rows(self, lse=None, delta=None, weight=None):
        """float32 [B, 1 or H, 8, N]: the numbers of the queries; lse in base 2."""
        mask, parts = self.mask, [None] * NUMBERS
        if mask is not None:
            parts[HIGH], parts[LOW] = mask.high, mask.low
            parts[SEGMENT], parts[BLOCK] = mask.q_segment, mask.q_block
        parts = [None if x is None else x[:, None] for x in parts]
        more = ((0, 0), (0, 0), (0, self.padded_q - self.count))
        if lse is not None:
            parts[LSE] = jnp.pad(lse * LOG2E, more, constant_values=jnp.inf)
        if delta is not None:
            parts[DELTA] = jnp.pad(delta, more)
        if weight is not None:
            parts[WEIGHT] = jnp.pad(weight, more)
        return _packed(parts, (self.batch, 1 if lse is None else self.heads, self.padded_q))

    def columns(self, gain=None):
        """float32 [B, 8, M]: the numbers of the keys."""
        mask, parts = self.mask, [None] * NUMBERS
        if mask is not None:
            parts[POSITION], parts[NEAR] = mask.position, mask.near
            parts[KEY_SEGMENT], parts[KEY_BLOCK] = mask.kv_segment, mask.kv_block
        more = ((0, 0), (0, self.padded_k - self.num_keys))
        if self.key_bias is not None:
            parts[BIAS] = jnp.pad(self.key_bias, more)
        if gain is not None:
            parts[GAIN] = jnp.pad(gain, more)
        return _packed(parts, (self.batch, self.padded_k))

    def _lists(self, weights):
        """(counts [lines], table [lines * steps]), batch rows, lines of a row, places of a list."""
        sizes = (self.padded_q // self.block_q, self.padded_k // self.block_k)
        live = jnp.ones((1, *sizes), bool)
        if self.mask is not None:
            live = tables.live_blocks(self.mask, self.block_q, self.block_k)
        if weights is not None:
            weighs = jnp.pad(weights > 0, ((0, 0), (0, self.padded_q - self.count)))
            weighs = weighs.reshape(self.batch, sizes[0], self.block_q).any(axis=-1)
            live = live & weighs[..., None]
        if self.by == "keys":
            live = live.swapaxes(1, 2)
        table, count = tables.listed(live)
        # An empty list goes through one block, of which the mask hides everything.
        count = jnp.maximum(count, 1)
        return (count.reshape(-1), table.reshape(-1)), *live.shape


def _packed(parts, shape):
    """Numbers of each token side by side: [..., count] -> float32 [..., 8, count]."""
    parts = [
        jnp.zeros(shape, jnp.float32)
        if x is None
        else jnp.broadcast_to(x, shape).astype(jnp.float32)
        for x in parts
    ]
    return jnp.stack(parts, axis=-2)
