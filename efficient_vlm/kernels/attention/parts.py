"""Attention on a mesh of devices: each has rows and heads of its own, and needs no other.

A kernel, or a loop over heads, is opaque to the partitioner of XLA, which would gather everything
on every device for it. The map of a row and head is whole on one device: there is no communication
but the mean of importance over heads.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from efficient_vlm.sharding import BATCH, auto_axes

__all__ = ["on_mesh"]

# Axes of the mesh over which heads are cut. Tokens that are cut over "sequence" are gathered for
# it, and its heads cut in their place: all to all (arXiv 2309.14509).
HEADS = ("tensor", "sequence")


def on_mesh(function: Callable, q, k, v, key_bias, mask, weights):
    """`function`, which gives (out, lse, importance or None), of the part of each device.

    Args:
      q, k, v: [B, H, N, D], [B, Hk, M, D], [B, Hk, M, Dv]. Rows are cut over `sharding.BATCH` and
        heads over HEADS of the mesh that is set, where they divide; else all is done on each.
      key_bias, mask, weights: of B rows, or of 1 for all, or None.
    """
    sizes = auto_axes()
    rows = tuple(name for name in BATCH if name in sizes)
    if len(q) % math.prod(sizes[name] for name in rows):
        rows = ()
    if not sizes:
        return function(q, k, v, key_bias, mask, weights)
    heads = None
    for names in (HEADS, HEADS[:1]):
        names = tuple(name for name in names if name in sizes)
        parts = math.prod(sizes[name] for name in names)
        if (
            parts > 1
            and q.shape[1] % parts == 0
            and not (k.shape[1] % parts and parts % k.shape[1])
        ):
            heads = names
            if parts > k.shape[1]:
                # Several devices share a head of keys: each gets it.
                k, v = (jnp.repeat(x, parts // k.shape[1], axis=1) for x in (k, v))
            break

    def of_rows(x):
        return PartitionSpec(rows if len(x) == len(q) else None)

    def part(*args):
        out, lse, importance = function(*args)
        if importance is not None and heads is not None:
            importance = lax.pmean(importance, heads)
        return out, lse, importance

    matrix = PartitionSpec(rows, heads)
    rest = jax.tree.map(of_rows, (key_bias, mask, weights))
    return jax.shard_map(
        part,
        in_specs=(matrix, matrix, matrix, *rest),
        out_specs=(matrix, matrix, None if weights is None else PartitionSpec(rows)),
        check_vma=False,
    )(q, k, v, key_bias, mask, weights)
