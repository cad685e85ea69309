"""Attention on Hopper GPUs: Pallas (Mosaic GPU) kernels with TMA and wgmma.

A thread block owns blocks of 64 queries (or keys), one per computing warpgroup, and loops over the
listed blocks of the other side, which one more warpgroup prefetches; empty blocks are in no list.
The passes are those of arXiv 2205.14135 and 2407.08608 with a bias per key, importance and their
gradients. Measurements are in docs/kernels.md.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_vlm.kernels import hints
from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention.compat import kernel_options
from efficient_vlm.kernels.attention.hopper import kernels
from efficient_vlm.kernels.attention.hopper.kernels import HEIGHT, LOG2E, matrix
from efficient_vlm.kernels.attention.packing import NUMBERS, Packed
from efficient_vlm.kernels.manual import alike

__all__ = ["TILES", "Tile", "backward", "forward", "importance", "unserved"]

_MOST_DIM = 128


class Tile(NamedTuple):
    """Tile sizes of a pass.

    Attributes:
      warpgroups: computing warpgroups of a thread block; in forward and importance two take turns.
      step: tokens of the other side in a step.
      crowded: the same with a softcap or gradients of importance, which need more registers.
      stages: steps in fast memory at a time, the current one included.
    """

    warpgroups: int
    step: int
    crowded: int
    stages: int = 2


# pass -> tiles for heads of up to 64 and of up to 128, tuned on an H100 (docs/kernels.md).
TILES = {
    "forward": (Tile(2, 256, 128), Tile(2, 128, 128)),
    "backward_q": (Tile(2, 128, 64), Tile(2, 128, 64)),
    "backward_kv": (Tile(2, 128, 64), Tile(2, 64, 64)),
    "importance": (Tile(2, 128, 128), Tile(2, 256, 128)),
}


def unserved(q, k, v) -> str | None:
    """The feature that these kernels lack for a call, or None."""
    del k
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} (bfloat16 and float16 only)"
    if (dim := max(q.shape[-1], v.shape[-1])) > _MOST_DIM:
        return f"head dim {dim} (at most {_MOST_DIM})"
    return None


def forward(q, k, v, key_bias, mask, *, scale, softcap):
    """(out [B, H, N, Dv], lse float32 [B, H, N]); see `xla.forward`."""
    call = _Call("forward", "queries", q, k, v, key_bias, mask, scale, softcap)
    shapes = call.like(call.q, call.v.shape[-1]), call.row(call.heads, call.padded_q)
    own = call.matrix(call.q), call.numbers(NUMBERS), call.matrix(call.v), call.numbers()
    scratch, products = (*own, call.arrived(2), call.turn()), call.dim + call.value_dim
    run = call.kernel(kernels.forward_kernel, shapes, scratch, products)
    out, lse = run(call.q, call.k, call.v, call.rows(), call.columns)
    return call.queries_back(out, v.shape[-1]), lse[:, :, : call.count]


def backward(q, k, v, key_bias, mask, lse, delta, d_out, weights, gain, *, scale, softcap):
    """(dq, dk, dv, d key_bias [B, M] or None); see `xla.backward`."""
    args, lse = (q, k, v, key_bias, mask, scale, softcap), lse * LOG2E

    def arrays(call):
        rows = call.rows(lse, delta, weights)
        return call.q, call.k, call.v, call.queries(d_out), rows, call.columns

    call = _Call("backward_q", "queries", *args, gain=gain)
    own = call.matrix(call.q), call.matrix(call.v), call.numbers(NUMBERS)
    scratch, products = (*own, call.arrived(3)), 2 * call.dim + call.value_dim
    run = call.kernel(kernels.backward_q_kernel, call.like(call.q), scratch, products)
    dq = call.queries_back(run(*arrays(call)), call.dim)

    call = _Call("backward_kv", "keys", *args, gain=gain)
    own = call.matrix(call.k), call.matrix(call.v), call.numbers(NUMBERS), call.numbers()
    shapes = call.like(call.k), call.like(call.v), call.row(call.kv_heads, call.padded_k)

    def sums(**parts):
        body = functools.partial(kernels.backward_kv_kernel, **parts)
        scratch, width = (*own, call.arrived(3)), call.dim + call.value_dim
        products = width + call.dim * parts["keys"] + call.value_dim * parts["values"]
        return call.kernel(body, shapes, scratch, products)(*arrays(call))

    if softcap is not None and max(call.k.shape[-1], call.v.shape[-1]) > 64:
        # With the cap's derivative, both sums of a head of 128 do not fit into the registers.
        (dk, _, d_bias), (_, dv, _) = sums(keys=True, values=False), sums(keys=False, values=True)
    else:
        dk, dv, d_bias = sums(keys=True, values=True)
    dk, dv = call.keys_back(dk, call.dim), call.keys_back(dv, call.value_dim)
    if key_bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, d_bias[:, :, : call.num_keys].sum(axis=1).astype(key_bias.dtype)


def importance(q, k, key_bias, mask, lse, weights, *, scale, softcap):
    """float32 [B, M]; see `xla.importance`."""
    call = _Call("importance", "keys", q, k, None, key_bias, mask, scale, softcap, weights=weights)
    shape = call.row(call.kv_heads, call.padded_k)
    own = call.matrix(call.k), call.numbers(NUMBERS), call.numbers()
    scratch = (*own, call.arrived(2), call.turn())
    run = call.kernel(kernels.importance_kernel, shape, scratch, call.dim)
    total = run(call.q, call.k, call.rows(lse * LOG2E), call.columns)
    return total[:, :, : call.num_keys].sum(axis=1) / call.heads


class _Call(Packed):
    """A pass with the tiles of TILES, and its arguments of `plgpu.kernel`."""

    def __init__(self, name, by, q, k, v, key_bias, mask, scale, softcap, **options):
        self.name, self.by = name, by
        dim = max(q.shape[-1], 0 if v is None else v.shape[-1])
        tile = TILES[name][dim > 64]
        crowded = softcap is not None or options.get("gain") is not None
        step = tile.crowded if crowded else tile.step
        self.warpgroups, own = tile.warpgroups, tile.warpgroups * HEIGHT
        key_bias = None if key_bias is None else key_bias * LOG2E
        args = (q, k, v, key_bias, mask, scale, softcap)
        options |= dict(lanes=_swizzled, stages=tile.stages)
        super().__init__(by, own, step, *args, **options)
        counts, *lists = self.lists
        # An empty list still visits one block, all of which the mask, or an lse of +inf, hides.
        self.lists = jnp.maximum(counts, 1), *lists

    def _whole(self, x, count):
        # [B, N, H, D]: this transposition cancels that of the model.
        return super()._whole(x, count).swapaxes(1, 2)

    def queries_back(self, x, dim: int):
        """[B, H, N, dim] from the result of a kernel."""
        return x.swapaxes(1, 2)[:, :, : self.count, :dim]

    def keys_back(self, x, dim: int):
        """The same for keys."""
        return x.swapaxes(1, 2)[:, :, : self.num_keys, :dim]

    def like(self, x, dim: int | None = None):
        """Shape of a result with the layout of a matrix."""
        return jax.ShapeDtypeStruct((*x.shape[:3], dim or x.shape[3]), self.dtype)

    def row(self, heads: int, tokens: int):
        """Shape of a result with one number per token."""
        return jax.ShapeDtypeStruct((self.batch, heads, tokens), jnp.float32)

    def matrix(self, like):
        """Fast memory for the rows of a matrix that each warpgroup owns."""
        return matrix(self.warpgroups, HEIGHT, like.shape[-1], dtype=self.dtype)

    def numbers(self, *of_token: int):
        """Fast memory for numbers of the tokens of each warpgroup."""
        return plgpu.SMEM((self.warpgroups, *of_token, HEIGHT), jnp.float32)

    def arrived(self, copies: int):
        """Barriers of each warpgroup for copies into fast memory."""
        return plgpu.Barrier(num_arrivals=copies, num_barriers=self.warpgroups)

    def turn(self):
        """The barrier at which warpgroups take turns."""
        return plgpu.Barrier(num_arrivals=self.warpgroups)

    def kernel(self, body, shapes, scratch, products: int):
        """The kernel of a body, a function of the arrays that follow the lists.

        `products` is the total width of its products per entry of the map, for the estimate.
        """
        by_queries = self.by == "queries"
        heads = self.heads if by_queries else self.kv_heads
        tokens = self.padded_q if by_queries else self.padded_k
        run = plgpu.kernel(
            functools.partial(body, call=self.static),
            out_type=shapes,
            scratch_types=scratch,
            grid=(heads, tokens // self.static.own, self.batch),
            grid_names=("head", "block", "batch"),
            num_threads=self.warpgroups + 1,
            thread_name="warpgroup",
            kernel_name=f"attention_{self.name}",
            **kernel_options(),
        )
        _, entries = self.expected()

        def call(*args):
            # These kernels state neither their work nor over which mesh axes their results vary.
            with hints.about_flops(2 * entries * products):
                return alike(run(*self.lists, *args), self.q)[0]

        return call


def _swizzled(dim: int) -> int:
    return tables.padded(dim, 64)
