"""Intervals and tests for accuracies whose questions share images.

Questions about one image succeed and fail together, so the image, not the question, is the unit
of evidence everywhere in this file. NumPy and SciPy only; no JAX.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from efficient_vlm.errors import UserError

RESAMPLES = 10_000

# Largest block of bootstrap draws held at once (16 MiB of int32), whatever the number of images.
_DRAWS_PER_BLOCK = 1 << 22


class Interval(NamedTuple):
    """An estimate with its confidence limits, all in the unit of the estimate."""

    mean: float
    lo: float
    hi: float


class Difference(NamedTuple):
    """A paired difference with its confidence limits and two-sided p-value."""

    mean: float
    lo: float
    hi: float
    p: float


def _per_cluster(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts per cluster, float64 [G] each."""
    _, index = np.unique(clusters, return_inverse=True)
    index = index.reshape(-1)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


_OUTSIDE, _SCORES = "a score lies outside [0, 1]", "0 (wrong) to 1 (right)"


def _checked(
    values: Sequence, clusters: Sequence | None, field: str, *, draws: bool = False
) -> tuple:
    try:
        values = np.asarray(values, np.float64)
    except ValueError as error:
        raise UserError(
            f"{field}: not as many draws of every question",
            allowed="[questions] or [questions, draws]",
        ) from error
    if draws and values.ndim == 2 and values.shape[1]:
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UserError(f"{field}: {_OUTSIDE}", allowed=_SCORES)
        values = values.mean(axis=1)
    clusters = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if values.ndim != 1 or clusters.shape != values.shape:
        raise UserError(
            f"{field}: shape {values.shape} with image ids of shape {clusters.shape}",
            allowed="one score and one image id per question",
        )
    if values.size == 0:
        raise UserError(f"{field}: no answers to score", fix="evaluate at least one question")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise UserError(f"{field}: {_OUTSIDE}", allowed=_SCORES)
    return values, clusters


def accuracy_interval(
    correct: Sequence, clusters: Sequence | None = None, *, level: float = 0.95
) -> Interval:
    """Mean score with a Wilson interval at the effective number of questions.

    The design effect, by how much sharing images inflates the variance of the mean, is the
    ratio of the cluster-robust variance (Miller, arXiv 2411.00640, eq. 4, with the G/(G-1)
    correction) to p(1-p)/n. Wilson's score interval is then taken at n / design effect with
    Student's t quantile of G-1 degrees of freedom. Unlike the bootstrap or mean +- 2 standard
    errors it stays inside [0, 1], is never empty, and is deterministic.

    Nearly perfect or nearly always wrong: the design effect cannot be seen in answers that all
    agree. It is therefore averaged with its largest value (mean questions per image: an image is
    right or wrong as a whole), the data weighing k to 1 where k is the number of images holding
    the rarer outcome. 100 % right thus counts as one question per image; at k > 50 the prior no
    longer shows.

    Args:
      correct: [n] scores in [0, 1], usually booleans.
      clusters: [n] image ids (anything `np.unique` sorts); None treats questions as independent.
      level: nominal coverage.

    Returns:
      (mean, lo, hi).

    Raises:
      UserError: no answers, mismatched shapes, or a score outside [0, 1].
    """
    values, clusters = _checked(correct, clusters, "correct")
    sums, counts = _per_cluster(values, clusters)
    n, groups = values.size, counts.size
    mean = sums.sum() / n
    if groups == 1:
        return Interval(float(mean), 0.0, 1.0)  # One image says nothing about other images.
    independent = mean * (1 - mean) / n
    robust = ((sums - counts * mean) ** 2).sum() / n**2 * groups / (groups - 1)
    # Never below 1: with few images a small ratio is luck more often than negative correlation.
    effect = max(1.0, robust / independent) if independent > 0 else 1.0
    rarer = counts - sums if mean >= 0.5 else sums
    seen = np.count_nonzero(rarer)
    effect = (seen * effect + n / groups) / (seen + 1)
    size = n / max(effect, 1.0)
    z = special.stdtrit(groups - 1, 0.5 + level / 2)
    centre = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2))
    # Rounding may leave the limit at 0.9999999999999999 for a mean of exactly 1.
    lo, hi = min(centre - half, mean), max(centre + half, mean)
    return Interval(float(mean), float(max(lo, 0.0)), float(min(hi, 1.0)))


def cluster_bootstrap(
    sums: np.ndarray, counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means of `resamples` draws of whole clusters with replacement.

    Args:
      sums: float64 [G] sum of the scores of each cluster.
      counts: float64 [G] number of scores of each cluster.
      resamples: number of draws.
      seed: of the NumPy generator; the result depends on nothing else.

    Returns:
      float64 [resamples] ratio sum(sums) / sum(counts) of each draw.
    """
    rng = np.random.default_rng(seed)
    groups = sums.size
    step = max(1, _DRAWS_PER_BLOCK // groups)
    blocks = []
    for start in range(0, resamples, step):
        draw = rng.integers(0, groups, (min(step, resamples - start), groups), dtype=np.int32)
        blocks.append(sums[draw].sum(1) / counts[draw].sum(1))
    return np.concatenate(blocks)


def _sign_flip_p(sums: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p of sum(sums) when the sign of every cluster is a fair coin."""
    sums = sums[sums != 0]
    observed = abs(sums.sum())
    tolerance = 1e-9 * np.abs(sums).sum()
    if sums.size == 0:
        return 1.0
    if sums.size <= 13:  # 8192 sign patterns at most: enumerate them, the p-value is exact.
        bits = np.arange(1 << sums.size)[:, None] >> np.arange(sums.size) & 1
        flipped = np.abs((2 * bits - 1) @ sums)
        return float(np.mean(flipped >= observed - tolerance))
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_PER_BLOCK // sums.size)
    extreme = 0
    for start in range(0, resamples, step):
        signs = rng.integers(0, 2, (min(step, resamples - start), sums.size), dtype=np.int8)
        extreme += np.count_nonzero(np.abs((2.0 * signs - 1) @ sums) >= observed - tolerance)
    return (extreme + 1) / (resamples + 1)


def paired_difference(
    first: Sequence,
    second: Sequence,
    clusters: Sequence | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of `first - second` over the same questions, resampling whole images.

    The limits are bootstrap percentiles, widened where needed to +-(1 - alpha^(1/G)), alpha =
    (1 - level) / 2, around the mean: what G images without one differing answer still allow
    ("rule of three"). The p-value is a sign-flip test (the two methods are exchangeable within
    an image under the null), exact up to 13 differing images, Monte Carlo above; it can
    therefore disagree with the limits when they only just include or exclude zero.

    Args:
      first: [n] scores in [0, 1] of one method; [n, draws] of one that answers every question
        several times, whose score of a question is the mean of its draws.
      second: the same of the other, question by question; it may have another number of draws.
      clusters: [n] image ids; None treats questions as independent.
      level: nominal coverage of the limits.
      resamples: bootstrap draws and sign flips.
      seed: of both.

    Returns:
      (mean, lo, hi, p).

    Raises:
      UserError: no answers, mismatched shapes, or a score outside [0, 1].
    """
    first, ids = _checked(first, clusters, "first", draws=True)
    if len(second) != first.size:
        raise UserError(
            f"second: {len(second)} scores paired with {first.size}",
            allowed="the same questions in the same order; [questions, draws] of several draws",
            fix="stats.paired_predictions takes stored predictions as they are",
        )
    second, _ = _checked(second, clusters, "second", draws=True)
    sums, counts = _per_cluster(first - second, ids)
    mean = sums.sum() / counts.sum()
    alpha = (1 - level) / 2
    draws = cluster_bootstrap(sums, counts, resamples=resamples, seed=seed)
    lo, hi = np.quantile(draws, [alpha, 1 - alpha])
    floor = 1 - alpha ** (1 / counts.size)
    lo, hi = max(min(lo, mean - floor), -1.0), min(max(hi, mean + floor), 1.0)
    return Difference(float(mean), float(lo), float(hi), _sign_flip_p(sums, resamples, seed))


def mean_scores(predictions: Iterable[Mapping[str, Any]]) -> dict[tuple, float]:
    """One score for each question of stored predictions: the mean of its draws.

    Args:
      predictions: rows of `predictions/*.jsonl` of one method; one with several draws ("seed") has
        several rows for a question.

    Returns:
      (index, slot, task, question) -> share of its rows that are right, or their mean score, in the
      order of the rows.
    """
    found: dict[tuple, list[float]] = collections.defaultdict(list)
    for row in predictions:
        key = (row["index"], row.get("slot"), str(row.get("task")), str(row.get("question")))
        # Answers to benchmarks from files have scores between right and wrong.
        found[key].append(float(row.get("score", row["correct"])))
    return {key: float(np.mean(each)) for key, each in found.items()}


def paired_predictions(
    first: Iterable[Mapping[str, Any]] | Mapping[tuple, float],
    second: Iterable[Mapping[str, Any]] | Mapping[tuple, float],
    **options: Any,
) -> tuple[Difference, int]:
    """`paired_difference` of the stored predictions of two methods, images as clusters.

    Args:
      first, second: rows of `predictions/*.jsonl`, or what `mean_scores` makes of them; draws of a
        question count as their mean. Questions that only one of them has are left out.
      options: level, resamples, seed.

    Returns:
      The difference, and the number of questions that it is of.

    Raises:
      UserError: no question in common.
    """
    first = first if isinstance(first, Mapping) else mean_scores(first)
    second = second if isinstance(second, Mapping) else mean_scores(second)
    common = [key for key in first if key in second]
    if not common:
        raise UserError(
            f"second: no question of {len(second)} is among the {len(first)} of first",
            fix="evaluate both on the same images and questions",
        )
    images = np.unique([str(key[0]) for key in common], return_inverse=True)[1]
    pairs = [first[key] for key in common], [second[key] for key in common]
    return paired_difference(*pairs, images, **options), len(common)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment for several tests (Scand. J. Stat. 6, 1979).

    Args:
      p_values: [k] raw p-values in any order.

    Returns:
      float64 [k] adjusted p-values in the same order; reject where <= the family-wise level.
    """
    p = np.asarray(p_values, np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise UserError("p_values: a value lies outside [0, 1]", allowed="probabilities")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
