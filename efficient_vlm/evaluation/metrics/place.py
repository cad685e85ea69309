"""Places and numbers: points, boxes, counts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.evaluation.metrics.base import Measured, f1, ratio
from efficient_vlm.processing import pointing

Point = tuple[float, float]

# ---- points --------------------------------------------------------------------------------------

_NUMBER = r"\s*([-+]?\d*\.?\d+)\s*"
_QWEN = re.compile(rf'"?point(?:_2d)?"?\s*:\s*\[{_NUMBER},{_NUMBER}\]')
_TUPLE = re.compile(rf"\({_NUMBER[3:-3]}\s*,\s*{_NUMBER[3:-3]}\)")


def points(
    prediction: str,
    references: Sequence[Any] = (),
    *,
    masks: Sequence[Any] = (),
    distance: float = 5.0,
) -> Measured:
    """F1 of the best matching of points to objects, each used once (Molmo, arXiv 2409.17146).

    With masks a point belongs to an object if it lies in its mask; without, if it lies within a
    distance of the object's point. No points where there are no objects score 1.

    Args:
      prediction: points as Molmo or Molmo2 writes them, or as Qwen does (thousandths under
        "point_2d").
      references: points, (x, y) or {"x", "y"} in percent of width and height; or answers that have
        them.
      masks: [height, width] of each object, true inside.
      distance: the largest, in percent of width and height.
    """
    # 20 to 30 MB and 0.4 s, for who measures points.
    from scipy.optimize import linear_sum_assignment

    given = np.array(read_points(prediction), np.float64).reshape(-1, 2)
    if len(masks):
        cost = np.array([[0.0 if _inside(m, *p) else np.inf for m in masks] for p in given])
        total = len(masks)
    else:
        wanted = np.array(_reference_points(references), np.float64).reshape(-1, 2)
        apart = np.linalg.norm(given[:, None] - wanted[None], axis=-1) * 100
        cost, total = np.where(apart <= distance, apart, np.inf), len(wanted)
    cost = cost.reshape(len(given), total)
    # Above any sum of distances: as many pairs as possible come first.
    closed = np.where(np.isfinite(cost), cost, 1e6)
    pairs = int(np.isfinite(cost[linear_sum_assignment(closed)]).sum()) if cost.size else 0
    nothing = total == len(given) == 0
    precision, recall = (1.0, 1.0) if nothing else (ratio(pairs, len(given)), ratio(pairs, total))
    more = {"precision": precision, "recall": recall}
    return Measured(f1(precision, recall), given.tolist(), more)


def points_lmms_eval(
    prediction: str, references: Sequence[Any] = (), *, masks: Sequence[Any]
) -> Measured:
    """The share of the answer's points that lie in any of the masks; 0 without points.

    As lmms-eval's PointBench: points are "(x, y)", of which those up to 1 are fractions, those up
    to 1000 thousandths, and others pixels; so "(0, 1)" is the lower left corner.
    """
    del references
    union = np.any([np.asarray(mask, bool) for mask in masks], axis=0)
    height, width = union.shape
    found = []
    for pair in _TUPLE.findall(prediction):
        x, y = map(float, pair)
        in_unit, in_grid = (min(x, y) >= 0 and max(x, y) <= most for most in (1, 1000))
        scale = 1 if in_unit else 1000 if in_grid else None
        place = (x, y) if scale is None else (x / scale * width, y / scale * height)
        found.append([round(value) for value in place])
    hits = [0 <= x < width and 0 <= y < height and bool(union[y, x]) for x, y in found]
    return Measured(ratio(sum(hits), len(hits)), found)


def read_points(text: str) -> list[Point]:
    """Points of an answer, as fractions of width and height."""
    read = [(point.x, point.y) for point in pointing.parse(text).points]
    return read or [(float(x) / 1000, float(y) / 1000) for x, y in _QWEN.findall(text)]


def _reference_points(references: Sequence[Any]) -> list[Point]:
    found: list[Point] = []
    for reference in references:
        if isinstance(reference, str):
            found += read_points(reference)
            continue
        pair = reference
        if isinstance(reference, Mapping):
            pair = [reference.get("x"), reference.get("y")]
        try:
            x, y = map(float, pair)
        except (TypeError, ValueError):
            raise UserError(
                f"references: {short(reference)} is no point",
                allowed='[x, y] or {"x", "y"} in percent, or an answer with points',
            ) from None
        found.append((x / 100, y / 100))
    return found


def _inside(mask: Any, x: float, y: float) -> bool:
    mask = np.asarray(mask)
    height, width = mask.shape
    if not (0 <= x <= 1 and 0 <= y <= 1):
        return False
    return bool(mask[min(int(y * height), height - 1), min(int(x * width), width - 1)])


# ---- boxes ---------------------------------------------------------------------------------------

_LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)
_FOUR = re.compile(r"[\[(]" + r",".join([_NUMBER] * 4) + r"[\])]")


def boxes(prediction: str, references: Sequence[Any], *, scale: float | None = None) -> Measured:
    """Intersection over union of the answer's first box with the reference, 0 without a box.

    Args:
      prediction: "[x1, y1, x2, y2]" or with round brackets, in the unit of the references; or four
        of PaliGemma's <loc0000> tokens (top, left, bottom, right in 1024ths), for references in
        fractions.
      references: (left, top, right, bottom); of several the best counts.
      scale: the number in the answer that is 1 in the references, such as 1000; None for equal
        units.
    """
    parsed = read_box(prediction, scale)
    wanted = [_reference_box(reference) for reference in references]
    best = 0.0 if parsed is None else max(iou(parsed, box) for box in wanted)
    return Measured(best, parsed, {"iou_at_50": float(best >= 0.5)})


def read_box(text: str, scale: float | None = None) -> list[float] | None:
    """(left, top, right, bottom) of the first box of an answer, None for none."""
    if location := _LOCATIONS.search(text):
        top, left, bottom, right = (int(each) / 1024 for each in location.groups())
        return [left, top, right, bottom]
    four = _FOUR.search(text)
    return [float(each) / (scale or 1) for each in four.groups()] if four else None


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 if both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return ratio(shared, _area(first) + _area(second) - shared)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _reference_box(reference: Any) -> list[float]:
    if isinstance(reference, str):
        box = read_box(reference) or reference
    else:
        box = reference
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        raise UserError(
            f"references: {short(reference)} is no box", allowed="[left, top, right, bottom]"
        ) from None
    return [left, top, right, bottom]


# ---- counts --------------------------------------------------------------------------------------

_WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty",
)


def count(prediction: str, references: Sequence[Any]) -> Measured:
    """1 if the first whole number of the answer is that of the reference.

    Number words up to twenty count where there are no digits. Of an answer with points it is the
    total that is stated, or else the number of points.
    """
    parsed = read_count(prediction)
    return Measured(
        float(parsed is not None and parsed in map(_reference_count, references)), parsed
    )


def read_count(text: str) -> int | None:
    """The number that an answer states, None for none."""
    pointed = pointing.parse(text)
    if "<point" in text and (pointed.points or pointed.total is not None):
        return len(pointed.points) if pointed.total is None else pointed.total
    if digits := re.search(r"\d{1,18}", text):
        return int(digits[0])
    words = re.findall(r"[a-z]+", text.lower())
    return next((_WORDS.index(word) for word in words if word in _WORDS), None)


def _reference_count(reference: Any) -> int:
    value = read_count(str(reference))
    if value is None:
        raise UserError(f"references: {short(reference)} is no number", allowed="0, 1, 2, ...")
    return value


def count_lmms_eval(prediction: str, references: Sequence[Any]) -> Measured:
    """1 if the first digits of the answer are those of the reference, as texts: "03" is not "3".

    As lmms-eval's PixMo-Count; an answer without digits is compared as it is.
    """
    parsed = _digits(prediction)
    return Measured(float(parsed in [_digits(str(reference)) for reference in references]), parsed)


def _digits(text: str) -> str:
    found = re.search(r"\d+", text.strip())
    return found[0] if found else text.strip()
