"""Metrics of a run: one JSON object a line in metrics.jsonl, and TensorBoard on request.

A logger must never stop training: whatever fails here is reported once, then ignored.
"""

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.files import write_atomic
from efficient_vlm.terminal import print_warning

METRICS = "metrics.jsonl"


def plain(value: Any) -> Any:
    """Converts to JSON types: arrays become nested lists, NaN and Inf become null.

    Args:
      value: Python, NumPy or device scalar or array, string, or nested lists and dicts of them.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and friends
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        return str(value)
    return plain(array.tolist())


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All readable lines of a workdir's metrics.jsonl, in order; [] if there is none."""
    try:
        text = (Path(workdir) / METRICS).read_bytes()
    except FileNotFoundError:
        return []
    rows = (_parse(line) for line in text.split(b"\n"))
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def summary_writer() -> Any:
    """The class that writes TensorBoard files; UserError if its package is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard=True: tensorboardX is not installed",
            fix="pip install tensorboardX, or --config.train.tensorboard=False",
        ) from None
    return SummaryWriter


class MetricsWriter:
    """Appends to `<workdir>/metrics.jsonl`; a line is on the disk as a whole or not at all.

    An incomplete line of a killed process is removed on opening.

    Args:
      workdir: created if needed.
      tensorboard: also write `<workdir>/tensorboard` (needs tensorboardX).
      warn: receives one line when a writer fails for the first time.

    Raises:
      UserError: `tensorboard` is True but tensorboardX is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = False,
        *,
        warn: Callable[[str], None] | None = None,
    ):
        self.path = Path(workdir) / METRICS
        self._warn = warn or print_warning
        self._failed: set[str] = set()
        self._descriptor: int | None = None
        self._purge_step: int | None = None
        self._board: _Board | None = None
        if tensorboard:
            board = summary_writer()
            folder = str(self.path.parent / "tensorboard")
            self._board = _Board(lambda: board(folder, purge_step=self._purge_step))
        self._guard("metrics.jsonl", self._open)

    def write(self, step: int, metrics: Mapping[str, Any], split: str = "train") -> None:
        """Writes one line {"step", "split", "time", **metrics}. Never raises for a failing disk.

        Args:
          step: the step the metrics belong to.
          metrics: see `plain`.
          split: "train", "eval", ...
        """
        self._guard("metrics.jsonl", lambda: self._append(step, metrics, split))
        if self._board is not None:
            self._guard("tensorboard", lambda: self._board.put(step, plain(metrics), split))

    def truncate_after(self, step: int) -> None:
        """Drops all lines of later steps: a resumed run writes them again.

        Call it with the step resumed from (0 for a new run in an old workdir), before `write`.
        """
        self._purge_step = step + 1
        self._guard("metrics.jsonl", lambda: self._rewrite(step))

    def close(self) -> None:
        """Closes the files."""
        if self._descriptor is not None:
            self._guard("metrics.jsonl", lambda: os.close(self._descriptor))
            self._descriptor = None
        if self._board is not None:
            self._guard("tensorboard", self._board.close)
            self._board = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                self._warn(f"{name} cannot be written ({error}); training goes on without it")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            end = self.path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._descriptor, end)

    def _append(self, step: int, metrics: Mapping[str, Any], split: str) -> None:
        if self._descriptor is None:
            self._open()
        row = {"step": int(step), "split": split, "time": time.time(), **plain(metrics)}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError("disk full: line written in part")
        except OSError:
            # A file can shrink even on a full disk, so the next line will start at its beginning.
            os.ftruncate(self._descriptor, size)
            raise

    def _rewrite(self, step: int) -> None:
        if self._descriptor is None:
            self._open()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        rows = [(line, _parse(line)) for line in lines]
        kept = [line for line, row in rows if row is not None and row["step"] <= step]
        if len(kept) == len(lines):
            return
        os.close(self._descriptor)
        self._descriptor = None
        write_atomic(self.path, b"".join(line + b"\n" for line in kept))
        self._open()


class _Board:
    """A thread around tensorboardX, which blocks for ever after its own thread died (full disk).

    Args:
      make: builds the SummaryWriter, in the thread.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self._error = make, None
        self._rows: queue.Queue[tuple[int, dict[str, Any], str] | None] = queue.Queue(1000)
        self._thread: threading.Thread | None = None

    def put(self, step: int, metrics: dict[str, Any], split: str) -> None:
        """Queues a row without waiting; raises if the queue is full or the writer has failed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="tensorboard")
            self._thread.start()
        if self._error is not None:
            raise self._error
        self._rows.put_nowait((int(step), metrics, split))

    def close(self) -> None:
        """Waits up to five seconds for the last rows."""
        if self._thread is None:
            return
        self._rows.put_nowait(None)
        self._thread.join(timeout=5)
        if self._error is not None or self._thread.is_alive():
            raise self._error or OSError("the writer does not answer")

    def _run(self) -> None:
        try:
            writer = self._make()
            while (row := self._rows.get()) is not None:
                step, metrics, split = row
                for name, value in metrics.items():
                    if isinstance(value, (bool, int, float)):
                        writer.add_scalar(f"{split}/{name}", float(value), step)
            writer.close()
        except Exception as error:
            self._error = error
