"""The programs of `efficient-vlm audit kernels`: every kernel at its shapes, and a row for each."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from efficient_vlm.kernels.attention import attention
from efficient_vlm.kernels.attention.tpu.blocks import block_sizes, lane_dim, vmem_bytes
from efficient_vlm.kernels.attention.tpu.decode import VMEM_BYTES
from efficient_vlm.kernels.grouped_matmul import grouped_matmul
from efficient_vlm.kernels.paged_attention import attention_decode

ALL = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")
_TOKENS, _DIMS, _QUICK = (576, 1152, 2880, 8192), (64, 128), ((576, 64),)
_HEADS = {"": (8, 8), "grouped keys": (8, 2)}
_PASSES = {
    "forward": ("forward",),
    "backward": ("backward_q", "backward_kv"),
    "importance": ("importance",),
}

_shape = jax.ShapeDtypeStruct


@dataclasses.dataclass
class Row:
    """One program.

    Attributes:
      compiled: whether it compiled and the kernel is in it.
      vmem_bytes: fast memory that the kernel is allowed, and fits in; None for XLA's own.
      error: one line, or None.
      registers, spill_bytes: of a GPU's kernels, the most of one, and the sum; else None.
    """

    topology: str
    kernel: str
    shape: str
    dtype: str
    direction: str
    compiled: bool
    vmem_bytes: int | None
    error: str | None
    registers: int | None = None
    spill_bytes: int | None = None


@dataclasses.dataclass
class Program:
    kernel: str
    shape: str
    dtype: str
    direction: str
    function: Callable
    given: tuple[Any, ...]
    vmem_bytes: int | None
    calls: int  # Kernels that must be in the program.
    flops: int | None = None  # Of the products alone, of which it may have less than twice as many.

    def describe(self) -> str:
        """What is compiled, in words."""
        return f"{self.kernel} {self.shape} {self.dtype}, {self.direction}"

    def problem(self, kernels: int, flops: float) -> str | None:
        """What is wrong with the compiled program, or None."""
        if kernels < self.calls:
            return f"{kernels} of {self.calls} kernels are in the program"
        if self.flops is not None and flops >= 2 * self.flops:
            return f"{flops / self.flops:.0f} times the work of its products"
        return None


def programs(quick: bool = False, implementation: str = "tpu") -> Iterator[Program]:
    """What is compiled: causal, ragged, with a bias for each key, in bfloat16.

    Args:
      quick: at one size only.
      implementation: of attention: "tpu", "gpu" (Hopper), or "xla", which has no kernel of ours.
    """
    sizes = _QUICK if quick else [(n, d) for n in _TOKENS for d in _DIMS]
    for heads in _HEADS.values():
        for tokens, dim in sizes:
            yield from _attention(tokens, dim, *heads, implementation)
    if implementation == "tpu":
        yield from _decode()
    yield from _experts()


def _attention(
    tokens: int, dim: int, heads: int, kv_heads: int, implementation: str
) -> Iterator[Program]:
    q = _shape((1, heads, tokens, dim), jnp.bfloat16)
    k = _shape((1, kv_heads, tokens, dim), jnp.bfloat16)
    bias, lengths = _shape((1, tokens), jnp.float32), _shape((1,), jnp.int32)

    def forward(q, k, v, bias, lengths, weights=None):
        options = dict(causal=True, key_bias=bias, kv_lengths=lengths)
        options |= dict(importance_weights=weights, implementation=implementation)
        return attention(q, k, v, **options)

    def loss(q, k, v, bias, lengths):
        return forward(q, k, v, bias, lengths).out.astype(jnp.float32).sum()

    functions = {
        "forward": (lambda *args: forward(*args)[:2], (), 1),
        "backward": (jax.grad(loss, (0, 1, 2, 3)), (), 3),
        "importance": (lambda *args: forward(*args).importance, (bias,), 2),
    }
    for direction, (function, more, calls) in functions.items():
        vmem = None
        if implementation == "tpu":
            wide = lane_dim(dim)
            vmem = max(
                vmem_bytes(name, *block_sizes(name, tokens, tokens, wide), wide, 2)
                for name in _PASSES[direction]
            )
        yield Program(
            "attention (xla)" if implementation == "xla" else "attention",
            f"1 x {heads}/{kv_heads} x {tokens} x {dim}",
            "bfloat16",
            direction,
            function,
            (q, k, k, bias, lengths, *more),
            vmem,
            0 if implementation == "xla" else calls,
        )


def _decode() -> Iterator[Program]:
    q, lengths = _shape((4, 8, 1, 128), jnp.bfloat16), _shape((4,), jnp.int32)
    for dtype in ("bfloat16", "int8"):
        pool = _shape((96, 2, 128, 128), dtype)
        scale = _shape(pool.shape[:3], jnp.float32) if dtype == "int8" else None

        def decode(q, k, v, lengths, pages, scale):
            options = dict(pages=pages, k_scale=scale, v_scale=scale, implementation="tpu")
            return attention_decode(q, k, v, lengths, **options)[:2]

        given = (q, pool, pool, lengths, _shape((4, 24), jnp.int32), scale)
        shape = "4 x 8/2 x 1, 24 pages of 128 x 128"
        yield Program("attention_decode", shape, dtype, "forward", decode, given, VMEM_BYTES, 1)

    def contiguous(q, k, v, lengths):
        return attention_decode(q, k, v, lengths, implementation="tpu")[:2]

    cache = _shape((4, 2, 1100, 128), jnp.bfloat16)
    given, facts = (q, cache, cache, lengths), ("4 x 8/2 x 1, 1100 x 128", "bfloat16", "forward")
    yield Program("attention_decode", *facts, contiguous, given, VMEM_BYTES, 1)


def _experts() -> Iterator[Program]:
    given = (
        _shape((8192, 1024), jnp.bfloat16),
        _shape((64, 1024, 1024), jnp.bfloat16),
        _shape((64,), jnp.int32),
    )

    def loss(lhs, rhs, sizes):
        return (grouped_matmul(lhs, rhs, sizes).astype(jnp.float32) ** 2).sum()

    shape, flops = "8192 x 1024 x 1024, 64 experts", 2 * 8192 * 1024 * 1024
    for direction, function, products in (
        ("forward", grouped_matmul, 1),
        ("backward", jax.grad(loss, (0, 1)), 3),
    ):
        # Which form XLA's `ragged_dot` takes is XLA's choice: it must be no masked product for
        # each expert.
        facts = (shape, "bfloat16", direction)
        work = products * flops
        yield Program("grouped_matmul", *facts, function, given, None, 0, work)
