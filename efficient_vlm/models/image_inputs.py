"""Pictures of a batch with all that comes with them, and arrays that follow their tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Shaped

from efficient_vlm.errors import UserError
from efficient_vlm.shapes import Array


class Layout(NamedTuple):
    """The static shape of a row's pictures: how many, and the grid of each.

    The grid is that of the tokens which compressors get: patches, or what a projector makes of
    them.
    """

    images: int
    rows: int
    columns: int


NO_PICTURES = Layout(0, 1, 1)


@struct.dataclass
class Pictures:
    """Pictures of B rows, M to a row: whole pictures, tiles or crops, padded to one size.

    Attributes:
      pixels: uint8 or float in [0, 1] [B, M, H, W, 3]; [B, M, frames, H, W, 3] for encoders whose
        patches span several frames.
      mask: bool [B, M], False where a row has no such picture.
      valid: int32 [B, M, 2], rows and columns of patches, from the upper left corner, that are
        real; None for all.
      slot_mask: bool [B, M, T], which of a picture's T tokens the prompt has a slot for; None for
        those that read a real patch.
      padding_share: float32 [B, M, N], share of real pixels of each of the N patches (Molmo).
      pool_index: int32 [B, P, k], the patches, counted over all pictures of a row, that each of P
        tokens reads, -1 for none (Molmo2).
    """

    pixels: Shaped[Array, "B M ... H W 3"]
    mask: Bool[Array, "B M"]
    valid: Int[Array, "B M 2"] | None = None
    slot_mask: Bool[Array, "B M T"] | None = None
    padding_share: Float[Array, "B M N"] | None = None
    pool_index: Int[Array, "B P k"] | None = None

    def check(self) -> None:
        """Raises UserError for arrays that do not belong together."""
        shape = np.shape(self.pixels)
        if len(shape) not in (5, 6) or shape[-1] != 3:
            raise UserError(
                f"inputs.pictures.pixels: shape {shape}",
                allowed="[rows, pictures, height, width, 3], or with frames in front of height",
                fix="pixels[None, None] for one picture [height, width, 3]",
            )
        rows, count = shape[:2]
        check_shape("pictures.mask", self.mask, (rows, count))
        check_shape("pictures.valid", self.valid, (rows, count, 2))
        check_shape("pictures.slot_mask", self.slot_mask, (rows, count, None))
        check_shape("pictures.padding_share", self.padding_share, (rows, count, None))
        check_shape("pictures.pool_index", self.pool_index, (rows, None, None))


def check_shape(name: str, x: Any, wanted: tuple[int | None, ...]) -> None:
    """None stands for any size, and for an array that is not given."""
    if x is None:
        return
    shape = np.shape(x)
    fits = len(shape) == len(wanted)
    if not fits or any(b not in (None, a) for a, b in zip(shape, wanted, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        raise UserError(
            f"inputs.{name}: shape {shape} does not fit the other arrays",
            allowed=f"({sizes})",
            fix="make inputs by processing.batch, or by Pretrained.request",
        )


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
