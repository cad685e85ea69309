"""fitprune: every layer deletes a fixed number of the visual tokens with the least attention."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn

from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder.base import InDecoder, check_falling, check_keep, count_of
from efficient_vlm.compressors.in_decoder.rows import judges, range_flops, range_sums
from efficient_vlm.errors import UserError, short, unknown

SCHEDULES = ("published", "geometric")
DEPTH, TOKENS = 32, 576

# Nominal FLOPs reduction in percent -> visual tokens that each of the 32 layers of LLaVA-1.5-7B
# deletes: the recipes that the authors solved and published (numbers from the repository
# ywh187/FitPrune, LLaVA_1.5). The first recipe deletes nothing.
DELETED = {
    0: (0,) * DEPTH,
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0)
    + (1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0)
    + (6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0)
    + (16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1)
    + (26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2)
    + (30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2)
    + (29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4)
    + (26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8)
    + (18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8)
    + (7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    + (1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
WIDTH, MLP = 4096, 11008  # Of LLaVA-1.5-7B, for which rates are defined.


def layer_flops(tokens: float) -> float:
    """4 n d^2 + 2 n^2 d + 3 n d m for one layer: multiply-adds, of image tokens only."""
    return WIDTH * tokens * (4 * WIDTH + 2 * tokens + 3 * MLP)


def published(rate: float, num_layers: int, num_tokens: int) -> tuple[float, ...]:
    """Tokens that the published recipe of a nominal rate leaves after each layer.

    They are interpolated between two published rates, and over the depth if the decoder has another
    number of layers; another number of tokens scales them proportionally.
    """
    percent = 100 * rate
    high = min(p for p in DELETED if p >= percent - 1e-9)
    low = max(p for p in DELETED if p <= percent + 1e-9)
    share = (percent - low) / (high - low) if high > low else 0.0

    def left(depth: float, deleted: Sequence[int]) -> float:
        """Tokens after `depth` of 32 layers, which may be fractional."""
        whole = math.floor(depth)
        done = sum(deleted[:whole])
        return TOKENS - done - ((depth - whole) * deleted[whole] if whole < DEPTH else 0.0)

    kept = []
    for layer in range(1, num_layers + 1):
        depth = layer * DEPTH / num_layers
        mixed = (1 - share) * left(depth, DELETED[low]) + share * left(depth, DELETED[high])
        kept.append(mixed * num_tokens / TOKENS)
    return tuple(kept)


@functools.lru_cache(maxsize=1024)
def geometric(rate: float, num_layers: int, num_tokens: int) -> tuple[float, ...]:
    """N q^l tokens after layer l = 1, 2, ..., with one ratio q for all layers.

    Bisection solves sum_l F(N q^(l-1)) = (1 - rate) L F(N) for q, with F = `layer_flops`. The
    actual reduction is the nominal one, as far as whole tokens and the full first layer allow.
    """
    target = (1 - rate) * num_layers * layer_flops(num_tokens)
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        cost = sum(layer_flops(num_tokens * ratio**layer) for layer in range(num_layers))
        low, high = (ratio, high) if cost < target else (low, ratio)
    return tuple(num_tokens * high ** (layer + 1) for layer in range(num_layers))


class FitPrune(InDecoder):
    """`fitprune` (arXiv 2409.10197): deletes a planned number of visual tokens in every layer.

    With the attention map of a layer, A_ij the maximum over its heads, the score of visual token j
    is (sum of A_ij over visual i) * (sum of A_ij over text i); the tokens with the lowest scores
    are deleted. The map is never materialised: its columns are summed over blocks of query rows.
    Every layer that cuts computes all rows, so the scores cost about as much as its QK^T.

    The authors solved offline, from attention statistics, how many tokens each layer deletes; their
    recipes are the default. Rates are nominal: on LLaVA-1.5-7B, 10/20/50/60/80/90 % are actually
    6.4/15.4/49.7/59.7/79.7/89.7 % (see `layer_flops`).

    Positions: "retain" by default, as published.

    DEVIATIONS from the official code: (a) it deletes between attention and feed-forward of a layer,
    we delete after the layer, so its feed-forward still processes the deleted tokens: the actual
    reductions of the recipes become 6.2/14.8/48.1/57.9/77.6/87.5 %. Deletions of the last layer are
    omitted, because nothing follows it. (b) Text rows are those of the prompt, never those of an
    answer (the official code prunes in prefill, without an answer). (c) At least one token remains.
    Ties keep the lowest index.

    Attributes:
      rate: nominal fraction of the decoder's FLOPs to save, above 0 and at most 0.9 for the
        published recipes (10, 20, ..., 90 and 55 %; rates between them are interpolated).
      schedule: "published" recipes, or "geometric": each layer keeps the same fraction of its
        tokens, solved for `rate` (see `geometric`); any rate below 1.
      counts: visual tokens left after each layer, for all images of a row together, as counts or
        fractions of those that enter the decoder: one number per layer except the last (a number
        for the last may follow and has no effect). Replaces `rate` and `schedule`.
    """

    rate: float = 0.6
    schedule: str = "published"
    counts: tuple | None = None
    position_policy: str | None = "retain"

    label = "fitprune"
    text_guided = True
    knob = "counts"

    @nn.nowrap
    def check_options(self):
        if self.schedule not in SCHEDULES:
            raise unknown("compressor.schedule", str(self.schedule), SCHEDULES)
        number = isinstance(self.rate, int | float) and not isinstance(self.rate, bool)
        most = 0.9 if self.schedule == "published" else 0.99
        if not (number and 0 < self.rate <= most):
            raise UserError(
                f"compressor.rate: {short(self.rate)} is not a share of FLOPs to save",
                allowed=f"above 0, at most {most} with compressor.schedule={self.schedule}",
                fix="compressor.rate=0.6",
            )
        if self.counts is not None:
            counts = as_tuple("compressor.counts", self.counts)
            for count in counts:
                check_keep("compressor.counts", count)
            check_falling("compressor.counts", counts)
            object.__setattr__(self, "counts", counts)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        self.no_budget("compressor.rate or compressor.counts")
        if num_layers < 2:
            raise UserError(
                f"compressor.name: {self.label} cuts between layers, the decoder has {num_layers}",
                allowed="2 layers and more",
            )
        if self.counts is not None and len(self.counts) not in (num_layers - 1, num_layers):
            raise UserError(
                f"compressor.counts: {len(self.counts)} numbers for {num_layers} layers",
                allowed=f"{num_layers - 1} numbers, tokens left after each layer",
            )
        cuts = range(1, num_layers)

        def counts(total):
            if self.counts is not None:
                kept = [count_of(count, total) for count in self.counts]
            else:
                plan = published if self.schedule == "published" else geometric
                left = plan(float(self.rate), num_layers, total)
                kept = [max(1, math.floor(count + 0.5)) for count in left]
            return kept[: len(cuts)]

        fields = dict(rows=counts, counts=(None,) * len(cuts))
        return self.cuts(cuts, counts(num_tokens), num_tokens, **fields)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        most = 90 if self.schedule == "published" else 99
        return [{"rate": percent / 100, "counts": None} for percent in range(most, 0, -1)]

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0, *, num_text=0):
        del text_width
        if self.budget == num_tokens:
            return 0
        places = num_tokens + num_text
        return sum(range_flops(rows, places, width) for rows in (num_tokens, num_text))

    @nn.nowrap
    def scores(self, tokens, state):
        """Product of the attention from visual and from text rows, each a maximum over heads."""
        count = tokens.mask.shape[1]
        rows = judges(state)
        own = range_sums(state, 0, rows[:, :count], heads="max")
        cross = range_sums(state, count, rows[:, count:], heads="max")
        return (own * cross)[:, :count]
