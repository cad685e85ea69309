"""How a call of attention becomes a grid of blocks on a TPU: padding, lists, index maps."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention.mask import Mask, all_seen
from efficient_vlm.kernels.attention.tpu_blocks import block_sizes, lane_dim, vmem_bytes

LANES = 128
_ROWS = 8  # Numbers of a token side by side, 32 bytes: a whole tile.
# Which of the numbers of a query, and of a key, is which.
HIGH, LOW, SEGMENT, BLOCK, LSE, DELTA = range(6)
POSITION, NEAR, KEY_SEGMENT, KEY_BLOCK, BIAS = range(5)


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
    blocks_q: int
    blocks_k: int
    list_rows: int  # Batch rows of the lists; 1 where all rows share them.
    inner_heads: int  # Heads of queries that one block of keys meets.

    def line_of_queries(self):
        """The list of this block of queries."""
        return self._row() * self.blocks_q + pl.program_id(2)

    def line_of_keys(self):
        """The list of this block of keys."""
        return self._row() * self.blocks_k + pl.program_id(2)

    def _row(self):
        return pl.program_id(0) if self.list_rows > 1 else 0


class Call:
    """One pass over the map: arrays in whole blocks, lists of live blocks, and the grid."""

    def __init__(self, name, q, k, v, key_bias, mask: Mask | None, scale, softcap, weights=None):
        self.name, self.given = name, q
        self.batch, self.heads, self.count, self.dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.value_dim = None if v is None else v.shape[-1]
        # No matrix unit takes float16.
        self.dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
        self.wide = lane_dim(max(self.dim, self.value_dim or 0))
        self.block_q, self.block_k = block_sizes(name, self.count, self.num_keys, self.wide)
        self.vmem = vmem_bytes(
            name, self.block_q, self.block_k, self.wide, jnp.dtype(self.dtype).itemsize
        )
        self.padded_q = tables.padded(self.count, self.block_q)
        self.padded_k = tables.padded(self.num_keys, self.block_k)
        if mask is None and (self.padded_q, self.padded_k) != (self.count, self.num_keys):
            mask = all_seen(self.count, self.num_keys)
        self.mask = None if mask is None else tables.pad_mask(mask, self.padded_q, self.padded_k)
        self.q, self.k = self.queries(q, self.dim), self._keys(k)
        self.v = None if v is None else self._keys(v)
        self.key_bias = key_bias
        self.blocks = (self.padded_q // self.block_q, self.padded_k // self.block_k)
        self.live, self.whole = self._blocks(weights)
        self.static = Static(
            scale=scale,
            softcap=softcap,
            masked=mask is not None,
            windowed=mask is not None and mask.low is not None,
            segmented=mask is not None and mask.q_segment is not None,
            blocked=mask is not None and mask.q_block is not None,
            spares=mask is not None and mask.spares,
            biased=key_bias is not None,
            blocks_q=self.blocks[0],
            blocks_k=self.blocks[1],
            list_rows=len(self.live),
            inner_heads=self.heads if name == "importance" else self.groups,
        )

    def queries(self, x, dim: int):
        """[B, H, N, dim] -> whole blocks of queries and whole lanes."""
        more = self.padded_q - self.count, lane_dim(dim) - x.shape[-1]
        x = x.astype(self.dtype)
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def _keys(self, x):
        more = self.padded_k - self.num_keys, lane_dim(x.shape[-1]) - x.shape[-1]
        x = x.astype(self.dtype)
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def back(self, x, dim: int):
        """The other way, for queries."""
        return x[:, :, : self.count, :dim]

    def rows(self, lse=None, delta=None):
        """float32 [B, 1 or H, 8, N]: the numbers of the queries."""
        mask, parts = self.mask, [None] * _ROWS
        if mask is not None:
            parts[HIGH], parts[LOW] = mask.high, mask.low
            parts[SEGMENT], parts[BLOCK] = mask.q_segment, mask.q_block
        parts = [None if x is None else x[:, None] for x in parts]
        more = self.padded_q - self.count
        if lse is not None:
            parts[LSE] = jnp.pad(lse, ((0, 0), (0, 0), (0, more)), constant_values=jnp.inf)
        if delta is not None:
            parts[DELTA] = jnp.pad(delta, ((0, 0), (0, 0), (0, more)))
        heads = 1 if lse is None else self.heads
        return _packed(parts, (self.batch, heads, self.padded_q))

    def columns(self):
        """float32 [B, 8, M]: the numbers of the keys."""
        mask, parts = self.mask, [None] * _ROWS
        if mask is not None:
            parts[POSITION], parts[NEAR] = mask.position, mask.near
            parts[KEY_SEGMENT], parts[KEY_BLOCK] = mask.kv_segment, mask.kv_block
        if self.key_bias is not None:
            more = self.padded_k - self.num_keys
            parts[BIAS] = jnp.pad(self.key_bias, ((0, 0), (0, more)))
        return _packed(parts, (self.batch, self.padded_k))

    def _blocks(self, weights):
        """bool [B or 1, *blocks]: which hold anything, and which are whole."""
        live = jnp.ones((1, *self.blocks), bool)
        whole = live
        if self.mask is not None:
            live = tables.live_blocks(self.mask, self.block_q, self.block_k)
            whole = tables.whole_blocks(self.mask, self.block_q, self.block_k)
        if weights is not None:
            weighs = jnp.pad(weights > 0, ((0, 0), (0, self.padded_q - self.count)))
            weighs = weighs.reshape(self.batch, self.blocks[0], self.block_q).any(axis=-1)
            live = live & weighs[..., None]
        return live, jnp.broadcast_to(whole, live.shape)

    def by_queries(self, ins, outs, scratch):
        """(grid spec, lists) of a kernel that goes through the keys of each block of queries."""
        lists = self._lists(self.live, self.whole)
        grid = (self.batch, self.heads, *self.blocks)
        steps, own = self.blocks[1], self.static.list_rows > 1

        def at(b, h, i, t, counts, table, whole):
            line = (b if own else 0) * self.blocks[0] + i
            return b, h, lax.div(h, jnp.int32(self.groups)), i, table[line * steps + t]

        return self._spec(grid, at, ins, outs, scratch, "d_out" in ins), lists

    def by_keys(self, ins, outs, scratch, *, every_head=False):
        """The same for one that goes through the queries of each block of keys.

        With `every_head` those of all heads, else those of the heads that share the keys.
        """
        lists = self._lists(self.live.swapaxes(1, 2), self.whole.swapaxes(1, 2))
        outer, inner = (1, self.heads) if every_head else (self.kv_heads, self.groups)
        grid = (self.batch, outer, self.blocks[1], inner, self.blocks[0])
        steps, own = self.blocks[0], self.static.list_rows > 1

        def at(b, o, j, g, t, counts, table, whole):
            line = (b if own else 0) * self.blocks[1] + j
            head = o * inner + g
            kv_head = lax.div(head, jnp.int32(self.groups))
            return b, head, kv_head, table[line * steps + t], j

        return self._spec(grid, at, ins, outs, scratch, True), lists

    def _spec(self, grid, at, ins, outs, scratch, head_rows: bool):
        wide_v = 0 if self.v is None else self.v.shape[-1]

        wide, block_q, block_k = self.q.shape[-1], self.block_q, self.block_k

        def block(shape, place):
            return pl.BlockSpec(shape, lambda *a: place(*at(*a)))

        specs = {
            "q": block((1, 1, block_q, wide), lambda b, h, kh, i, j: (b, h, i, 0)),
            "d_out": block((1, 1, block_q, wide_v), lambda b, h, kh, i, j: (b, h, i, 0)),
            "k": block(
                (1, 1, self.block_k, self.k.shape[-1]), lambda b, h, kh, i, j: (b, kh, j, 0)
            ),
            "v": block((1, 1, block_k, wide_v), lambda b, h, kh, i, j: (b, kh, j, 0)),
            "rows": block(
                (1, 1, _ROWS, block_q),
                lambda b, h, kh, i, j: (b, h if head_rows else 0, 0, i),
            ),
            "columns": block((1, _ROWS, block_k), lambda b, h, kh, i, j: (b, 0, j)),
            "lse": block((1, 1, 1, block_q), lambda b, h, kh, i, j: (b, h, 0, i)),
        }
        specs["key_row"] = pl.BlockSpec((1, 1, 1, block_k), lambda *a: (a[0], a[1], 0, a[2]))
        specs["out"] = specs["d_out"]
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[specs[name] for name in ins],
            out_specs=[specs[name] for name in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )

    def _lists(self, live, whole):
        """int32 counts [lines], blocks [lines * steps] and whether they are whole, flat."""
        table, count = tables.listed(live)
        whole = jnp.take_along_axis(whole, table, axis=-1)
        return count.reshape(-1), table.reshape(-1), whole.astype(jnp.int32).reshape(-1)

    def options(self, products: int, grid: tuple[int, ...]) -> dict:
        """What `pallas_call` is told beside the grid; FLOPs are those of the whole map."""
        semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        entries = self.batch * self.heads * self.padded_q * self.padded_k
        size = self.q.dtype.itemsize
        return dict(
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=self.vmem
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * entries * products,
                transcendentals=entries,
                bytes_accessed=size * (2 * self.q.size + 2 * self.k.size * self.blocks[0]),
            ),
        )


def _packed(parts, shape):
    """Numbers of each token side by side: [..., count] -> float32 [..., 8, count]."""
    parts = [
        jnp.zeros(shape, jnp.float32)
        if x is None
        else jnp.broadcast_to(x, shape).astype(jnp.float32)
        for x in parts
    ]
    return jnp.stack(parts, axis=-2)
