"""Attention on a mesh of devices: each computes its own rows and heads, independently.

A kernel, or a loop over heads, is opaque to the partitioner of XLA, which would gather all of its
operands on every device. The whole map of a row and head is on one device, so the only
communication is the mean of importance over heads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_vlm.errors import UserError
from efficient_vlm.sharding import BATCH, auto_axes

__all__ = ["decode_on_mesh", "importance_on_mesh", "on_mesh"]

# Axes of the mesh over which heads are sharded. For tokens sharded over "sequence" an all-to-all
# gathers the tokens and shards the heads instead (arXiv 2309.14509).
HEADS = ("tensor", "sequence")


class _Cut(NamedTuple):
    """How a call is sharded.

    Attributes:
      rows, heads: axes of the mesh; None for heads on every device.
      copies: devices that share a key head, each with a copy of it.
      explicit: the mesh, if its axes are explicit.
    """

    rows: tuple[str, ...]
    heads: tuple[str, ...] | None
    copies: int
    explicit: Any = None

    @property
    def matrix(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.heads)

    def of_rows(self, tree: Any, batch: int) -> Any:
        """Specifications of arrays with `batch` rows, or with one row for all."""
        cut, whole = PartitionSpec(self.rows), PartitionSpec(None)
        return jax.tree.map(lambda x: cut if len(x) == batch else whole, tree)

    def keys(self, *arrays: jax.Array | None) -> list[jax.Array | None]:
        """Arrays [B, Hk, ...], with key heads repeated so that each device has its own."""
        if self.copies == 1:
            return list(arrays)
        return [x if x is None else jnp.repeat(x, self.copies, axis=1) for x in arrays]

    def run(self, function: Callable, in_specs: tuple, out_specs: Any, args: tuple) -> Any:
        """`function` on the part of each device."""
        options = dict(in_specs=in_specs, out_specs=out_specs, check_vma=False)
        if self.explicit is not None:
            options["mesh"] = self.explicit

            def place(x, spec):
                return jax.sharding.reshard(x, NamedSharding(self.explicit, spec))

            args = jax.tree.map(place, args, in_specs)
        return jax.shard_map(function, **options)(*args)

    def mean(self, importance: jax.Array | None) -> jax.Array | None:
        if importance is None or self.heads is None:
            return importance
        return lax.pmean(importance, self.heads)


def _cut_of(q: jax.Array, kv_heads: int) -> _Cut | None:
    """How to shard a call on the current mesh; None without one, or with one device."""
    if is_explicit(q):
        return _cut_as(q, kv_heads)
    sizes = auto_axes()
    if not sizes:
        return None
    rows = tuple(name for name in BATCH if name in sizes)
    if len(q) % math.prod(sizes[name] for name in rows):
        rows = ()
    for names in (HEADS, HEADS[:1]):
        names = tuple(name for name in names if name in sizes)
        parts = math.prod(sizes[name] for name in names)
        if parts == 1 or q.shape[1] % parts:
            continue
        if kv_heads % parts == 0 or parts % kv_heads == 0:
            return _Cut(rows, names, max(1, parts // kv_heads))
    return _Cut(rows, None, 1)


def is_explicit(q: jax.Array) -> bool:
    """Whether an array is on a mesh with explicit axes."""
    sharding = getattr(jax.typeof(q), "sharding", None)
    return sharding is not None and AxisType.Explicit in (sharding.mesh.axis_types or ())


def _cut_as(q: jax.Array, kv_heads: int) -> _Cut:
    """The sharding that q already has over explicit axes; other operands are resharded to it."""
    sharding = jax.typeof(q).sharding
    rows, heads, *rest = (
        (names,) if isinstance(names, str) else names for names in (*sharding.spec, None, None)[:4]
    )
    if any(rest):
        raise UserError(
            f"attention: q is sharded as {sharding.spec}",
            allowed="sharded over rows and heads",
            fix="jax.sharding.reshard it, or use a mesh with axis_types=(AxisType.Auto, ...)",
        )
    parts = math.prod(sharding.mesh.shape[name] for name in heads or ())
    if kv_heads % parts and parts % kv_heads:
        heads, parts = None, 1
    concrete = getattr(getattr(q, "sharding", None), "mesh", sharding.mesh)
    return _Cut(rows or (), heads, max(1, parts // kv_heads), concrete)


def devices_of(q: jax.Array, kv_heads: int) -> int:
    """Number of devices that share the rows and heads of a call."""
    cut = _cut_of(q, kv_heads)
    if cut is None:
        return 1
    sizes = auto_axes() if cut.explicit is None else cut.explicit.shape
    return math.prod(sizes[name] for name in (*cut.rows, *(cut.heads or ())))


def on_mesh(function: Callable, q, k, v, key_bias, mask, weights):
    """`function`, which returns (out, lse, importance or None), on the part of each device.

    Args:
      q, k, v: [B, H, N, D], [B, Hk, M, D], [B, Hk, M, Dv]. Rows are sharded over `sharding.BATCH`
        and heads over HEADS of the current mesh where they divide; else every device computes all.
      key_bias, mask, weights: with B rows, or one row for all, or None.
    """
    cut = _cut_of(q, k.shape[1])
    if cut is None:
        return function(q, k, v, key_bias, mask, weights)
    k, v = cut.keys(k, v)

    def part(*args):
        out, lse, importance = function(*args)
        return out, lse, cut.mean(importance)

    matrix = cut.matrix
    return cut.run(
        part,
        (matrix, matrix, matrix, *cut.of_rows((key_bias, mask, weights), len(q))),
        (matrix, matrix, None if weights is None else PartitionSpec(cut.rows)),
        (q, k, v, key_bias, mask, weights),
    )


def importance_on_mesh(function: Callable, q, k, key_bias, mask, lse, weights):
    """`function`, which returns [B, M], on the part of each device; see `on_mesh`."""
    cut = _cut_of(q, k.shape[1])
    if cut is None:
        return function(q, k, key_bias, mask, lse, weights)
    (k,), matrix = cut.keys(k), cut.matrix
    bias, masks, gains = cut.of_rows((key_bias, mask, weights), len(q))
    return cut.run(
        lambda *args: cut.mean(function(*args)),
        (matrix, matrix, bias, masks, matrix, gains),
        PartitionSpec(cut.rows),
        (q, k, key_bias, mask, lse, weights),
    )


def decode_on_mesh(function: Callable, q, k, v, lengths, pages, columns, k_scale, v_scale, *more):
    """`function`, which returns (out, lse, None), on the part of each device; see `on_mesh`.

    A pool of pages is sharded over heads only, because any row may read any page; `more` are arrays
    with a row for each row of q, or None.
    """
    cut = _cut_of(q, k.shape[1])
    args = (q, k, v, lengths, pages, columns, k_scale, v_scale, *more)
    if cut is None:
        return function(*args)
    k, v, k_scale, v_scale = cut.keys(k, v, k_scale, v_scale)
    matrix, rows = cut.matrix, PartitionSpec(cut.rows)
    pool = matrix if pages is None else PartitionSpec(None, cut.heads)
    scale = None if k_scale is None else pool
    page = None if pages is None else rows
    return cut.run(
        function,
        (matrix, pool, pool, rows, page, rows, scale, scale, *cut.of_rows(more, len(q))),
        (matrix, matrix, None),
        (q, k, v, lengths, pages, columns, k_scale, v_scale, *more),
    )
