"""A bar that counts bytes, for reading, hashing and writing checkpoints; for terminals only."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def byte_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr while the block runs; nothing when stderr is not a terminal.

    Args:
      total: bytes at the end.
      label: what is being done, e.g. "reading".

    Yields:
      A function to call with the number of bytes just finished.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def progress(items: Iterable[T], size: Callable[[T], int], total: int, label: str) -> Iterator[T]:
    """Yields `items` and advances the bar by `size(item)` bytes after each.

    Args:
      items: what to iterate over.
      size: bytes of one item.
      total: bytes of all items.
      label: what is being done, e.g. "reading".
    """
    with byte_bar(total, label) as advance:
        for item in items:
            yield item
            advance(size(item))
