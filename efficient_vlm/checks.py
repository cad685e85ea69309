"""Checks of field values, the same everywhere: one text for each kind of mistake.

Each function returns the value it accepts and raises `UserError` (field, value, what is allowed,
the fix if there is one) for any other. Booleans are never numbers here, although Python says so.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from efficient_vlm.errors import UserError, short, unknown

__all__ = [
    "flag",
    "known_fields",
    "number",
    "number_fields",
    "one_of",
    "whole",
]


def whole(
    field: str,
    value: Any,
    low: int | None = 1,
    high: int | None = None,
    *,
    none: bool = False,
    fix: str | None = None,
) -> int | None:
    """A whole number (of Python or NumPy) as an `int`.

    Args:
      field: its full name in the config, such as "train.steps".
      value: what the user gave.
      low, high: smallest and largest allowed value; None for no limit. Positive by default.
      none: whether None is allowed as well.
      fix: what to type or change.

    Raises:
      UserError: any other value.
    """
    if none and value is None:
        return None
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    good = good and (low is None or value >= low) and (high is None or value <= high)
    if not good:
        raise _refused(field, value, "a whole number", _limits(low, high), none, fix)
    return int(value)


def number(
    field: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    none: bool = False,
    fix: str | None = None,
) -> Any:
    """A finite number, unchanged.

    Args:
      field, value, none, fix: see `whole`.
      low, high: smallest and largest allowed value; None for no limit.
      above, below: limits that are not allowed themselves; None for no limit.

    Raises:
      UserError: any other value, NaN and infinity included.
    """
    if none and value is None:
        return None
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (low is None or value >= low) and (high is None or value <= high)
    good = good and (above is None or value > above) and (below is None or value < below)
    if not good:
        raise _refused(field, value, "a number", _limits(low, high, above, below), none, fix)
    return value


def number_fields(settings: Any, where: str, *names: str, **limits: Any) -> None:
    """Checks number fields of a dataclass (a Linen module is one) against the same limits.

    A field annotated with `float` takes any finite number in the limits, one annotated with `int`
    a whole number; None only where the annotation allows it.

    Args:
      settings: the dataclass.
      where: its section in the config, written before the field's name in the error.
      names: of the fields.
      limits: of `number`, or (for `int` fields) of `whole`, which are positive by default.

    Raises:
      UserError: for the first field with another value.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(settings)}
    for name in names:
        check = number if "float" in kinds[name] else whole
        check(f"{where}.{name}", getattr(settings, name), none="None" in kinds[name], **limits)


def flag(field: str, value: Any) -> bool:
    """True or False; UserError for any other value."""
    if not isinstance(value, bool):
        raise UserError(f"{field}: {short(value)}", allowed="True, False")
    return value


def one_of(field: str, value: Any, names: Iterable[str]) -> str:
    """A name from a known set; UserError with the nearest name as the fix for any other value."""
    names = tuple(names)
    if value not in names:
        raise unknown(field, str(value), names)
    return value


def known_fields(field: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raises UserError, with the nearest name as the fix, if `given` has a key not in `allowed`."""
    allowed = tuple(allowed)
    for name in given:
        one_of(field, name, allowed)


def _limits(
    low: float | None,
    high: float | None,
    above: float | None = None,
    below: float | None = None,
) -> str:
    """ "1 or more", "0 to 1", "above 0, up to 1"; "" without limits."""
    if low is not None and high is not None:
        return f"{low} to {high}"
    parts = (
        (low, "{} or more"),
        (above, "above {}"),
        (high, "up to {}"),
        (below, "below {}"),
    )
    return ", ".join(text.format(limit) for limit, text in parts if limit is not None)


def _refused(
    field: str, value: Any, kind: str, limits: str, none: bool, fix: str | None
) -> UserError:
    allowed = ", ".join(text for text in (kind, limits) if text) + (", or None" if none else "")
    return UserError(f"{field}: {short(value)}", allowed=allowed, fix=fix)
