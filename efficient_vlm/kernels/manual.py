"""Varying axes inside a caller's `jax.shard_map`: each array states the mesh axes it varies over.

The carry of a loop and the result of a kernel must vary over the axes of their operands; JAX does
neither by itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["alike", "out_shape", "varies", "zeros"]


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same arrays, each varying over all axes that any of them varies over."""
    leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    every = frozenset().union(*map(_varying, leaves))
    if not every:
        return trees

    def more(x):
        x = jnp.asarray(x)
        return lax.pcast(x, tuple(every - _varying(x)), to="varying")

    return jax.tree.map(more, trees)


def varies(x: jax.Array) -> bool:
    """Whether an array varies over axes of a caller's mesh."""
    return bool(_varying(x))


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array, fill: float = 0.0) -> jax.Array:
    """Zeros, or another number, varying like `like`."""
    return alike(jnp.full(shape, fill, dtype), like)[0]


def out_shape(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result, varying like `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _varying(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying
