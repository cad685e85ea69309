"""Rows that a notebook holds."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.decode_image import MAX_BYTES, BadRecord
from efficient_vlm.processing.picture_bytes import picture_bytes
from efficient_vlm.processing.pictures.base import load_picture

# Fields that are pictures, or turns with pictures in their parts.
_HELD = ("image", "images", "messages", "content", "prompt", "chosen", "rejected")


class MemoryTable:
    """A `tables.base.Table` of mappings; their pictures may be anything that `load_picture` takes.

    Args:
      rows: see `llava_rows.read_row`.
      max_bytes: largest picture file.

    Raises:
      UserError: no rows, or no list of them.
    """

    kind, names = "memory 1", ()
    # A run that is not kept in files needs neither.
    digest = ""

    def __init__(self, rows: Sequence[Mapping[str, Any]], max_bytes: int = MAX_BYTES):
        if isinstance(rows, Mapping | str) or not isinstance(rows, Sequence) or not rows:
            raise UserError(
                f"rows: {short(rows)}",
                allowed='a list of {"images": [...], "messages": [{"role", "content"}, ...]}',
            )
        self._rows, self._max_bytes = rows, max_bytes
        self.labels: Mapping[str, Sequence[str]] = {}
        self.folder = Path()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Any:
        """Row `index` with its pictures as bytes of files."""
        return self._held(self._rows[index])

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        """All rows in order."""
        for index in range(len(self)):
            try:
                yield self.row(index)
            except BadRecord as error:
                yield error

    def _held(self, value: Any, picture: bool = False) -> Any:
        """A part of a row; `picture`: it stands where a picture does."""
        if isinstance(value, Mapping):
            if picture and ("bytes" in value or "path" in value):
                data, path = value.get("bytes"), value.get("path")
                return self._bytes(path if data is None else data)
            return {
                key: self._held(part, key in ("image", "images")) if key in _HELD else part
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._held(part, picture) for part in value]
        return self._bytes(value) if picture and value is not None else value

    def _bytes(self, picture: Any) -> bytes:
        if isinstance(picture, str | bytes) or hasattr(picture, "__fspath__"):
            return picture_bytes(picture, max_bytes=self._max_bytes)
        try:
            image, file = load_picture(picture), io.BytesIO()
        except UserError as error:
            raise BadRecord("format", str(error).splitlines()[0]) from error
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()
