"""Answers compared as texts and numbers: exact match, ANLS, relaxed accuracy, OCRBench."""

from collections.abc import Sequence

from efficient_vlm.evaluation.answers import normalise
from efficient_vlm.evaluation.metrics.base import Measured

_THRESHOLD = 0.5
_TOLERANCE = 0.05


def exact_match(prediction: str, references: Sequence[str]) -> Measured:
    """1 for an answer that is a reference, white space and case aside."""
    parsed = normalise(prediction)
    return Measured(float(parsed in map(normalise, references)), parsed)


# ---- ANLS ----------------------------------------------------------------------------------------


def anls(prediction: str, references: Sequence[str]) -> Measured:
    """max over references of 1 - NL where NL < 0.5, else 0 (arXiv 1907.00490, equation 1).

    NL is the Levenshtein distance over the length of the longer text. Case does not count; spaces
    inside do, once each, and those around do not. Two empty texts are equal.
    """
    return _best(prediction, references, lambda nl: 1 - nl if nl < _THRESHOLD else 0.0)


def anls_vlmevalkit(prediction: str, references: Sequence[str]) -> Measured:
    """As `anls`, but a similarity of exactly 0.5 counts; so does evalscope."""
    return _best(prediction, references, lambda nl: 1 - nl if 1 - nl >= _THRESHOLD else 0.0)


def anls_lmms_eval(prediction: str, references: Sequence[str]) -> Measured:
    """As `anls_vlmevalkit`, but lengths are those before white space is taken away.

    Line breaks and spaces around an answer therefore make it more similar.
    """
    parsed = normalise(prediction)
    least = min(
        levenshtein(parsed, normalise(reference)) / max(1, _raw(prediction), _raw(reference))
        for reference in references
    )
    return Measured(1 - least if 1 - least >= _THRESHOLD else 0.0, parsed)


def _best(prediction, references, of_distance) -> Measured:
    parsed = normalise(prediction)
    return Measured(max(of_distance(distance(parsed, normalise(r))) for r in references), parsed)


def _raw(text: str) -> int:
    return len(text.upper())  # Longer than the text itself for some letters, such as sharp s.


def distance(first: str, second: str) -> float:
    """The Levenshtein distance over the length of the longer text, 0 for two empty ones."""
    return levenshtein(first, second) / max(1, len(first), len(second))


def levenshtein(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of a letter between two texts."""
    previous = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != other)))
        previous = row
    return previous[-1]


# ---- relaxed accuracy ----------------------------------------------------------------------------


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> Measured:
    """1 for a number within 5 % of the reference, or else for the same text in any case.

    Source: ChartQA, arXiv 2203.10244, section 5.1, as lmms-eval and VLMEvalKit read numbers: "5%"
    is 0.05; "1,000" and "$5" are texts; a reference of 0 must be met as a text.
    """
    return Measured(float(any(_relaxed(prediction, r, zero=False) for r in references)))


def relaxed_accuracy_evalscope(prediction: str, references: Sequence[str]) -> Measured:
    """As `relaxed_accuracy`, but for a reference of 0 any number that is 0 is right."""
    return Measured(float(any(_relaxed(prediction, r, zero=True) for r in references)))


def _relaxed(prediction: str, reference: str, *, zero: bool) -> bool:
    value, target = _number(prediction), _number(reference)
    if value is None or target is None or (target == 0 and not zero):
        return prediction.lower() == reference.lower()
    if target == 0:
        return value == 0
    return abs(value - target) / abs(target) <= _TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# ---- OCRBench ------------------------------------------------------------------------------------

# Of handwritten formulas, where case matters and spaces do not.
_FORMULAS = ("HME100k", "Handwritten Mathematical Expression Recognition")


def ocrbench(
    prediction: str, references: Sequence[str], *, category: str | None = None
) -> Measured:
    """1 for an answer that contains a reference, in any case (arXiv 2305.07895).

    Args:
      category: dataset or type of question; "HME100k" and "Handwritten Mathematical Expression
        Recognition" are formulas, compared with case and without spaces.
    """
    return _contains(prediction, references, category, str.lower)


def ocrbench_lmms_eval(
    prediction: str, references: Sequence[str], *, category: str | None = None
) -> Measured:
    """As `ocrbench`, with full-width letters and spaces taken for plain ones."""
    return _contains(prediction, references, category, lambda text: text.translate(_FOLD).lower())


_FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _contains(prediction, references, category, fold) -> Measured:
    if category in _FORMULAS:
        parsed = _one_line(prediction).replace(" ", "")
        wanted = [_one_line(reference).replace(" ", "") for reference in references]
    else:
        # Folding may bring spaces about, which are then taken off.
        parsed = _one_line(fold(prediction.strip()))
        wanted = [_one_line(fold(reference)) for reference in references]
    return Measured(float(any(reference in parsed for reference in wanted)), parsed)


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")
