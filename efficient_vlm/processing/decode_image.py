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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from efficient_vlm.errors import first_line, short_path

STANDARD = "exif,white,rgb8,bicubic-1"
# AVIF is a part of Pillow from 11.3 on, of most of its wheels.
_AVIF = ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *_AVIF)
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
LETTERBOX_GREY = 127
RESIZE_MODES = ("stretch", "letterbox")
# First bytes of the allowed formats: a file that starts right but does not parse is damaged, any
# other file is of a format that we do not read.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# "ftyp" at byte 4, then what ISO 14496-12 calls a brand: AVIF's, and those of HEIC.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# Text of a PNG that is still read where the rest of it exceeds Pillow's limits: EXIF orientation
# may lie there.
_MAX_TEXT = 2**16
# One of these is in a PNG that may have an orientation.
_ORIENTING = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


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
    name = short_path(path)
    try:
        path = Path(path)
        if not path.is_file():
            raise BadImage("missing", name)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name.
        why = getattr(error, "strerror", None) or type(error).__name__
        raise BadImage("missing", f"{name}: {why}") from error
    if len(data) > max_bytes:
        raise BadImage("too_large", f"{name}: more than {max_bytes} bytes")
    return data


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """Decodes one image by the standard in the module docstring.

    Args:
      data: an encoded file of one of `FORMATS`, or HEIC where the package pillow-heif is installed.
      max_pixels: largest width x height; compared with the header before decoding.
      max_bytes: largest encoded size.

    Returns:
      uint8 [height, width, 3].

    Raises:
      BadImage: "corrupt" (damaged, truncated), "too_large" or "format".
    """
    return np.asarray(_decode(data, max_pixels, max_bytes))


def picture_size(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> tuple[int, int]:
    """Height and width that `decode` would give, from the header alone.

    Args and errors: see `decode`; damage behind the header is not seen.
    """
    return _decode(data, max_pixels, max_bytes, _oriented_size)


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    # Pillow decodes all of a PNG to look for what may stand behind the pixels.
    if image.format == "PNG" and not any(mark in image.fp.getvalue() for mark in _ORIENTING):
        return image.height, image.width
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _decode(data: bytes, max_pixels: int, max_bytes: int, read: Callable | None = None) -> Any:
    """`decode` before the last copy: a Pillow image of mode RGB; or what `read` finds in an image
    that has only been opened."""
    if len(data) > max_bytes:
        raise BadImage("too_large", f"{len(data)} bytes, limit {max_bytes}")
    # Pillow's own bomb limit stays in force: a caller can tighten it here but not lift it.
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    formats = FORMATS
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        formats = (*FORMATS, _heif())
    try:
        try:
            return _opened(data, formats, limit, read)
        except ValueError:
            # Pillow refuses long texts and colour profiles of a PNG, whatever its pixels: without
            # them they are decoded, and in no more memory.
            bare = without_texts(data)
            if len(bare) == len(data):
                raise
            return _opened(bare, formats, limit, read)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        if known_start(data) or not data:
            what = "damaged from the beginning" if data else "an empty file"
            raise BadImage("corrupt", what) from error
        raise BadImage("format", f"begins with {data[:8]!r}, like no picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage("too_large", first_line(error)) from error
    except Exception as error:
        # Decoders meet hostile bytes with all kinds of exceptions (OSError, SyntaxError,
        # struct.error, zlib.error, KeyError...); each of them means a damaged file.
        raise BadImage("corrupt", f"{type(error).__name__}: {first_line(error)}") from error


def _opened(data: bytes, formats: tuple[str, ...], limit: int, read: Callable | None) -> Any:
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > limit:
        raise BadImage("too_large", f"{width} x {height} pixels, limit {limit}")
    if read is not None:
        return read(image)
    image.load()
    return to_rgb(image)


def _heif() -> str:
    """The name of the format that a HEIC file has for Pillow, whose plugin is another package's."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
    if "HEIF" not in Image.OPEN:
        raise BadImage("format", "HEIC, for which Pillow needs a plugin: pip install pillow-heif")
    return "HEIF"


def known_start(data: bytes) -> bool:
    """Whether bytes begin like a file of a format that is read; 12 bytes are enough."""
    brands = (*_HEIC_BRANDS, *(_AVIF_BRANDS if _AVIF else ()))
    return data.startswith(_MAGIC) or (data[4:8] == b"ftyp" and data[8:12] in brands)


def without_texts(png: bytes) -> bytes:
    """A PNG without colour profile and without all but short, uncompressed texts; others as they
    are."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    parts, at, room = [png[:8]], 8, _MAX_TEXT
    while at + 12 <= len(png):
        (length,), name = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        end = at + 12 + length
        text = name in (b"tEXt", b"iTXt")
        if name == b"iTXt":  # Keyword, a zero, then 1 for compressed text.
            key = png.find(b"\0", at + 8, end)
            text = key > 0 and png[key + 1 : key + 2] == b"\0"
        if text and length <= room:
            room -= length
        elif name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            at = end
            continue
        parts.append(png[at:end])
        at = end
    return b"".join([*parts, png[at:]])


def to_rgb(image: Image.Image) -> Image.Image:
    """Orientation, alpha on white, 16 to 8 bit, then RGB; see the module docstring.

    Raises:
      BadImage: "format" for values without a known scale.
    """
    if image.mode == "RGB" and not image.info:
        return image
    if image.mode == "F":
        raise BadImage("format", "floats of unknown scale; scale them to 0..255, as 8-bit grey")
    with contextlib.suppress(Exception):  # A broken EXIF block says nothing about the pixels.
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey at 255 and give a white image.
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """uint8 of whole numbers; see the module docstring."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise BadImage(
            "format", f"grey values of {low} to {high}; scale them to 0..255, as 8-bit grey"
        )
    if mode == "I" and high <= 255:
        return grey.astype(np.uint8)
    return np.rint(grey / 257.0).astype(np.uint8)


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
