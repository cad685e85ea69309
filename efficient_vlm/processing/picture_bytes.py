"""A picture in any form that has bytes -> the bytes of its file. Nothing is fetched."""

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import MAX_BYTES, BadImage, known_start, read

KINDS = "a path, bytes, a binary file, base64 text or a data: URL"
_MAX_PATH = 4096  # Longer texts are no paths on any system that we run on.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|data:", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+[=\s]*")


def is_address(text: str) -> bool:
    """Whether a text is a URL (http:, file:, data: and others) and no plain path."""
    return bool(_ADDRESS.match(text))


def is_base64_picture(text: str) -> bool:
    """Whether a text is base64 of a file that begins as a picture does."""
    try:
        return bool(_BASE64.fullmatch(text)) and known_start(_first_bytes(text))
    except BadImage:  # Not base64 from its first characters on.
        return False


def picture_bytes(picture: Any, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of an encoded picture, within a limit that is checked before they are copied.

    Args:
      picture: a path; bytes, bytearray or memoryview; a binary file or BytesIO, which is read from
        its beginning; a text that is a path, base64, a data: or a file: URL; base64 or a data: URL
        as bytes, as `base64.b64encode` gives them; or a mapping as tables and clients write
        pictures, {"bytes": ..., "path": ..., "url": ...}, the first of these that is used.
      max_bytes: largest size.

    Raises:
      BadImage: "missing" (no file, or an address that would have to be fetched), "too_large",
        "corrupt" (damaged base64) or "format" (none of these forms).
    """
    if isinstance(picture, Mapping):
        given = [picture.get(name) for name in ("bytes", "path", "url")]
        # Tables write NaN where nothing is.
        picture = next((value for value in given if value is not None and value == value), None)
    if isinstance(picture, str):
        return _of_text(picture, max_bytes)
    if isinstance(picture, os.PathLike):
        return read(Path(picture), max_bytes=max_bytes)
    if isinstance(picture, bytes | bytearray | memoryview):
        return _of_bytes(memoryview(picture).cast("B"), max_bytes)
    if hasattr(picture, "read"):
        return _of_bytes(_of_file(picture, max_bytes), max_bytes)
    raise BadImage("format", f"a picture of type {type(picture).__name__}")


def _of_bytes(data: memoryview | bytes, max_bytes: int) -> bytes:
    """A file, or its text in base64 or a data: URL."""
    head = bytes(data[:64])
    if head.isascii() and not known_start(head):
        text = head.decode().lstrip()
        if text[:5].lower() == "data:":
            _check_size(len(data) // 3, max_bytes)  # As the longest data: URL, before it is copied.
            return _of_text(bytes(data).decode("latin-1"), max_bytes)
        if _BASE64.fullmatch(text) and known_start(_first_bytes(text)):
            return _decoded(data, max_bytes)
    _check_size(len(data), max_bytes)
    return bytes(data)


def _of_text(text: str, max_bytes: int) -> bytes:
    if text[:1].isspace() and text.lstrip()[:5].lower() == "data:":
        text = text.lstrip()
    found = _ADDRESS.match(text)
    scheme = found[0].rstrip("/:").lower() if found else ""
    if scheme == "data":
        return _of_data_url(text, max_bytes)
    if scheme == "file":
        return read(
            urllib.request.url2pathname(urllib.parse.urlsplit(text).path), max_bytes=max_bytes
        )
    if scheme:
        raise BadImage("missing", f"{short(text)}: nothing is fetched over {scheme}:")
    if _is_file(text) or not _BASE64.fullmatch(text) or not known_start(_first_bytes(text)):
        return read(text, max_bytes=max_bytes)
    return _decoded(text, max_bytes)


def _is_file(text: str) -> bool:
    try:
        return len(text) <= _MAX_PATH and Path(text).is_file()
    except (OSError, ValueError):  # A name that is too long for the system, or holds a NUL.
        return False


def _of_data_url(text: str, max_bytes: int) -> bytes:
    """data:[type][;base64],... (RFC 2397)."""
    head, comma, body = text[len("data:") :].partition(",")
    if not comma:
        raise BadImage("corrupt", f"{short(text)}: a data URL without a comma")
    if head.strip().lower().endswith("base64"):
        # Quoted as in addresses ("%2B"), which some clients do.
        return _decoded(urllib.parse.unquote(body) if "%" in body else body, max_bytes)
    _check_size(len(body) // 3, max_bytes)  # Quoted, a byte has three characters.
    data = urllib.parse.unquote_to_bytes(body)
    _check_size(len(data), max_bytes)
    return data


def _decoded(text: str | bytes | memoryview, max_bytes: int) -> bytes:
    """Base64 with either alphabet, with or without line breaks and padding."""
    # Lines of 76 characters and their breaks are the longest form: 78 / 76 of four thirds.
    _check_size(len(text) * 3 // 4 * 76 // 78, max_bytes)
    text = text if isinstance(text, str) else bytes(text).decode("latin-1")
    text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage("corrupt", f"{short(text)}: damaged base64 ({error})") from error
    _check_size(len(data), max_bytes)
    return data


_URL_SAFE = str.maketrans("-_", "+/")


def _first_bytes(text: str) -> bytes:
    """What the beginning of a text says, if it is base64."""
    head = "".join(text[:64].split())[:24]
    return _decoded(head[: len(head) // 4 * 4], MAX_BYTES)


def _of_file(file: Any, max_bytes: int) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise BadImage("format", f"a text file ({type(file).__name__}); open it with mode 'rb'")
    longest = max_bytes * 3 + 4096  # A quoted data: URL, and its head.
    try:
        # As Pillow does: one that was just written stands at its end.
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        data = file.read(longest)
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation) as error:
        raise BadImage("missing", f"a file ({type(file).__name__}): {error}") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise BadImage(
            "format", f"a file ({type(file).__name__}) that gives {type(data).__name__}, not bytes"
        )
    return bytes(data)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadImage("too_large", f"{size:,} bytes, limit {max_bytes:,}")
