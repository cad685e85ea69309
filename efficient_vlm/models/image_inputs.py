"""Arrays that follow the pictures of a batch and their tokens."""

from typing import Any

import jax
import jax.numpy as jnp


def repeat_rows(tree: Any, images: int, questions: int) -> Any:
    """Leading axis B*M -> B*Q*M: the images of each row once for every question."""

    def repeat(x):
        grouped = jnp.repeat(x.reshape(-1, images, *x.shape[1:]), questions, axis=0)
        return grouped.reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, tree)


def gathered(x: jax.Array, index: jax.Array) -> jax.Array:
    """[B, N, ...] at `index` [B or 1, T, k] -> [B, T, k, ...], zeros where it is -1."""
    index = jnp.broadcast_to(index, (len(x), *index.shape[1:]))
    taken = jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(x, index)
    there = (index >= 0).reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.where(there, taken, jnp.zeros((), x.dtype))


def pooled(name: str, x: jax.Array, index: jax.Array) -> jax.Array:
    """A signal about patches as one about the tokens that read them: attention adds up."""
    total = gathered(x, index).sum(axis=2)
    if name.endswith("_row"):
        return total
    count = jnp.maximum((index >= 0).sum(axis=2), 1)
    return total / count.reshape(*count.shape, *(1,) * (total.ndim - 2)).astype(total.dtype)


def resized(images: jax.Array, size: list[int]) -> jax.Array:
    """uint8 or float [..., H, W, 3] -> float32 in [0, 1] [..., h, w, 3], bilinear, antialiased."""
    top = 255 if jnp.issubdtype(images.dtype, jnp.integer) else 1
    images = images.astype(jnp.float32) / top
    shape = (*images.shape[:-3], *size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=True)
