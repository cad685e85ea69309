"""Encoded image bytes to uint8 arrays, with every limit checked before a pixel is decoded.

The preprocessing standard (version it when it changes, it is part of the data fingerprint): EXIF
orientation applied, alpha composited on white, 16-bit grey rescaled to 8 bit, first frame of an
animation, RGB, Pillow bicubic with antialiasing.
"""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

STANDARD = "exif,white,rgb8,bicubic-1"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
LETTERBOX_GREY = 127
RESIZE_MODES = ("stretch", "letterbox")
# First bytes of the allowed formats: a file that starts right but does not parse is damaged, any
# other file is of a format that we do not read.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


class BadRecord(Exception):
    """A sample that cannot be used; it is skipped and counted under `reason`.

    Args:
      reason: one of `data.records.REASONS`.
      detail: what a person needs to find the sample (file name, length, ...).
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class BadImage(BadRecord):
    """An image that cannot be used: reason "missing", "corrupt", "too_large" or "format"."""


def read(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Bytes of an image file, read only when the size on disk is within `max_bytes`.

    Raises:
      BadImage: "missing" (absent, a folder, not readable) or "too_large".
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise BadImage("missing", str(path))
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name.
        raise BadImage("missing", f"{path}: {error}") from error
    if len(data) > max_bytes:
        raise BadImage("too_large", f"{path}: more than {max_bytes} bytes")
    return data


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """Decodes one image by the standard in the module docstring.

    Args:
      data: an encoded PNG, JPEG, WEBP, GIF or BMP file.
      max_pixels: largest width x height; compared with the header before decoding.
      max_bytes: largest encoded size.

    Returns:
      uint8 [height, width, 3].

    Raises:
      BadImage: "corrupt" (damaged, truncated), "too_large" or "format".
    """
    return np.asarray(_decode(data, max_pixels, max_bytes))


def _decode(data: bytes, max_pixels: int, max_bytes: int) -> Image.Image:
    """`decode` before the last copy: a Pillow image of mode RGB."""
    if len(data) > max_bytes:
        raise BadImage("too_large", f"{len(data)} bytes, limit {max_bytes}")
    # Pillow's own bomb limit stays in force: a caller can tighten it here but not lift it.
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > limit:
            raise BadImage("too_large", f"{width} x {height} pixels, limit {limit}")
        image.load()
        return to_rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        known = data.startswith(_MAGIC) or not data
        raise BadImage("corrupt" if known else "format", str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage("too_large", str(error)) from error
    except Exception as error:
        # Decoders meet hostile bytes with all kinds of exceptions (OSError, SyntaxError,
        # struct.error, zlib.error, KeyError...); each of them means a damaged file.
        raise BadImage("corrupt", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Orientation, alpha on white, 16 to 8 bit, then RGB."""
    if image.mode == "RGB" and not image.info:
        return image
    with contextlib.suppress(Exception):  # A broken EXIF block says nothing about the pixels.
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey at 255 and give a white image.
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load(
    data: bytes,
    size: tuple[int, int],
    *,
    mode: str = "stretch",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> np.ndarray:
    """Decodes and resizes; see `decode` for limits and errors, `resize` for `mode`.

    Returns:
      uint8 [size[0], size[1], 3].
    """
    return np.asarray(_resize(_decode(data, max_pixels, max_bytes), size, mode))


def resize(image: np.ndarray, size: tuple[int, int], *, mode: str = "stretch") -> np.ndarray:
    """Pillow bicubic (antialiased) resize.

    Args:
      image: uint8 [height, width, 3].
      size: (height, width) of the result.
      mode: "stretch", or "letterbox": keep the aspect, centre, pad with grey 127.

    Returns:
      uint8 [size[0], size[1], 3].
    """
    return np.asarray(_resize(Image.fromarray(image), size, mode))


def _resize(image: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    target = (size[1], size[0])  # Pillow counts width first.
    if image.size == target:
        return image
    if mode == "stretch":
        return image.resize(target, Image.Resampling.BICUBIC)
    scale = min(target[0] / image.width, target[1] / image.height)
    inner = tuple(max(1, min(t, round(s * scale))) for s, t in zip(image.size, target, strict=True))
    canvas = Image.new("RGB", target, (LETTERBOX_GREY,) * 3)
    offset = ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2)
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), offset)
    return canvas


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [height, width, 3] array, without filter and by Huffman codes only.

    Noise does not compress by matching: searching for matches, as Pillow does at every level,
    takes four times as long and gives larger files.
    """
    height, width, channels = image.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # First byte: filter 0.
    rows[:, 1:] = image.reshape(height, -1)
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    body = packer.compress(rows.data) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
