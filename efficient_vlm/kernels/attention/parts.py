"""Attention on a mesh of devices: each has rows and heads of its own, and needs no other.

A kernel, or a loop over heads, is opaque to the partitioner of XLA, which would gather everything
on every device for it. The map of a row and head is whole on one device: there is no communication
but the mean of importance over heads.
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

# Axes of the mesh over which heads are cut. Tokens that are cut over "sequence" are gathered for
# it, and its heads cut in their place: all to all (arXiv 2309.14509).
HEADS = ("tensor", "sequence")


class _Cut(NamedTuple):
    """How a call is cut: axes of the mesh for rows and for heads (None for not at all), how many
    devices share a head of keys, each of which gets a copy, and the mesh, if its axes are explicit.
    """

    rows: tuple[str, ...]
    heads: tuple[str, ...] | None
    copies: int
    explicit: Any = None

    @property
    def matrix(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.heads)

    def of_rows(self, tree: Any, batch: int) -> Any:
        """Specifications of arrays of `batch` rows, or of 1 for all."""
        cut, whole = PartitionSpec(self.rows), PartitionSpec(None)
        return jax.tree.map(lambda x: cut if len(x) == batch else whole, tree)

    def keys(self, *arrays: jax.Array | None) -> list[jax.Array | None]:
        """[B, Hk, ...] with a head for each device."""
        if self.copies == 1:
            return list(arrays)
        return [x if x is None else jnp.repeat(x, self.copies, axis=1) for x in arrays]

    def run(self, function: Callable, in_specs: tuple, out_specs: Any, args: tuple) -> Any:
        """`function` of the part of each device."""
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
    """None where no mesh is set, or one device is all of it."""
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
    """Whether an array lies on a mesh with explicit axes."""
    own = getattr(jax.typeof(q), "sharding", None)
    return own is not None and AxisType.Explicit in (own.mesh.axis_types or ())


def _cut_as(q: jax.Array, kv_heads: int) -> _Cut:
    """As q is cut already, over explicit axes; what goes with it is brought there."""
    lies = jax.typeof(q).sharding
    rows, heads, *rest = (
        (names,) if isinstance(names, str) else names for names in (*lies.spec, None, None)[:4]
    )
    if any(rest):
        raise UserError(
            f"attention: q is cut as {lies.spec}",
            allowed="over rows and heads",
            fix="jax.sharding.reshard it, or a mesh with axis_types=(AxisType.Auto, ...)",
        )
    parts = math.prod(lies.mesh.shape[name] for name in heads or ())
    if kv_heads % parts and parts % kv_heads:
        heads, parts = None, 1
    concrete = getattr(getattr(q, "sharding", None), "mesh", lies.mesh)
    return _Cut(rows or (), heads, max(1, parts // kv_heads), concrete)


def devices_of(q: jax.Array, kv_heads: int) -> int:
    """Over how many devices the rows and heads of a call are cut."""
    cut = _cut_of(q, kv_heads)
    if cut is None:
        return 1
    sizes = auto_axes() if cut.explicit is None else cut.explicit.shape
    return math.prod(sizes[name] for name in (*cut.rows, *(cut.heads or ())))


def on_mesh(function: Callable, q, k, v, key_bias, mask, weights):
    """`function`, which gives (out, lse, importance or None), of the part of each device.

    Args:
      q, k, v: [B, H, N, D], [B, Hk, M, D], [B, Hk, M, Dv]. Rows are cut over `sharding.BATCH` and
        heads over HEADS of the mesh that is set, where they divide; else all is done on each.
      key_bias, mask, weights: of B rows, or of 1 for all, or None.
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
    """`function`, which gives [B, M] from these, of the part of each device; see `on_mesh`."""
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
    """`function`, which gives (out, lse, None), of the part of each device; see `on_mesh`.

    `more` are arrays of rows, or None.

    A pool of pages is cut by heads alone: any row may read any page.
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
