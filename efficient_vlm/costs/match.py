"""Budgets that are fair to compare: each method's knobs set to equal tokens or equal FLOPs.

A method that cuts inside the decoder processes all tokens in front of its cut; at "the same T" as a
method in front of the decoder it is the dearer one. Here every method gets the setting that comes
nearest to one target, and what it reaches is reported beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from efficient_vlm.costs.ledger import Ledger
from efficient_vlm.errors import UserError, short, unknown

MEASURES: dict[str, Callable[[Ledger], float]] = {
    "mean_processed": lambda ledger: ledger.mean_processed,
    "mean_written": lambda ledger: ledger.mean_written,
    "entering": lambda ledger: ledger.entering,
    "flops": lambda ledger: ledger.total,
    "kv_bytes": lambda ledger: ledger.kv_bytes,
}
_RELATIVE = ("flops", "kv_bytes")
FAR = 0.05  # A method further off than this is not at equal cost.


@dataclasses.dataclass(frozen=True)
class Target:
    """What to match.

    Attributes:
      measure: a key of MEASURES.
      value: to come near to; a share of the baseline if `relative`.
      relative: whether it is one.
    """

    measure: str
    value: float
    relative: bool = False

    def goal(self, baseline: Ledger) -> float:
        """The number to come near to."""
        return self.value * MEASURES[self.measure](baseline) if self.relative else self.value


@dataclasses.dataclass(frozen=True)
class Match:
    """The setting of a method that comes nearest to a target.

    Attributes:
      settings: options to set.
      ledger: with them.
      reached: the measure.
      goal: what was asked for.
    """

    settings: Mapping[str, Any]
    ledger: Ledger
    reached: float
    goal: float

    @property
    def off(self) -> float:
        """How far from the goal, as a share of it; below 0 if it fell short."""
        return self.reached / self.goal - 1

    @property
    def far(self) -> bool:
        """Whether it missed: by more than FAR."""
        return abs(self.off) > FAR


def parse_target(text: str) -> Target:
    """`mean_processed:128`, `flops:0.5` (a share of the baseline) or `flops:1.2e12`.

    Up to 1, FLOPs and KV bytes are a share of the baseline's.

    Raises:
      UserError: an unknown measure, or no number above 0.
    """
    measure, _, number = text.partition(":")
    if measure not in MEASURES:
        raise unknown("--match", measure, MEASURES)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(
            f"--match={text}: {short(number)} is not a number above 0",
            allowed="mean_processed:TOKENS, flops:SHARE up to 1, flops:COUNT",
            fix="for example --match=mean_processed:128",
        )
    return Target(measure, value, measure in _RELATIVE and value <= 1)


def solve(
    build: Callable[[Mapping[str, Any]], Ledger],
    knobs: Iterable[Mapping[str, Any]],
    target: Target,
    baseline: Ledger,
) -> Match:
    """Bisects over a method's settings, which are ordered from the fewest tokens to the most.

    Args:
      build: settings -> ledger.
      knobs: from `Compressor.knobs`.
      target: from `parse_target`.
      baseline: the model without the method.

    Returns:
      The nearest setting; of two at the same distance the cheaper. A target beyond the first or
      last setting gives that setting.

    Raises:
      UserError: the method has no settings, or none of them changes the measure.
    """
    settings = list(knobs)
    if not settings:
        raise UserError("--match: this method has no knob to set", fix="leave it out of --match")
    goal, measure, known = target.goal(baseline), MEASURES[target.measure], {}

    def at(index: int) -> Ledger:
        if index not in known:
            known[index] = build(settings[index])
        return known[index]

    if len(settings) > 1:
        _check_moves(target.measure, at(0), at(len(settings) - 1))
    low, high = 0, len(settings) - 1  # The answer is `low` or the one in front of it.
    while low < high:
        middle = (low + high) // 2
        if measure(at(middle)) < goal:
            low = middle + 1
        else:
            high = middle
    candidates = [index for index in (low - 1, low) if index >= 0]
    best = min(candidates, key=lambda index: abs(measure(at(index)) - goal))
    return Match(settings[best], at(best), measure(at(best)), goal)


def _check_moves(measure: str, fewest: Ledger, most: Ledger) -> None:
    """UserError if the first and last settings of a method measure the same."""
    moving = [name for name, of in MEASURES.items() if of(fewest) != of(most)]
    if measure in moving:
        return
    name = fewest.compressor["name"]
    raise UserError(
        f"--match={measure}: {name} has {MEASURES[measure](most):g} whatever its settings",
        allowed=", ".join(moving) or None,
        fix=f"match one of these, or leave {name} out",
    )
