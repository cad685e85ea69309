"""What a table is, and hashes of files."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from efficient_vlm.errors import UserError, short_path


class Table(Protocol):
    """Random access to raw rows; any number of threads may read at once.

    Attributes:
      kind: name and version of the reader, part of the fingerprint.
      digest: hex SHA-256 of the content.
      names: of the columns, those inside others as "outer/inner"; () where rows name their own.
      labels: column -> names of its classes.
      folder: where relative paths begin.
    """

    kind: str
    digest: str
    names: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    folder: Path

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """Row `index`: a mapping, or what is none of them; raises `BadRecord`."""
        ...

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        """All rows in order, a `BadRecord` in the place of one that cannot be read.

        Args:
          pictures: whether encoded pictures are needed; a table may leave them out.
          used: columns that are needed; () for all.
        """
        ...


def digest_of(paths: Iterable[Path]) -> str:
    """Hex SHA-256 over the names and the bytes of files.

    Raises:
      UserError: a file that cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise unreadable(path, error) from error
        total.update(path.name.encode("utf-8", "replace") + b"\0" + content)
    return total.hexdigest()


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be read."""
    why = getattr(error, "strerror", None) or error
    return UserError(
        f"data.path: cannot read {short_path(path)} ({why})",
        fix="give a file or folder that is there: --config.data.path=FILE",
    )
