"""Images of a batch: what comes with them, their layout, and arrays that follow their tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class ImageExtras:
    """What some models must know about images beside their pixels; B rows of M images.

    Attributes:
      valid: int32 [B, M, 2], rows and columns of patches that are real; None for all.
      slot_mask: bool [B, M, tokens], which tokens the prompt has a slot for; None for those that
        read a real patch.
      padding_share: float32 [B, M, patches], share of real pixels of each patch (Molmo).
      pool_index: int32 [B, P, k], patches over all images of a row that each token reads, -1 for
        none (Molmo2).
    """

    valid: jax.Array | None = None
    slot_mask: jax.Array | None = None
    padding_share: jax.Array | None = None
    pool_index: jax.Array | None = None


NO_EXTRAS = ImageExtras()


class Layout(NamedTuple):
    """The static shape of a row's images: how many, and the grid of each.

    The grid is that of the tokens which compressors get: patches, or what a projector makes of
    them.
    """

    images: int
    rows: int
    columns: int


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
