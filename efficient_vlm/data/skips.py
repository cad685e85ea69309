"""Unusable records: counted by reason, and too many of them stop the run."""

import collections
import math
import threading

from efficient_vlm.errors import UserError
from efficient_vlm.processing.decode_image import BadRecord


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
        counts = ", ".join(f"{reason} {n}" for reason, n in self.counts.items())
        fix = {
            "too_long": "raise data.max_length",
            "too_many_images": "raise data.max_images",
            "too_large": "raise data.max_pixels or data.max_image_bytes",
        }.get(error.reason, "correct these samples")
        return UserError(
            f"data: {len(self._bad)} of {self._read_count} samples read cannot be used ({counts});"
            f" last: {error}",
            allowed=f"data.max_skip_fraction={self._max_fraction:g} of {self._total} samples",
            fix=f"{fix}, or raise data.max_skip_fraction",
        )
