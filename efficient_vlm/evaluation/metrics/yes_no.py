"""Yes or no: POPE's scores as its own script and others read an answer, and MME."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

from efficient_vlm.errors import UserError, short
from efficient_vlm.evaluation.metrics.base import Measured, Row, f1, mean, ratio
from efficient_vlm.evaluation.metrics.vqa import DOT_APART, without_marks


def yes_no(prediction: str, references: Sequence[str]) -> Measured:
    """POPE's own script: "no" if the first sentence has "No", "no" or "not", else "yes".

    Source: arXiv 2305.10355 and its repository. Everything that denies nothing is a yes.
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return _judged("no" if {"No", "no", "not"} & set(words) else "yes", references)


def yes_no_lmms_eval(prediction: str, references: Sequence[str]) -> Measured:
    """The whole answer must be "yes" or "no", in any case: "Yes." is neither."""
    return _judged(prediction.lower().strip(), references)


def yes_no_vlmevalkit(prediction: str, references: Sequence[str]) -> Measured:
    """An answer with the word "yes" or the word "no", not both; else neither."""
    words = without_marks(prediction.lower(), DOT_APART).split()
    named = [word for word in ("yes", "no") if word in words]
    return _judged(named[0] if len(named) == 1 else None, references)


_WORD = {word: re.compile(rf"\b(?:{word.upper()}|{word.capitalize()})\b") for word in ("yes", "no")}


def yes_no_evalscope(prediction: str, references: Sequence[str]) -> Measured:
    """An answer with the word "Yes" or "YES" or the word "No" or "NO", not both; or a bare one."""
    bare = re.fullmatch(r"(yes|no)[.!]?", prediction.strip())
    named = [word for word, pattern in _WORD.items() if pattern.search(prediction)]
    parsed = named[0] if len(named) == 1 else None
    return _judged(bare[1] if bare else parsed, references)


def mme(prediction: str, references: Sequence[str], *, category: str) -> Measured:
    """Yes or no by the first four letters, as MME's programs read it (arXiv 2306.13394).

    Args:
      category: subtask, one of MME's 14.
    """
    _known_subtask(category)
    text = prediction.lower().strip().replace(".", "")
    parsed = {"y": "yes", "n": "no"}.get(text)
    if parsed is None:
        parsed = next((word for word in ("yes", "no") if word in text[:4]), None)
    return _judged(parsed, references)


def _judged(parsed: str | None, references: Sequence[str]) -> Measured:
    return Measured(float(parsed == gold(references)), parsed)


def gold(references: Sequence[str]) -> str:
    """The reference as "yes" or "no"; UserError for any other."""
    text = str(references[0]).lower().strip().rstrip(".")
    if text not in ("yes", "no") or len(references) > 1:
        raise UserError(
            f"references: {short(list(references))}",
            allowed="one of yes and no",
            fix="choose another metric, or name the column: --columns=references=NAME",
        )
    return text


# ---- summaries -----------------------------------------------------------------------------------


def pope(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that are yes.

    An answer that is neither counts as no where precision and recall are concerned.
    """
    return _confusion(rows, lambda parsed: parsed != "yes", share_of="parsed")


def pope_lmms_eval(rows: Sequence[Row]) -> dict[str, float]:
    """As `pope`, but an answer that is neither is left out of precision and recall, and the share
    of yes is that of the references."""
    return _confusion(rows, lambda parsed: parsed == "no", share_of="gold")


def _confusion(
    rows: Sequence[Row], is_no: Callable[[Any], bool], *, share_of: str
) -> dict[str, float]:
    pairs = [(row["parsed"], gold(row["references"])) for row in rows]
    hits = sum(parsed == "yes" and right == "yes" for parsed, right in pairs)
    false = sum(parsed == "yes" and right == "no" for parsed, right in pairs)
    missed = sum(is_no(parsed) and right == "yes" for parsed, right in pairs)
    precision, recall = ratio(hits, hits + false), ratio(hits, hits + missed)
    yes = [(parsed if share_of == "parsed" else right) == "yes" for parsed, right in pairs]
    return {
        "accuracy": mean([float(parsed == right) for parsed, right in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": f1(precision, recall),
        "yes_share": mean(yes),
    }


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip


def _known_subtask(category: str) -> None:
    if category not in (*PERCEPTION, *COGNITION):
        raise UserError(
            f"mme: unknown subtask {short(category)}",
            allowed=", ".join((*PERCEPTION, *COGNITION)),
            fix="name the column of subtasks: --columns=category=NAME",
        )


def mme_total(rows: Sequence[Row]) -> dict[str, Any]:
    """MME's sums: of each subtask, accuracy and accuracy+ in %, which add up to at most 200.

    Accuracy+ is the share of images whose questions are all answered right; MME asks two about
    each. "perception" and "cognition" are sums over the subtasks that there are rows of.

    Raises:
      UserError: an image that has not two questions of a subtask.
    """
    images: dict[tuple, list[float]] = collections.defaultdict(list)
    for row in rows:
        images[row["category"], row["group"]].append(row["score"])
    subtasks: dict[str, dict[str, float]] = {}
    for category in dict.fromkeys(category for category, _ in images):
        of = {image: scores for (c, image), scores in images.items() if c == category}
        uneven = {image: len(scores) for image, scores in of.items() if len(scores) != 2}
        if uneven:
            image, count = next(iter(uneven.items()))
            raise UserError(
                f"mme: {count} questions of {short(category)} about image {short(image)}",
                allowed="two questions of a subtask about each image",
                fix="name the column of images: --columns=group=NAME; or take an even --limit",
            )
        plain = 100 * mean([score for scores in of.values() for score in scores])
        plus = 100 * mean([float(all(scores)) for scores in of.values()])
        subtasks[category] = {"accuracy": plain, "accuracy_plus": plus, "total": plain + plus}
    sums = {
        part: sum(subtasks[c]["total"] for c in names if c in subtasks)
        for part, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {**sums, "total": sum(sums.values()), "subtasks": subtasks}
