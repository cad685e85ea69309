"""Shared by the picture processors of all families: the result, loading, resizing.

A processor follows its family's published Pillow preprocessing up to, but not including, the
subtraction of the mean: the encoder normalises by the processor's `mean` and `std`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from efficient_vlm.errors import UserError, first_line
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.picture_bytes import KINDS, picture_bytes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
MAX_WORK_PIXELS = 4 * images.MAX_PIXELS
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Pictured:
    """One picture as a family's model takes it: M images (crops, tiles) and the text for them.

    Attributes:
      images: float32 [M, H, W, 3] in [0, 1], mean and standard deviation not applied yet.
      valid: int32 [M, 2], rows and columns of real patches, counted from the top left; all other
        patches are padding.
      text: replaces the picture in the prompt: special tokens spelled out, one slot token per
        visual token.
      grids: int32 [M, 2], rows and columns of the visual tokens of each image as they enter the
        decoder.
      boxes: float32 [M, 4], (top, left, bottom, right) of the part of the original picture that
        each image shows, as fractions of its height and width; below 0 or above 1 where padding
        surrounds the picture.
      slots: int32 [P], for each slot of `text` in order, the index of its visual token among those
        of all images; None: in order.
      pool_index: int32 [P, k], the patches that each visual token pools, -1 for none; None: the
        pooling is a regular grid.
      padding_share: float32 [M, patches], the share of real pixels in each patch; None: unused by
        the family.
    """

    images: np.ndarray
    valid: np.ndarray
    text: str
    grids: np.ndarray
    boxes: np.ndarray
    slots: np.ndarray | None = None
    pool_index: np.ndarray | None = None
    padding_share: np.ndarray | None = None


def load_picture(picture: Any) -> Image.Image:
    """The picture as 8-bit RGB: EXIF orientation applied, alpha composited over white.

    16-bit grey is scaled (not clipped) to 8 bit; CMYK, palette and 1-bit are converted; the first
    frame of an animation is used. Files must be within the limits of `processing.decode_image`.

    Args:
      picture: a Pillow image; an array: uint8 or uint16 [height, width], uint8 [height, width, 1, 3
        or 4]; or an encoded file in any form that `picture_bytes` reads (a path, bytes, a binary
        file, base64 text, a data: URL), or as a uint8 array [bytes].

    Returns:
      A Pillow image of mode RGB with at least one pixel.

    Raises:
      UserError: the picture is missing, damaged, empty, too large or of an unknown kind.
    """
    # What has pixels, and is neither an image of Pillow nor bytes: JAX's and torch's arrays.
    if hasattr(picture, "__array__") and not isinstance(picture, Image.Image | str | bytes):
        picture = _from_array(_as_numpy(picture))
    if not isinstance(picture, Image.Image):
        return _from_file(picture)
    check_size(picture.height, picture.width)
    try:
        picture.load()
        return images.to_rgb(picture)
    except images.BadImage as error:
        raise UserError(
            f"picture: a Pillow image of mode {picture.mode}: {error.detail}",
            allowed="modes of 8 or 16 bits",
        ) from error
    except Exception as error:  # Decoders of lazily opened files raise exceptions of any type.
        raise UserError(
            f"picture: cannot read a Pillow image of mode {picture.mode} ({first_line(error)})",
            fix="pass an undamaged image of mode RGB",
        ) from error


# What to do about a file, by the reason of a `BadImage`.
_FIXES = {
    "missing": "give the path of a file that is here, or its bytes; download it first if need be",
    "corrupt": "get the file again, undamaged",
    "too_large": "shrink the picture",
    "format": "pass one picture in one of these forms; convert other files to PNG or JPEG",
}


def _from_file(picture: Any) -> Image.Image:
    try:
        return Image.fromarray(images.decode(picture_bytes(picture)))
    except images.BadImage as error:
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else ""
        # Named once, and not at all where it is a whole picture.
        named = f" {name!r}" if 0 < len(name) <= 80 and name not in error.detail else ""
        raise UserError(
            f"picture: cannot use{named} ({error})",
            allowed=f"{KINDS} ({', '.join(images.FORMATS)}, up to {images.MAX_PIXELS:,} pixels); "
            "a Pillow image; a uint8 array [height, width, 3]",
            fix=_FIXES[error.reason],
        ) from error


def _as_numpy(array: Any) -> np.ndarray:
    try:
        return np.asarray(array)
    except Exception as error:  # torch's own types, gradients and devices.
        raise UserError(
            f"picture: {type(array).__name__} that is no NumPy array ({first_line(error)})",
            fix="pass NumPy's uint8 [height, width, 3]; of a torch tensor .detach().cpu().numpy()",
        ) from error


def _from_array(array: np.ndarray) -> Image.Image | bytes:
    """A Pillow image of an array, or the bytes of a file; see `load_picture`."""
    if array.dtype == np.uint8 and array.ndim == 1 and array.size:
        return array.tobytes()
    shape = array.shape[:2] if array.ndim == 3 and array.shape[2] == 1 else array.shape
    colour = len(shape) == 3 and shape[2] in (3, 4) and array.dtype == np.uint8
    grey = len(shape) == 2 and array.dtype.newbyteorder("=") in (np.uint8, np.uint16)
    if not (colour or grey) or 0 in shape:
        raise UserError(
            f"picture: array of {array.dtype} {list(array.shape)}",
            allowed="uint8 [height, width, 3 or 4], or uint8 or uint16 [height, width]; not empty",
            fix=_array_fix(array),
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Image.fromarray(np.ascontiguousarray(array.reshape(shape)))


def _array_fix(array: np.ndarray) -> str:
    if array.ndim == 4:
        return "pass the pictures of a batch one by one, in a list"
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        return "put channels last: array.transpose(1, 2, 0)"
    if np.issubdtype(array.dtype, np.floating):
        return "scale floats in [0, 1] by 255, round, and cast to uint8"
    if array.dtype == bool:
        return "multiply by 255 and cast to uint8"
    return "scale values to 0..255 and cast to uint8" if array.size else "pass one with pixels"


def check_size(height: int, width: int) -> None:
    """Raises UserError unless a picture of this size has between one pixel and the limit."""
    if height < 1 or width < 1 or height * width > images.MAX_PIXELS:
        raise UserError(
            f"picture: {width} x {height} pixels",
            allowed=f"1 to {images.MAX_PIXELS:,} pixels",
            fix="shrink the picture" if height * width > 0 else "pass a picture with pixels",
        )


def resize(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """Pillow's resize, across and then down: on 8-bit values, rounded after each pass.

    Pillow 13 takes the passes the other way round where the height shrinks much more than the
    width, which moves 8-bit pixels of text by up to 29 levels. This is the order of Pillow up to 12
    and of torch, which published models were trained with, under every version.

    Raises:
      UserError: the result does not fit into memory, for a picture of extreme aspect ratio.
    """
    check_work(image, height, width)
    first, code = (width, image.height), Image.Resampling(resample)
    if width * image.height > MAX_WORK_PIXELS:  # A narrow strip: the rows in between would not fit.
        first = (image.width, height)
    return image.resize(first, code).resize((width, height), code)


def check_work(image: Image.Image, height: int, width: int) -> None:
    """Raises UserError if `image` would be enlarged to more pixels than `MAX_WORK_PIXELS`."""
    if height * width > MAX_WORK_PIXELS:
        raise UserError(
            f"picture: {image.width} x {image.height} pixels would become {width} x {height}",
            allowed=f"up to {MAX_WORK_PIXELS:,} pixels before the last resize",
            fix="crop the picture to a less extreme aspect ratio",
        )


def unit(image: Image.Image) -> np.ndarray:
    """float32 [height, width, 3] in [0, 1] of an RGB image."""
    return np.asarray(image, np.float32) / np.float32(255)


def pictured(
    images: Sequence[Image.Image],
    *,
    patch: int,
    grid: tuple[int, int],
    text: str,
    boxes: Sequence[Sequence[float]],
) -> Pictured:
    """The result for images without padding that all have the same size and token grid.

    Args:
      images: M RGB images of one size.
      patch: edge of an encoder patch in pixels; a remainder at the right and bottom is unused.
      grid: rows and columns of visual tokens of each image.
      text: see `Pictured`.
      boxes: M x 4, see `Pictured`.
    """
    count = len(images)
    patches = (images[0].height // patch, images[0].width // patch)
    return Pictured(
        images=np.stack([unit(image) for image in images]),
        valid=np.tile(np.array(patches, np.int32), (count, 1)),
        text=text,
        grids=np.tile(np.array(grid, np.int32), (count, 1)),
        boxes=np.asarray(boxes, np.float32).reshape(count, 4),
    )
