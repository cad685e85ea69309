"""Where the time of a run goes, over all the processes that it took: goodput = productive / total.

Time between processes, when nothing ran, is not counted.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.files import write_atomic

__all__ = ["BUCKETS", "Goodput"]

FILE = "goodput.json"
# What they are stands in the report, `report.sections.training.TIMES`.
BUCKETS = ("productive", "lost", "start", "compile", "data", "checkpoint", "eval")


class Goodput:
    """Seconds by bucket, kept in `<workdir>/goodput.json`.

    Args:
      workdir: of the run.
      warn: receives a line if the file cannot be written; training goes on.
      keep: whether to write at all (one process of several does).
    """

    def __init__(self, workdir: Path, *, warn: Callable[[str], None], keep: bool = True):
        self._path, self._warn, self._keep = workdir / FILE, warn, keep
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            stored = json.loads(self._path.read_text())
            self.seconds |= {name: float(stored.get(name, 0.0)) for name in BUCKETS}

    def add(self, bucket: str, seconds: float) -> None:
        """Adds time."""
        self.seconds[bucket] += max(0.0, seconds)

    @contextlib.contextmanager
    def timed(self, bucket: str) -> Iterator[None]:
        """Adds the time that the block takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(bucket, time.monotonic() - start)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Productive seconds of all; 0 before the first."""
        return self.seconds["productive"] / self.total if self.total else 0.0

    def state(self) -> dict[str, float]:
        """For the metadata of a checkpoint."""
        return {"productive": self.seconds["productive"]}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Counts steps that were done after the checkpoint resumed from as lost.

        Args:
          state: of that checkpoint; None for a run without one.
        """
        kept = float((state or {}).get("productive", 0.0))
        kept = min(kept, self.seconds["productive"])
        self.seconds["lost"] += self.seconds["productive"] - kept
        self.seconds["productive"] = kept

    def write(self) -> None:
        """Writes the file."""
        if not self._keep:
            return
        try:
            write_atomic(self._path, (json.dumps(self.summary(), indent=1) + "\n").encode())
        except OSError as error:
            self._keep = False
            self._warn(f"{FILE} cannot be written ({error}); training goes on without it")

    def summary(self) -> dict[str, float]:
        """Seconds by bucket, "total" and "goodput"."""
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return rounded | {"total": round(self.total, 3), "goodput": round(self.share, 4)}
