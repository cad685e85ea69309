"""Several sources as one, in exact shares.

Which source position k of the global order is from is arithmetic on whole numbers, so any number of
processes sees one order, and a position is all that a resumed run needs. Grain's own `mix` is not
used for it: it scales the smallest weight to 100 and cuts the others to whole numbers, so that 0.7
and 0.3 become 233 and 100; its `select_from_datasets` takes a map such as this one.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from efficient_vlm.data.records import Record

_ENDLESS = 2**52  # Practically, yet small enough for Grain to divide without rounding.
# Grain's shuffle goes through numbers of 16 bits until one is below the length: 5 to 7 ms for each
# of 3 records, more than a training step of a small model, and 0.3 to 0.6 ms at this length.
_SHORT = 64


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
      name: as results say it.
      source: its records.
      weight: its share, relative to those of the others; None for one in proportion to its records
        (times `epochs`).
      epochs: how often it is read at most, before the mixture begins again; None for no limit.
    """

    name: str
    source: Any
    weight: float | None = None
    epochs: float | None = None

    @property
    def limit(self) -> int | None:
        """Records drawn from it at most; None for no limit."""
        if self.epochs is None:
            return None
        return max(1, math.floor(Fraction(repr(self.epochs)) * len(self.source)))


class Shares:
    """Positions of a sequence in which each of several sources has its exact share.

    Among the first k positions the first source has ceil(k w / W), where W is the sum of all
    weights; the same rule shares out the others among the other sources.

    Args:
      weights: positive; 0.7 means seven tenths.
    """

    def __init__(self, weights: Sequence[float | int]):
        exact = [Fraction(repr(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        self._weights = [weight // math.gcd(*whole) for weight in whole]
        totals = itertools.accumulate(reversed(self._weights))
        self._totals = list(totals)[::-1]  # Of a source and those behind it.

    def counts(self, k: int) -> list[int]:
        """How many of the first k positions each source has."""
        counts = []
        for weight, total in zip(self._weights, self._totals, strict=True):
            counts.append(-(-k * weight // total))
            k -= counts[-1]
        return counts

    def at(self, k: int) -> tuple[int, int]:
        """(source, how many positions in front of k it has) of position k."""
        for source, (weight, total) in enumerate(zip(self._weights, self._totals, strict=True)):
            before, after = -(-k * weight // total), -(-(k + 1) * weight // total)
            if after > before:
                return source, before
            k -= before
        raise AssertionError("the last source takes what is left")

    def first(self, source: int, count: int) -> int:
        """The smallest k for which `counts(k)[source]` is `count`."""
        high = 1
        while self.counts(high)[source] < count:
            high *= 2
        return bisect.bisect_left(range(high), count, key=lambda k: self.counts(k)[source])


class Schedule:
    """Position -> (source, position in it), with limits; a selection map of Grain.

    A source that reached its limit is left out, and the others share its positions by their
    weights. When all have, everything begins again: the next pass goes on where the sources are.

    Args:
      weights: of the sources.
      limits: how many records each may give, None for no limit.
    """

    def __init__(self, weights: Sequence[float | int], limits: Sequence[int | None]):
        live = list(range(len(weights)))
        base = [0] * len(weights)
        self._limits = list(limits)
        self._phases, self._starts, start = [], [], 0
        while live:
            shares = Shares([weights[i] for i in live])
            self._phases.append((list(live), list(base), shares))
            self._starts.append(start)
            ends = {
                i: shares.first(n, limits[i] - base[i])
                for n, i in enumerate(live)
                if limits[i] is not None
            }
            if not ends:
                self._period = None
                return
            end = min(ends.values())
            for n, i in enumerate(live):
                base[i] += shares.counts(end)[n]
            live = [i for i in live if ends.get(i) != end]
            start += end
        self._period = start

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> tuple[int, int]:
        passed, k = divmod(k, self._period) if self._period else (0, k)
        phase = bisect.bisect_right(self._starts, k) - 1
        live, base, shares = self._phases[phase]
        n, before = shares.at(k - self._starts[phase])
        source = live[n]
        return source, passed * (self._limits[source] or 0) + base[source] + before

    def counts(self, k: int) -> list[int]:
        """How many of the first k positions each source has."""
        passed, k = divmod(k, self._period) if self._period else (0, k)
        phase = bisect.bisect_right(self._starts, k) - 1
        live, base, shares = self._phases[phase]
        counts = [passed * (limit or 0) + b for limit, b in zip(self._limits, base, strict=True)]
        for i, count in zip(live, shares.counts(k - self._starts[phase]), strict=True):
            counts[i] += count
        return counts


class MixtureSource:
    """The records of several sources, one source behind the other; a `sources.Source`.

    Args:
      parts: those without records are left out.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(part for part in parts if len(part.source))
        sizes = [len(part.source) for part in self.parts]
        self._starts = [0, *itertools.accumulate(sizes)]
        self.tasks = tuple(sorted({task for part in self.parts for task in part.source.tasks}))
        self.placed = any(part.source.placed for part in self.parts)
        self.fingerprint = {
            "dataset": "mixture 1",
            "parts": [
                {
                    "weight": part.weight,
                    "epochs": part.epochs,
                    "records": len(part.source),
                    **part.source.fingerprint,
                }
                for part in parts
            ],
        }
        limits = [part.limit for part in self.parts]
        weights = [
            part.weight if part.weight is not None else limit or size
            for part, limit, size in zip(self.parts, limits, sizes, strict=True)
        ]
        self._schedule = Schedule(weights, limits)

    def __len__(self) -> int:
        return self._starts[-1]

    def _part(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._part(index)
        part = self.parts[number]
        record = part.source[index - self._starts[number]]
        return dataclasses.replace(record, id=f"{part.name}/{record.id}")

    def neighbours(self, index: int) -> range:
        """The records of the source that record `index` is from."""
        number = self._part(index)
        return range(self._starts[number], self._starts[number + 1])

    def texts(self) -> Iterator[str]:
        """Questions and answers of all sources, for training a tokenizer."""
        for part in self.parts:
            yield from part.source.texts()

    def order(self, seed: int) -> Any:
        """The numbers of records in the order in which they are drawn, as a Grain data set."""
        import grain

        orders = []
        for number in range(len(self.parts)):
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            orders.append(_shuffled(self._starts[number], self._starts[number + 1], own))
        return grain.MapDataset.select_from_datasets(orders, self._schedule)

    def part_counts(self, indices: Sequence[int]) -> list[int]:
        """How many of these records each source has."""
        parts = [self._part(index) for index in indices]
        return np.bincount(parts, minlength=len(self.parts)).tolist()

    def summary(self, drawn: int | Sequence[int], bad: Sequence[int] = ()) -> list[dict[str, Any]]:
        """What each source gave to a run.

        Args:
          drawn: the first so many examples of `order`, or how many of each source.
          bad: numbers of the records that were skipped.

        Returns:
          {"source", "samples", "drawn", "epochs", "skipped"} of each.
        """
        counts = self._schedule.counts(drawn) if isinstance(drawn, int) else drawn
        skipped = self.part_counts(bad)
        return [
            {
                "source": part.name,
                "samples": len(part.source),
                "drawn": count,
                "epochs": round(count / len(part.source), 3),
                "skipped": number,
            }
            for part, count, number in zip(self.parts, counts, skipped, strict=True)
        ]


def order_of(source: Any, seed: int) -> Any:
    """The global order of a source's records, endless, as a Grain data set of their numbers."""
    seed %= 2**32
    if isinstance(source, MixtureSource):
        return source.order(seed)
    return _shuffled(0, len(source), seed)


def _shuffled(start: int, stop: int, seed: int) -> Any:
    """The numbers of records, in another order in each epoch, endless."""
    import grain

    length = stop - start
    epochs = _ENDLESS // length
    if length >= _SHORT:
        return grain.MapDataset.range(start, stop).shuffle(seed=seed).repeat(epochs)
    return grain.MapDataset.range(epochs * length).map(_InEpochs(start, length, seed))


@dataclasses.dataclass(frozen=True)
class _InEpochs:
    """From a place in the endless order to the number of a record."""

    start: int
    length: int
    seed: int

    def __call__(self, place: int) -> int:
        epoch, place = divmod(place, self.length)
        return self.start + _order_of_epoch(self.length, self.seed, epoch)[place]


@functools.lru_cache(maxsize=64)
def _order_of_epoch(length: int, seed: int, epoch: int) -> list[int]:
    # NumPy keeps the words of a seed sequence in all versions; permutations may change.
    words = np.random.SeedSequence([seed, epoch]).generate_state(length)
    return np.argsort(words, kind="stable").tolist()


def neighbours_of(source: Any, index: int) -> range:
    """The records among which one that cannot be used is replaced: those of its own source."""
    if isinstance(source, MixtureSource):
        return source.neighbours(index)
    return range(len(source))
