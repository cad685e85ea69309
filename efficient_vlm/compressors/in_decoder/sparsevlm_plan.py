"""How many tokens sparsevlm keeps at each cut: the published schedules, and others between them.

A published schedule is named after a number of tokens, for N = 576 and cuts after 3, 7 and 16 of 32
layers. That number is about the mean count of tokens that layers *write*; they *process* more
(192: 192.03 written, 206.5 processed; 64: 64.8 and 82.25).
"""

import math
from collections.abc import Sequence

from efficient_vlm.errors import UserError

DEPTH, TOKENS = 32, 576
CUTS = (3, 7, 16)  # Layers before each cut.

# Version -> name -> tokens kept at each cut, without merged ones (official code).
SCHEDULES = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


def candidates(losers: int, recycle: float) -> int:
    """The number of tokens of p = `losers` that are clustered: floor(recycle p) + 1, at most p."""
    return min(int(losers * recycle) + 1, losers)


def merged(losers: int, recycle: float) -> int:
    """The number of merged tokens: floor(candidates / 10) + 1, or 0 without losers or recycling."""
    return candidates(losers, recycle) // 10 + 1 if losers and recycle else 0


def counts_after(keeps: Sequence[int], num_tokens: int, recycle: float) -> tuple[int, ...]:
    """Tokens after each cut, including merged ones; a cut that keeps all changes nothing."""
    counts, now = [], num_tokens
    for keep in keeps:
        now = min(now, keep + merged(now - keep, recycle)) if keep < now else now
        counts.append(now)
    return tuple(counts)


def mean_processed(
    cuts: Sequence[int], counts: Sequence[int], num_layers: int, num_tokens: int
) -> float:
    """Mean number of visual tokens that enter a layer."""
    edges = (0, *cuts, num_layers)
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    entering = (num_tokens, *counts)
    return sum(n * t for n, t in zip(lengths, entering, strict=True)) / num_layers


def kept_of(budget: int, num_tokens: int, recycle: float) -> int:
    """How many of `budget` slots after one cut hold kept tokens; merged tokens take the rest.

    The largest k with k + min(merged(T - k), budget // 2) = budget: the published rule, but at most
    half of the slots are for merged tokens.
    """
    keep = budget
    while keep + min(merged(num_tokens - keep, recycle), budget // 2) > budget:
        keep -= 1
    return keep


def solve(
    budget: float,
    published: dict[int, tuple[int, ...]],
    cuts: Sequence[int],
    num_layers: int,
    num_tokens: int,
    recycle: float,
) -> tuple[int, ...]:
    """Tokens to keep at each cut so that the mean of processed tokens is closest to `budget`.

    The published schedule with the closest fraction of its N gives the shape: its fractions are
    scaled by one factor, rounded, and clipped to 1 .. N. Layers before the first cut always process
    N tokens, so small budgets are impossible (`check_reached`): the closest schedule is returned.
    """
    name = min(published, key=lambda b: (abs(b / TOKENS - budget / num_tokens), b))
    shape = [count / TOKENS for count in published[name]]

    def keeps(scale: float) -> tuple[int, ...]:
        wanted = [math.floor(scale * share * num_tokens + 0.5) for share in shape]
        return tuple(min(max(count, 1), num_tokens) for count in wanted)

    def mean(scale: float) -> float:
        counts = counts_after(keeps(scale), num_tokens, recycle)
        return mean_processed(cuts, counts, num_layers, num_tokens)

    low, high = 0.0, 2 / min(shape)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= budget else (low, middle)
    return keeps(min((low, high), key=lambda scale: (abs(mean(scale) - budget), scale)))


def named(budget: int, version: str, num_tokens: int) -> tuple[int, ...] | None:
    """Tokens that the schedule of that name keeps at each cut; None if N is not 576.

    Raises:
      UserError: more than N, or not the name of a schedule of N = 576.
    """
    schedules = SCHEDULES[version]
    if budget > num_tokens:
        raise UserError(
            f"compressor.budget: {budget}, but only {num_tokens} visual tokens",
            allowed=", ".join(map(str, sorted(schedules)))
            if num_tokens == TOKENS
            else f"a mean of processed tokens, at most {num_tokens}",
        )
    if num_tokens != TOKENS:
        return None
    if budget in schedules:
        return schedules[budget]
    raise UserError(
        f"compressor.budget: sparsevlm has no published schedule {budget} of {TOKENS} tokens",
        allowed=", ".join(map(str, sorted(schedules))) + "; or keep=(a,b,c), for any other",
        fix=f"compressor.budget={min(schedules, key=lambda b: (abs(b - budget), b))}",
    )


def check_reached(
    budget: float, cuts: Sequence[int], num_layers: int, num_tokens: int, recycle: float
) -> None:
    """UserError if even one kept token per cut exceeds a mean of `budget` processed tokens."""
    counts = counts_after((1,) * len(cuts), num_tokens, recycle)
    lowest = mean_processed(cuts, counts, num_layers, num_tokens)
    if budget < lowest:
        raise UserError(
            f"compressor.budget: {budget}, but sparsevlm processes a mean of {lowest:.4g} tokens "
            f"or more with cuts after layers {', '.join(map(str, cuts))}",
            allowed=f"{math.ceil(lowest)} to {num_tokens}, the mean over {num_layers} layers",
            fix=f"compressor.budget={math.ceil(lowest)}, or earlier compressor.layers",
        )
