"""The grid of blocks of an attention call on a TPU: block sizes and index maps."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_vlm.kernels.attention.packing import NUMBERS, Packed
from efficient_vlm.kernels.attention.tpu.blocks import block_sizes, lane_dim, vmem_bytes
from efficient_vlm.kernels.manual import out_shape

__all__ = ["LANES", "Call"]

LANES = 128


class Call(Packed):
    """One pass over the map: arrays in whole blocks, lists of live blocks, and the grid.

    Attributes:
      inner_heads: query heads that attend to one block of keys.
      vmem: bytes of fast memory that the pass may use.
    """

    def __init__(self, name, by, q, k, v, *given, **options):
        self.name = name
        # The matrix units do not support float16.
        dtype = jnp.dtype(jnp.float32 if q.dtype == jnp.float16 else q.dtype)
        wide = lane_dim(max(q.shape[-1], 0 if v is None else v.shape[-1]))
        blocks = block_sizes(name, q.shape[2], k.shape[2], wide)
        self.vmem = vmem_bytes(name, *blocks, wide, dtype.itemsize)
        own_and_step = blocks if by == "queries" else blocks[::-1]
        options |= dict(lanes=lane_dim, dtype=dtype)
        super().__init__(by, *own_and_step, q, k, v, *given, **options)
        self.inner_heads = self.heads if name == "importance" else self.groups

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.static.groups

    def by_queries(self, ins, outs, scratch):
        """Grid spec of a kernel that loops over keys for each block of queries.

        Args:
          ins, outs: names of arrays and results, see `_spec`.
          scratch: shapes of float32 in fast memory.
        """
        static = self.static
        grid = (self.batch, self.heads, static.lines, static.steps)

        def at(b, h, i, t, counts, whole, table):
            return b, h, lax.div(h, jnp.int32(self.groups)), i, table[_line(static, b, i, t)]

        return self._spec(grid, at, ins, outs, scratch, "d_out" in ins)

    def by_keys(self, ins, outs, scratch):
        """The same for a loop over the queries of `inner_heads` for each block of keys."""
        static, inner = self.static, self.inner_heads
        grid = (self.batch, self.heads // inner, static.lines, inner, static.steps)

        def at(b, o, j, g, t, counts, whole, table):
            head = o * inner + g
            kv_head = lax.div(head, jnp.int32(self.groups))
            return b, head, kv_head, table[_line(static, b, j, t)], j

        return self._spec(grid, at, ins, outs, scratch, True)

    def _spec(self, grid, at, ins, outs, scratch, head_rows: bool):
        block_q, block_k, wide = self.block_q, self.block_k, self.q.shape[-1]
        wide_v = 0 if self.v is None else self.v.shape[-1]

        def block(shape, place):
            return pl.BlockSpec(shape, lambda *a: place(*at(*a)))

        specs = {
            "q": block((1, 1, block_q, wide), lambda b, h, kh, i, j: (b, h, i, 0)),
            "d_out": block((1, 1, block_q, wide_v), lambda b, h, kh, i, j: (b, h, i, 0)),
            "k": block((1, 1, block_k, wide), lambda b, h, kh, i, j: (b, kh, j, 0)),
            "v": block((1, 1, block_k, wide_v), lambda b, h, kh, i, j: (b, kh, j, 0)),
            "rows": block(
                (1, 1, NUMBERS, block_q),
                lambda b, h, kh, i, j: (b, h if head_rows else 0, 0, i),
            ),
            "columns": block((1, NUMBERS, block_k), lambda b, h, kh, i, j: (b, 0, j)),
            "lse": block((1, 1, 1, block_q), lambda b, h, kh, i, j: (b, h, 0, i)),
        }
        specs["key_row"] = pl.BlockSpec((1, 1, 1, block_k), lambda *a: (a[0], a[1], 0, a[2]))
        specs["out"] = specs["d_out"]
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(self.lists),
            grid=grid,
            in_specs=[specs[name] for name in ins],
            out_specs=[specs[name] for name in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )

    def options(self, products: int, grid: tuple[int, ...]) -> dict:
        """Compiler parameters and cost estimate of `pallas_call`."""
        semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        live, entries = self.expected()
        passes = live / (self.padded_k // self.block_k)
        return dict(
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=self.vmem
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * entries * products,
                transcendentals=entries,
                bytes_accessed=round(
                    self.q.dtype.itemsize * 2 * (self.q.size + self.k.size * passes)
                ),
            ),
        )

    def row(self, heads: int, tokens: int):
        """The shape of a result that has one number for each token, as rows."""
        return out_shape((self.batch, heads, 1, tokens), jnp.float32, self.q)


def _line(static, batch, block, step):
    """Index into the flat lists: step `step` of the list of an owned block."""
    return ((batch if static.list_rows > 1 else 0) * static.lines + block) * static.steps + step
