"""The rows of a table in a file, as mappings: JSON lines, JSON, CSV, TSV and Parquet."""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError, first_line, short_path
from efficient_vlm.processing.decode_image import MAX_BYTES

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BATCH = 32  # Rows of a Parquet file in memory at once, pictures and all.


def read_table(path: Path) -> tuple[list[str], Iterator[Any]]:
    """Names of the columns, and the rows in order: mappings, or None for what is no row.

    Raises:
      UserError: no such file, one of another kind, or a damaged one.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(
            f"benchmark: {short_path(path)} is of no known kind", allowed=", ".join(KINDS)
        )
    # Unlike that of Path, it says no to names that no system has.
    if not os.path.isfile(path):
        raise UserError(f"benchmark: no file {short_path(path)}", fix="give the path of a file")
    if kind == ".parquet":
        return _parquet(path)
    rows = _separated(path, kind) if kind in (".csv", ".tsv") else _json(path, kind)
    names = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
    return list(names), iter(rows)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def _json(path: Path, kind: str) -> list[Any]:
    text = _text(path).strip()
    if kind == ".jsonl" and not text.startswith("["):
        return [_row(line) for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"benchmark: {short_path(path)} is not valid JSON ({first_line(error)})",
            allowed="a list of rows, or in .jsonl one row a line",
        ) from None
    if isinstance(found, dict):  # Rows under a name, beside notes about the file.
        lists = [value for value in found.values() if _is_rows(value)]
        found = lists[0] if len(lists) == 1 else found
    if not _is_rows(found):
        raise UserError(
            f"benchmark: {short_path(path)} holds no list of rows",
            allowed='[{"question": ...}, ...], or {"data": [{"question": ...}, ...]}',
        )
    return [row if isinstance(row, dict) else None for row in found]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _separated(path: Path, kind: str) -> list[dict[str, Any] | None]:
    """Rows of a CSV or TSV file with a header; cells may hold pictures in base64."""
    before = csv.field_size_limit(2 * MAX_BYTES)
    try:
        reader = csv.DictReader(
            io.StringIO(_text(path), newline=""), delimiter="\t" if kind == ".tsv" else ","
        )
        # A row with more cells than the header has None among its names.
        return [row if None not in row else None for row in reader]
    except csv.Error as error:
        raise UserError(f"benchmark: {short_path(path)} is no table ({error})") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> tuple[list[str], Iterator[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"benchmark: {short_path(path)} is no Parquet file ({first_line(error)})"
        ) from None

    def rows() -> Iterator[Any]:
        try:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"benchmark: {short_path(path)} is damaged ({first_line(error)})",
                fix="get the file again",
            ) from None
        finally:
            file.close()

    return list(file.schema_arrow.names), rows()
