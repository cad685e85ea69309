"""Cells of a benchmark's table: lists, references, options, pictures and masks, however written."""

import ast
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficient_vlm.data.llava_rows import absent
from efficient_vlm.errors import short
from efficient_vlm.evaluation.metrics.choice import LETTERS
from efficient_vlm.processing import decode_image
from efficient_vlm.processing.decode_image import BadImage, BadRecord
from efficient_vlm.processing.picture_bytes import is_address, picture_bytes

_LONGEST_LIST = 20_000  # Characters of a list that is written out in a cell.


def listed(value: Any) -> list[Any]:
    """A value as a list: of itself, of nothing where it is absent, or as a cell spells it."""
    if isinstance(value, str) and value.strip().startswith("[") and len(value) <= _LONGEST_LIST:
        for read in (json.loads, ast.literal_eval):  # Neither runs anything.
            try:
                found = read(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list):
                return found
    if isinstance(value, list | tuple):
        return list(value)
    return [] if absent(value) else [value]


def references_of(value: Any) -> tuple[Any, ...]:
    """Answers: one, a list, or mappings that hold one each, as VQA's files do.

    A list of two or four numbers is one point or one box.
    """
    values = listed(value)
    if len(values) in (2, 4) and all(isinstance(v, int | float) for v in values):
        return (tuple(values),)
    found = []
    for each in values:
        if isinstance(each, Mapping):
            named = [each[key] for key in ("answer", "text", "caption") if key in each]
            each = named[0] if named else each
        if not absent(each):
            found.append(str(each) if isinstance(each, bool | int | float) else each)
    return tuple(found)


def options_of_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a multiple choice: those of one column, or one of each of several."""
    names = columns.get("options", "").split(",")
    if len(names) > 1:
        found = [row.get(name) for name in names]
        while found and absent(found[-1]):
            found.pop()
    else:
        found = listed(row.get(names[0]))
    if len(found) > len(LETTERS):
        raise BadRecord("malformed", f"{len(found)} options")
    return tuple("" if absent(each) else str(each) for each in found)


def letter_of(reference: Any, options: Sequence[str]) -> Any:
    """The letter of a reference that counts options from 0; others stay as they are."""
    number = isinstance(reference, str) and reference.isdecimal() and len(reference) < 3
    if number and reference not in options and int(reference) < len(options):
        return LETTERS[int(reference)]
    return reference


def pictures_of_row(
    row: Mapping[str, Any], columns: Mapping[str, str], folder: Path
) -> tuple[bytes, ...]:
    """The encoded pictures of a row, each of which decodes; BadImage for one that does not."""
    names = filter(None, columns.get("image", "").split(","))
    given = [row.get(name) for name in names]
    each_one = (each for value in given for each in (value if isinstance(value, list) else [value]))
    return tuple(picture(each, folder) for each in each_one if not absent(each))


def picture(value: Any, folder: Path) -> bytes:
    """The bytes of a picture that decodes."""
    if isinstance(value, Mapping):
        value = next((v for k in ("bytes", "path", "url") if not absent(v := value.get(k))), None)
    data = _file(value, folder) if isinstance(value, str) else picture_bytes(value)
    decode_image.decode(data)
    return data


def _file(text: str, folder: Path) -> bytes:
    if is_address(text):
        if text.lower().startswith("file:"):
            raise BadImage("outside", short(text))
        return picture_bytes(text)
    if "\0" in text:
        raise BadImage("missing", short(text))
    root = os.path.abspath(folder)
    path = Path(os.path.normpath(os.path.join(root, text)))
    try:
        if path.is_relative_to(root) and path.is_file():
            return decode_image.read(path)
        if path.is_file() or Path(text).is_file():
            raise BadImage("outside", short(text))
    except OSError:  # Longer than any path: base64.
        pass
    return picture_bytes(text)


def mask(value: Any) -> np.ndarray:
    """A mask as a picture (white inside) or rows of numbers, as bool [height, width]."""
    if isinstance(value, list):
        try:
            found = np.asarray(value).astype(bool)
        except ValueError:
            found = np.zeros(0)
        if found.ndim != 2 or not found.size:
            raise BadRecord("malformed", "a mask that is no rectangle")
        return found
    data = picture_bytes(value)
    return np.asarray(Image.fromarray(decode_image.decode(data)).convert("L")) > 127
