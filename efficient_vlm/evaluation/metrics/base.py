"""What a metric is: how one answer is measured, and what many answers add up to."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One answer under one metric.

    Attributes:
      score: in [0, 1].
      parsed: what was read out of the answer; None where it is the answer as it stands, or nothing
        could be read.
      more: further numbers of this answer, by name.
    """

    score: float
    parsed: Any = None
    more: Mapping[str, float] = {}


Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A way of scoring answers.

    Attributes:
      sentence: what it measures.
      source: the paper or the program that defines it.
      measure: (prediction, references, **options) -> `Measured`. Its keyword arguments are the
        options of the metric; those in COLUMNS come from the row of a benchmark.
      needs: columns that a file must have, beside a question.
      summarise: rows with "score", "parsed", "references", ... -> numbers, beside those that
        `summary` has for every metric.
      corpus: (predictions, references) -> scores, of a metric that depends on all questions.
    """

    sentence: str
    source: str
    measure: Callable[..., Measured]
    needs: tuple[str, ...] = ("references",)
    summarise: Callable[[Sequence[Row]], dict[str, Any]] | None = None
    corpus: Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword arguments of `measure`."""
        parameters = inspect.signature(self.measure).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# Options whose values are those of the row that is scored.
COLUMNS = ("id", "options", "category", "masks")


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing, as all the programs that we follow report it."""
    return math.fsum(values) / len(values) if len(values) else 0.0


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole else 0.0


def f1(precision: float, recall: float) -> float:
    """The harmonic mean, 0 where both are."""
    return ratio(2 * precision * recall, precision + recall)
