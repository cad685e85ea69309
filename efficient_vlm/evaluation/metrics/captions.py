"""Captions: BLEU by sacrebleu, and CIDEr-D."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.metrics.base import Measured, Row, mean

# ---- BLEU ----------------------------------------------------------------------------------------


def bleu(prediction: str, references: Sequence[str]) -> Measured:
    """BLEU-4 of one caption by sacrebleu (Post 2018, arXiv 1804.08771), divided by 100.

    `sacrebleu.sentence_bleu` with its defaults: tokens of "13a", exponential smoothing, effective
    order.
    """
    return Measured(_sacrebleu().sentence_bleu(prediction, list(references)).score / 100)


def corpus_bleu(rows: Sequence[Row]) -> dict[str, Any]:
    """BLEU of all captions together, which is not the mean of theirs, and sacrebleu's signature."""
    library = _sacrebleu()
    metric = library.metrics.BLEU()
    most = max(len(row["references"]) for row in rows)
    # One list for each place in the list of references; None where a caption has fewer.
    columns = [
        [row["references"][k] if k < len(row["references"]) else None for row in rows]
        for k in range(most)
    ]
    found = metric.corpus_score([row["prediction"] for row in rows], columns)
    return {"corpus_bleu": found.score / 100, "signature": str(metric.get_signature())}


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise UserError(
            "bleu: the package sacrebleu is not installed",
            fix="pip install 'efficient_vlm[captions]'; or take cider, which needs no package",
        ) from None
    return sacrebleu


# ---- CIDEr-D -------------------------------------------------------------------------------------

_ORDERS, _SIGMA = 4, 6.0
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def tokens(text: str) -> list[str]:
    """Words in small letters, without punctuation.

    Published numbers come from the Penn Treebank tokenizer of a Java program, which also parts
    contractions ("do n't"): the two agree on captions without them.
    """
    return _WORD.findall(text.lower())


def cider(prediction: str, references: Sequence[str]) -> Measured:
    """CIDEr-D, divided by 10, which only many captions together have: see `cider_scores`.

    A mean over n = 1..4 of how alike the n-grams of a caption and its references are, rare ones
    counting more. Words are compared in small letters, without punctuation.

    Raises:
      UserError: always.
    """
    raise UserError(
        "cider: its weights come from the references of all captions together",
        fix="metrics.scores('cider', predictions, references) of a whole file",
    )


def cider_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, divided by 10 so that it lies in [0, 1].

    Vedantam, Zitnick and Parikh, arXiv 1411.5726, section 4 and equations 1 to 3 with clipping and
    the Gaussian length penalty: the mean over n = 1..4 and over references of

        exp(-(l - l_r)^2 / (2 * 6^2)) * min(g, g_r) . g_r / (|g| |g_r|)

    where g has for each n-gram its count times log(captions / captions that have it in any
    reference), and l the number of words.

    Args:
      predictions: captions.
      references: those of each.
    """
    frequency: collections.Counter[tuple[str, ...]] = collections.Counter()
    counted = [[_counts(tokens(text)) for text in each] for each in references]
    for each in counted:
        frequency.update(set().union(*each))
    weight = {gram: math.log(len(references) / n) for gram, n in frequency.items()}
    rarest = math.log(len(references)) if references else 0.0
    scores = []
    for prediction, each in zip(predictions, counted, strict=True):
        own = _counts(tokens(prediction))
        scores.append(mean([_similarity(own, other, weight, rarest) for other in each]))
    return scores


def _counts(words: Sequence[str]) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(
        tuple(words[k : k + n]) for n in range(1, _ORDERS + 1) for k in range(len(words) - n + 1)
    )


def _similarity(own, other, weight, rarest) -> float:
    """One caption and one reference, their n-grams counted."""
    lengths = [sum(n for gram, n in counts.items() if len(gram) == 1) for counts in (own, other)]
    total = 0.0
    for order in range(1, _ORDERS + 1):
        g, r = (
            {gram: n * weight.get(gram, rarest) for gram, n in counts.items() if len(gram) == order}
            for counts in (own, other)
        )
        norms = math.hypot(*g.values()) * math.hypot(*r.values())
        if norms:
            total += (
                sum(min(value, r[gram]) * r[gram] for gram, value in g.items() if gram in r) / norms
            )
    penalty = np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * _SIGMA**2))
    return float(penalty * total / _ORDERS)


def cider_total(rows: Sequence[Row]) -> dict[str, float]:
    """CIDEr-D in the unit of papers (often printed times 100): 10 times the mean score."""
    return {"cider": 10 * mean([row["score"] for row in rows])}
