"""The pictures that a row names or holds, and whether it is about more than these."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.picture_bytes import is_address, is_base64_picture

_PICTURE = r"(image|img|picture|photo|pixel_value)s?"
_MEDIA = r"(video|vid|audio|speech|sound|voice|music|point_?cloud|(video_?)?frame)s?"
# Keys that say that a row has more than text and the pictures that are read; in small letters, with
# underscores between words.
_FILES = r"_?\d*(_(path|file|url|name|bytes|base64|list)s?)?"
_MEDIA_KEY, _PICTURE_KEY = (re.compile(kind + _FILES) for kind in (_MEDIA, _PICTURE))
_NUMBERED_PICTURE = re.compile(_PICTURE + r"_?\d+")
# Values that say so, whatever their key.
_MEDIA_FILE = re.compile(r"\S+\.(mp4|avi|mov|mkv|webm|m4v|wav|mp3|flac|ogg|m4a|ply|pcd)", re.I)
_PICTURE_FILE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)", re.I)
# Placeholders: <video>, <image_1>, <|image_pad|>, </img>, [IMG]. With attributes they are HTML.
# One digit at a time: a repeated repetition would try all ways to part a long number.
_ENDS = r"([ _:-]?(\d|pad|(soft_)?token|placeholder|here|context|start|end|bos|eos))*"
_PLACEHOLDER = r"[<\[][\s|/]*(vila/|(start|end|begin|boi|eoi)_of_)?(%s)" + _ENDS + r"[\s|/]*[>\]]"
MEDIA_MARKER = re.compile(_PLACEHOLDER % _MEDIA, re.I)
PICTURE_MARKER = re.compile(_PLACEHOLDER % (_PICTURE + "|vision"), re.I)
_LONGEST = 4096  # Of a file's name; data: URLs are longer.
# Keys whose values are read, or name the row.
_READ = (
    *("id", "task", "image", "images", "conversations", "messages", "texts", "system"),
    *("question", "answer", "answers", "from", "role", "value", "content", "user", "assistant"),
)


def absent(value: Any) -> bool:
    """Whether a field says nothing: null, NaN (as tables write null), empty, or a structure of
    nothing but such fields."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, dict):
        return all(map(absent, value.values()))
    return value is None or (isinstance(value, str | bytes | list) and not value)


def pictures_of(row: Mapping[str, Any]) -> tuple[list[str | bytes], bool]:
    """Pictures under "image" or "images", and whether there are nulls among them.

    Each is a text (a path, a URL, base64), the bytes of a file, or {"bytes", "path"}, as tables
    store pictures: the bytes if there are any.

    Raises:
      BadRecord: "malformed" for anything else, or for different pictures under the two keys.
    """
    found, nulls = [], False
    for key in ("image", "images"):
        value = row.get(key)
        if absent(value):
            continue
        listed = value if isinstance(value, list) else [value]
        live = [picture_of(one) for one in listed if not absent(one)]
        if not all(isinstance(picture, str | bytes) for picture in live):
            raise BadRecord("malformed", f"{key} is {short(value)}")
        found.append(live)
        nulls |= len(live) < len(listed)
    live = [pictures for pictures in found if pictures]
    if len(live) == 2 and live[0] != live[1]:
        raise BadRecord("malformed", "different pictures under image and under images")
    return (live[0] if live else []), nulls


def picture_of(value: Any) -> Any:
    """The text or bytes of one picture, see `pictures_of`; what is none stays as it is."""
    if isinstance(value, dict):
        data = value.get("bytes")
        if absent(data):
            path = value.get("path")
            return value.get("url") if absent(path) else path
        if isinstance(data, str) and not (is_address(data) or is_base64_picture(data)):
            return value
        value = data
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def names_of(row: Mapping[str, Any]) -> set[str]:
    """The file names of the pictures of a row, of those too whose bytes lie beside the name."""
    values = []
    for key in ("image", "images"):
        value = row.get(key)
        values += value if isinstance(value, list) else [value]
    paths = [one.get("path") if isinstance(one, dict) else one for one in values]
    short_ones = [path for path in paths if isinstance(path, str) and len(path) <= _LONGEST]
    return {path.replace("\\", "/").split("/")[-1] for path in short_ones}


def check_keys(row: Mapping[str, Any], pictures: Collection, names: Collection[str]) -> None:
    """Raises BadRecord ("media") for a row, or a turn, that is about more than what is read of it.

    Args:
      row: its fields.
      pictures: those that are read; only whether there are any matters.
      names: of their files.
    """
    for key, value in row.items():
        silent = absent(value) or (isinstance(value, list) and all(map(absent, value)))
        if key in _READ or silent or value is False:
            continue
        word = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", str(key)).lower()
        files = [file for file in _files(value) if len(file) <= _LONGEST]
        if _MEDIA_KEY.fullmatch(word) or any(map(_MEDIA_FILE.fullmatch, files)):
            raise BadRecord("media", f"{short(key)} is not read")
        shown = [file for file in files if _PICTURE_FILE.fullmatch(file)]
        if pictures:  # They may be named again, or by the address that they came from.
            again = all("://" in file or file.split("/")[-1] in names for file in shown)
            other = not again or (_NUMBERED_PICTURE.fullmatch(word) and not shown)
        else:
            other = shown or _PICTURE_KEY.fullmatch(word)
        if other:
            raise BadRecord("media", f"{short(key)} is not read; pictures lie under image")


def _files(value: Any) -> list[str]:
    """The texts of a value that may name files."""
    values = value if isinstance(value, list) else [value]
    values = [one.get("path", one.get("url")) if isinstance(one, dict) else one for one in values]
    return [one for one in values if isinstance(one, str)]
