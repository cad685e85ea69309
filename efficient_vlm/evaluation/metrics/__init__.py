"""Metrics of published benchmarks, by name: where programs disagree, each has a name of its own.

    from efficient_vlm.evaluation import metrics

    metrics.score("relaxed_accuracy", "104", ["100"])  # 1.0
    metrics.METRICS["relaxed_accuracy"].sentence

Pure Python and NumPy. Answers are scored as they are given; `evaluation.on_file` strips white space
around them first. docs/metrics.md lists all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.evaluation.metrics.base import COLUMNS, Measured, Metric, Row, mean
from efficient_vlm.evaluation.metrics.table import METRICS

__all__ = [
    "COLUMNS",
    "METRICS",
    "Measured",
    "Metric",
    "find",
    "measure",
    "score",
    "scores",
    "summary",
]


def find(name: str) -> Metric:
    """The metric of a name; UserError that names the nearest one."""
    if name not in METRICS:
        raise unknown("metric", str(name), METRICS)
    return METRICS[name]


def score(name: str, prediction: str, references: Sequence[Any] = (), **options: Any) -> float:
    """The score of one answer, in [0, 1].

    Args:
      name: of the metric.
      prediction: the answer.
      references: right answers, one of which is enough (VQA accuracy counts them); () where masks
        say what is right.
      **options: of the metric: `METRICS[name].options`, docs/metrics.md.

    Raises:
      UserError: an unknown metric or option, no references, references of another kind, or a metric
        of all answers together (`scores`).
    """
    return measure(name, prediction, references, **options).score


def measure(name: str, prediction: str, references: Sequence[Any] = (), **options: Any) -> Measured:
    """As `score`, with what was read out of the answer."""
    metric = find(name)
    for option in options:
        if option not in metric.options:
            raise unknown(f"option of {name}", option, metric.options or ("none",))
    given = _references(name, metric, references)
    return metric.measure(_answer(name, prediction), given, **options)


def scores(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[Any]],
    options: Sequence[Mapping[str, Any]] | None = None,
) -> list[float]:
    """The score of each of several answers; of every metric, those of all answers together too.

    Args:
      name: of the metric.
      predictions: answers.
      references: of each.
      options: of each, see `score`.

    Raises:
      UserError: as `score`, or lists of different lengths.
    """
    metric = find(name)
    options = [{}] * len(predictions) if options is None else options
    if not len(predictions) == len(references) == len(options):
        raise UserError(
            f"{name}: {len(predictions)} answers, {len(references)} lists of references",
            allowed="one list of references for each answer",
        )
    if metric.corpus is None:
        rows = zip(predictions, references, options, strict=True)
        return [score(name, answer, right, **more) for answer, right, more in rows]
    return metric.corpus(
        [_answer(name, each) for each in predictions],
        [_references(name, metric, each) for each in references],
    )


def summary(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the scores of many answers add up to.

    Args:
      name: of the metric.
      rows: {"score"}, with what the metric's own summary reads: "parsed" and "references" for yes
        and no, "category" and "group" (the image) for MME, "prediction" and "references" for
        captions, "more" of `Measured` for points and boxes. Where rows have categories, so does the
        summary. Bare scores do for a metric that is a mean.

    Returns:
      {"n", "score": the mean} and the metric's own numbers, such as "f1"; "by_category" where there
      are several.

    Raises:
      UserError: no rows, or rows without what is needed.
    """
    metric = find(name)
    rows = [row if isinstance(row, Mapping) else {"score": float(row)} for row in rows]
    if not rows:
        raise UserError(f"{name}: no answers", fix="score at least one")
    found: dict[str, Any] = {"n": len(rows), "score": mean([row["score"] for row in rows])}
    if metric.summarise is not None:
        try:
            found |= metric.summarise(rows)
        except KeyError as error:
            raise UserError(
                f"{name}: its summary reads {error} of each row, which is missing",
                fix="pass rows as `evaluation.on_file` writes them",
            ) from None
    categories: dict[str, list[float]] = {}
    for row in rows:
        if row.get("category") is not None:
            categories.setdefault(str(row["category"]), []).append(row["score"])
    if len(categories) > 1:
        found["by_category"] = {
            each: {"n": len(of), "score": mean(of)} for each, of in sorted(categories.items())
        }
    return found


def _answer(name: str, prediction: Any) -> str:
    if not isinstance(prediction, str):
        raise UserError(f"{name}: answer {short(prediction)}", allowed="a text")
    return prediction


def _references(name: str, metric: Metric, references: Any) -> list[Any]:
    """Texts, and whatever else a metric of places takes."""
    if isinstance(references, str | int | float):
        references = [references]
    found = [str(each) if isinstance(each, bool | int | float) else each for each in references]
    if not found and "references" in metric.needs:
        raise UserError(f"{name}: no references", allowed="at least one right answer")
    texts = metric.measure.__module__.rpartition(".")[2] != "place"
    wrong = [each for each in found if not isinstance(each, str)]
    if texts and wrong:
        raise UserError(f"{name}: reference {short(wrong[0])}", allowed="texts or numbers")
    return found
