"""Unusable records: counted by reason, and too many of them stop the run."""

import collections
import math
import threading
from collections.abc import Iterable, Mapping

import numpy as np

from efficient_vlm.data.records import REASONS
from efficient_vlm.errors import UserError
from efficient_vlm.processing.decode_image import BadRecord


def told(counts: Mapping[str, int], total: int, what: str) -> str:
    """Counts by reason in words: "3 of 90 training samples skipped (markers 2, missing 1)"."""
    parts = ", ".join(f"{reason} {number}" for reason, number in counts.items())
    return f"{sum(counts.values())} of {total} {what} ({parts})"


class SkipCounter:
    """Counts unusable records, each once, and decides when there are too many. Thread-safe.

    Args:
      total: records in the source.
      max_fraction: the share above which the run stops.
    """

    def __init__(self, total: int, max_fraction: float):
        self._total = total
        self._max_fraction = max_fraction
        self._read = bytearray(total)
        self._read_count = 0
        # Text only: an exception would keep its frames, and the image in them, alive.
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[str, int]:
        """Unusable records by reason."""
        with self._lock:
            return dict(sorted(collections.Counter(self._bad.values()).items()))

    def state(self) -> dict[str, list[int]]:
        """Unusable records, as JSON for a checkpoint: their numbers by reason."""
        with self._lock:
            found: dict[str, list[int]] = {}
            for index, reason in sorted(self._bad.items()):
                found.setdefault(reason, []).append(index)
            return found

    def codes(self) -> np.ndarray:
        """uint8 [total], 0 for a record that is not known to be unusable, else 1 + the place of its
        reason among all of them in order."""
        order = {reason: 1 + k for k, reason in enumerate(sorted(REASONS))}
        codes = np.zeros(self._total, np.uint8)
        with self._lock:
            for index, reason in self._bad.items():
                codes[index] = order[reason]
        return codes

    def load(self, state: Mapping[str, Iterable[int]]) -> None:
        """Goes on from `state`: what was found unusable before stays counted."""
        with self._lock:
            for reason, numbers in state.items():
                self._bad |= {n: reason for n in numbers if 0 <= n < self._total}
            for index in self._bad:
                self._read_count += not self._read[index]
                self._read[index] = 1

    def known_bad(self, index: int) -> bool:
        """Whether the record was counted as unusable before."""
        return index in self._bad

    def add(self, index: int, error: BadRecord | None) -> None:
        """Notes a record as usable (None) or not.

        Raises:
          UserError: more than the allowed share of the source is unusable, or so many of the
            records read so far that chance cannot explain it (three standard deviations).
        """
        with self._lock:
            if not self._read[index]:
                self._read[index] = 1
                self._read_count += 1
            if error is None:
                return
            self._bad[index] = error.reason
            bad = len(self._bad)
            above = bad > self._max_fraction * self._total
            above |= bad - 3 * math.sqrt(bad) > self._max_fraction * self._read_count
        if above:
            raise self._stop(error)

    def _stop(self, error: BadRecord) -> UserError:
        fix = {
            "too_long": "raise data.max_length",
            "too_many_images": "raise data.max_images",
            "too_large": "raise data.max_pixels or data.max_image_bytes",
            "missing": "set data.images to the folder of the pictures",
            "outside": "set data.images to a folder that holds all pictures",
            "markers": "write <image> once for each picture of a row, in its questions",
            "media": "take these rows out",
        }.get(error.reason, "correct these samples")
        return UserError(
            f"data: {told(self.counts, self._read_count, 'samples read cannot be used')}; last: "
            f"{error}",
            allowed=f"data.max_skip_fraction={self._max_fraction:g} of {self._total} samples",
            fix=f"{fix}, or raise data.max_skip_fraction",
        )
