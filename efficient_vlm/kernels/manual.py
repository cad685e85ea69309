"""Inside a caller's `jax.shard_map`: arrays say over which axes of the mesh they vary.

What a loop carries, and what a kernel gives, must vary as its operands do; JAX makes neither so.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["alike", "out_shape", "varies", "zeros"]


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same arrays, each varying over all axes over which any of them does."""
    leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    every = frozenset().union(*map(_varying, leaves))
    if not every:
        return trees

    def more(x):
        x = jnp.asarray(x)
        return lax.pcast(x, tuple(every - _varying(x)), to="varying")

    return jax.tree.map(more, trees)


def varies(x: jax.Array) -> bool:
    """Whether an array is said to vary over axes of a caller's mesh."""
    return bool(_varying(x))


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array, fill: float = 0.0) -> jax.Array:
    """Zeros, or another number, that vary as `like` does."""
    return alike(jnp.full(shape, fill, dtype), like)[0]


def out_shape(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of what a kernel gives, varying as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _varying(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying
