"""Parquet shards: one file, or several with the same columns, read a row group at a time."""

import bisect
import collections
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.data.tables.base import digest_of
from efficient_vlm.errors import UserError, first_line, short, short_path
from efficient_vlm.processing.decode_image import BadRecord

CACHE_BYTES = 256 * 2**20
_BATCH = 256  # Rows that a scan turns into Python at once.


class ParquetTable:
    """Random access to the rows of Parquet files, in the order of their names.

    A row group is the least that can be read, and the newest ones stay in memory within a limit.
    Rows are drawn from everywhere, so files of small row groups (100 rows) are read faster than
    files of large ones.

    Args:
      paths: the files.
      cache_bytes: memory for row groups, as they are when decoded; one of them always stays.

    Raises:
      UserError: a file that cannot be read, is no Parquet, or has other columns than the first.
    """

    kind = "parquet 1"

    def __init__(self, paths: Sequence[Path], cache_bytes: int = CACHE_BYTES):
        self.paths = sorted(paths)
        self.folder = self.paths[0].parent
        self.digest = digest_of(self.paths)
        self._schema = None
        groups = []  # (file, row group) -> rows.
        for number, path in enumerate(self.paths):
            with _opened(path) as file:
                self._compare(path, file.schema_arrow)
                meta = file.metadata
                rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            groups += [(number, g, count) for g, count in enumerate(rows)]
        self.labels = _labels(self._schema)
        self.names = _names(self._schema)
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts = [0, *itertools.accumulate(count for _, _, count in groups)]
        if not self._starts[-1]:
            raise UserError(
                f"data.path: {short_path(self.paths[0])} has no rows",
                fix="give files with at least one row",
            )
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._cache_left = cache_bytes
        self._lock = threading.Lock()

    def _compare(self, path: Path, schema: Any) -> None:
        if self._schema is None:
            self._schema = schema
        elif set(schema.names) != set(self._schema.names):
            raise UserError(
                f"data.path: {short_path(path)} has the columns {short(sorted(schema.names))}",
                allowed=f"those of {short_path(self.paths[0])}: {short(sorted(self.names_of()))}",
                fix="give files of one kind; several kinds go into data.mixture",
            )

    def names_of(self) -> list[str]:
        """The outer columns."""
        return list(self._schema.names)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        table = self._group(number)
        return table.slice(index - self._starts[number], 1).to_pylist()[0]

    def _group(self, number: int) -> Any:
        """A row group as an Arrow table, from memory or from the disk."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            table = self._read(number)
            self._cache[number] = table
            self._cache_left -= table.nbytes
            while self._cache_left < 0 and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cache_left += oldest.nbytes
            return table

    def _read(self, number: int, columns: list[str] | None = None) -> Any:
        file, group = self._groups[number]
        path = self.paths[file]
        try:
            with _opened(path) as opened:
                return opened.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, ValueError) as error:  # Arrow's own errors are among them.
            raise BadRecord("corrupt", f"{short_path(path)}: {first_line(error)}") from error

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        wanted = {name.split("/")[0] for name in used} or set(self._schema.names)
        columns = [
            field.name
            for field in self._schema
            if field.name in wanted and (pictures or not _holds_bytes(field.type))
        ]
        for number in range(len(self._groups)):
            rows = self._starts[number + 1] - self._starts[number]
            try:
                table = self._read(number, columns)
            except BadRecord as error:
                yield from itertools.repeat(error, rows)
                continue
            for start in range(0, rows, _BATCH):
                yield from table.slice(start, _BATCH).to_pylist() if columns else [{}] * _BATCH


def _opened(path: Path) -> Any:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        return pq.ParquetFile(path)
    except (OSError, ArrowInvalid) as error:
        raise UserError(
            f"data.path: {short_path(path)} is not readable as Parquet ({first_line(error)})",
            fix="give Parquet files: --config.data.path='shards/*.parquet'",
        ) from error


def _holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds encoded pictures."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _names(schema: Any) -> list[str]:
    import pyarrow.types as types

    names = []
    for field in schema:
        names.append(field.name)
        if types.is_struct(field.type):
            inner = (field.type.field(i).name for i in range(field.type.num_fields))
            names += [f"{field.name}/{name}" for name in inner]
    return names


def _labels(schema: Any) -> dict[str, list[str]]:
    """Names of classes, which `datasets` writes beside the columns."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    found = {}
    for name, feature in features:
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and all(isinstance(each, str) for each in names):
            found[name] = names
    return found
