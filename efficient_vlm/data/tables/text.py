"""CSV and TSV files: a line of names, then rows; a field in quotes may hold line breaks."""

import codecs
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.data.tables.base import unreadable
from efficient_vlm.errors import UserError, first_line, short, short_path
from efficient_vlm.processing.decode_image import BadRecord

_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 2**27  # Pictures in base64 lie in fields.


class TextTable:
    """The rows of one file (UTF-8, or UTF-16 with its mark), kept in memory as texts.

    The delimiter is a tab in a .tsv, else the one of `,;|` and the tab that the first line has most
    of. A row with more or fewer fields than the first line is refused.

    Args:
      path: the file.

    Raises:
      UserError: no such file, no text, no rows, or names that are empty or not unique.
    """

    kind = "csv 1"

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.folder = self.path.parent
        self.labels: dict[str, Sequence[str]] = {}
        text, self.digest = _read(self.path)
        first = text.split("\n", 1)[0]
        tab = self.path.suffix.lower() == ".tsv"
        delimiter = "\t" if tab else max(_DELIMITERS, key=first.count)
        self.names, self._rows = self._parsed(text, delimiter)

    def _parsed(self, text: str, delimiter: str) -> tuple[list[str], list[list[str]]]:
        # The limit is the module's: other readers get theirs back.
        limit = csv.field_size_limit(_LONGEST_FIELD)
        try:
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            names, *rows = [line for line in lines if line] or [[]]
        except csv.Error as error:
            raise UserError(
                f"data.path: {short_path(self.path)} is not valid CSV ({first_line(error)})",
                allowed='fields with line breaks or delimiters in double quotes, "" for a quote',
                fix="correct the file there",
            ) from error
        finally:
            csv.field_size_limit(limit)
        names = [name.strip() for name in names]
        if len(set(names)) < len(names) or not all(names):
            raise UserError(
                f"data.path: the names in the first line of {short_path(self.path)} are "
                f"{short(names)}",
                allowed="a name for each column, each another",
            )
        if not rows:
            raise UserError(
                f"data.path: {short_path(self.path)} has no rows",
                fix="give a file with a line of names and at least one row",
            )
        return names, rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, str]:
        fields = self._rows[index]
        if len(fields) != len(self.names):
            raise BadRecord("malformed", f"{len(fields)} fields, names: {len(self.names)}")
        return dict(zip(self.names, fields, strict=True))

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        del pictures, used  # All is in memory.
        for index in range(len(self)):
            try:
                yield self.row(index)
            except BadRecord as error:
                yield error


def _read(path: Path) -> tuple[str, str]:
    """(text, SHA-256 of the file)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: {short_path(path)} is not UTF-8 (byte {error.start})",
            fix="save it as UTF-8",
        ) from error
    return text, hashlib.sha256(data).hexdigest()
