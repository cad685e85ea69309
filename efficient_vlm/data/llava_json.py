"""JSON and JSON lines: rows {"id", "image", "conversations"} or {"images", "messages"}.

What a row may hold: `llava_rows`. The fingerprint covers the file only: pictures are read when they
are needed, so a picture that is replaced under its old name is not noticed.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.data.columns import Columns
from efficient_vlm.data.llava_rows import read_row
from efficient_vlm.data.row_source import DEFAULT_TASK, Reading, RowSource
from efficient_vlm.errors import UserError, first_line
from efficient_vlm.processing import decode_image as images

__all__ = ["DEFAULT_TASK", "JsonSource", "JsonTable", "LlavaSource"]

_NAMES = 1000  # Rows in which the names of fields are looked for.


class JsonTable:
    """The rows of one file, kept as compact JSON in memory; see `tables.base.Table`.

    Args:
      path: a JSON list or JSON lines.

    Raises:
      UserError: no such file, not JSON, or no rows.
    """

    kind = "llava_json 2"

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.folder = self.path.parent
        self.labels: dict[str, Sequence[str]] = {}
        self.rows, self.digest = _read(self.path)

    @property
    def names(self) -> list[str]:
        """Keys of the first rows."""
        rows = (_parse(row) or {} for row in self.rows[:_NAMES])
        return list(dict.fromkeys(name for row in rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any] | None:
        return _parse(self.rows[index])

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        del pictures, used  # All is in memory.
        return map(_parse, self.rows)


class JsonSource(RowSource):
    """Random access to the rows of a JSON file.

    Attributes:
      path: the file.
      placed: whether any row of the file has a picture behind some of its text.
    """

    def __init__(self, table: JsonTable, reading: Reading, columns: Columns | None = None):
        self.path = table.path
        super().__init__(table, reading, columns, read_row)

    def _own_key(self, index: int, row: Any) -> bytes:
        del row
        return self.table.rows[index]


class LlavaSource(JsonSource):
    """`JsonSource` of a path.

    Args:
      path: the JSON or JSONL file.
      split, test_fraction, pictures, max_bytes: see `Reading`.

    Raises:
      UserError: no such file or folder, not JSON, or no rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        test_fraction: float = 0.0,
        pictures: str | Path | None = None,
        max_bytes: int = images.MAX_BYTES,
    ):
        reading = Reading(split, test_fraction, pictures or "", max_bytes)
        super().__init__(JsonTable(path), reading)


def _read(path: Path) -> tuple[list[bytes], str]:
    """(rows, SHA-256 of the file). Rows that are not JSON objects are skipped and counted later."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path: cannot read {path} ({error.strerror or error})",
            fix="give a JSON or JSONL file: --config.data.path=my.json",
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's ">".
        data = data.decode("utf-16", "replace").encode("utf-8", "replace")
    text = data.removeprefix(codecs.BOM_UTF8).strip()
    if text.startswith(b"["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"data.path: {path} is not valid JSON ({first_line(error)})",
                allowed="a JSON list of rows, or one JSON object a line",
                fix="correct the file there",
            ) from error
        rows = [json.dumps(item).encode() for item in items]
    else:
        rows = [line for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"data.path: {path} has no rows", fix="give a file with at least one row")
    if all(_parse(row) is None for row in rows):
        raise UserError(
            f"data.path: no line of {path} is a JSON object",
            allowed="a JSON list of rows, or one JSON object a line",
            fix='rows look like {"id": "1", "image": "a.png", "conversations": [...]}',
        )
    return rows, digest


def _parse(row: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None
