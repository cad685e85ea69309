"""sparsevlm: words that relate to the image rate its tokens; some of the losers are merged."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm import checks
from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder import sparsevlm_plan as plan
from efficient_vlm.compressors.in_decoder.base import (
    InDecoder,
    Keep,
    check_falling,
    check_keep,
    count_of,
    row_table,
)
from efficient_vlm.compressors.in_decoder.clusters import keep_and_cluster
from efficient_vlm.compressors.in_decoder.rows import range_flops, range_sums
from efficient_vlm.compressors.in_decoder.sparsevlm_scores import raters, rotary_bias, turns
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.errors import UserError, unknown


class SparseVLM(InDecoder):
    """`sparsevlm` (arXiv 2410.04417): three cuts, rated by the words that matter for the image.

    Raters: R is the softmax over the text of v t^T, unscaled dot products of the inputs of the
    decoder's first layer. The relevance of a word is its mean over the visual tokens, and words
    with more than the mean relevance are raters. Score: attention from the raters to each visual
    token in the layer before the cut, mean over heads and raters. Version "1.5":

    * the `keep` best tokens are kept; of the p others the floor(recycle p) + 1 best are clustered
      (`clusters.dpc_knn` on hidden states) into floor(that / 10) + 1 tokens;
    * a merged token takes the index of its cluster's centre, so all tokens are in source order; its
      position, size and `source` are those of its members.

    Version "2.0" (SparseVLM+, sections 4.2 and 4.3, known from third-party ports of the official
    code) has different counts, no merging, and a different score: attention A_mn is divided by the
    bias that rotary positions alone cause, D_mn = (1 / Dh) <rotate_m(1), rotate_n(1)> with 1 the
    vector of ones; then only the `num_heads` heads with the most attention to visual tokens are
    averaged. UNCERTAIN: whether the published code divides weights or logits (weights here).

    Cuts follow 3, 7 and 16 of 32 layers (the published indices 2, 6 and 15, from 0). Positions:
    "reindex" by default for 1.5 and "retain" for 2.0, as in the official code; None means that
    default, not the decoder's policy.

    The paper derives the counts from the rank of the raters' attention, which depends on the image;
    the official code of 1.5 replaced it by fixed counts, and so do we (static shapes).

    DEVIATIONS: (a) the official code appends the merged tokens to the kept ones; (b) it uses plain
    means of embeddings, ours are weighted by size, which matters from the second cut on; (c) it
    adds noise in the clustering, here ties go to the lowest index; (d) only prompt words can be
    raters; if no word is above the mean (all are equal), the whole prompt is; (e) in a row with
    padding p counts the real losers only, but at least as many tokens as clusters are clustered;
    (f) D_mn is at least 0.05, because it can be 0 or negative; (g) the raters, which the first
    layer's input determines, are recomputed at each cut.

    Attributes:
      budget: at N = 576 the name of a published schedule; otherwise the target mean of processed
        tokens (`sparsevlm_plan`). N counts the visual tokens of all images of a row together. None
        for N / 3. In the one-cut form: tokens after the cut, including merged ones.
      keep: tokens kept at each cut, excluding merged ones, for all images of a row together: counts
        or fractions of those that enter the decoder. Replaces `budget`.
      layers: numbers of layers before each cut; None for the published ones, rescaled to the depth.
      version: "1.5" or "2.0", also as a number.
      recycle: fraction of the losers that is clustered (1.5).
      num_heads: number of heads that are averaged (2.0); all if the decoder has fewer.
      rope_fraction: the decoder's; which channels of queries and keys rotate together (2.0).
      entering: visual tokens before the first layer, for `flops`; set by `stages`.
      row_plan: `row_counts` with three columns, tokens before the cut, kept, and after it; set by
        `stages`.
    """

    keep: Sequence[Keep] | None = None
    layers: Sequence[int] | None = None
    version: str = "1.5"
    recycle: float = 0.3
    num_heads: int = 14
    rope_fraction: float = 1.0
    entering: int | None = None
    row_plan: Callable[[int], np.ndarray] | None = None

    label = "sparsevlm"
    text_guided = True
    internal = InDecoder.internal | {"entering", "row_plan"}

    def __post_init__(self):
        if isinstance(self.version, int | float) and not isinstance(self.version, bool):
            object.__setattr__(self, "version", str(float(self.version)))
        if self.position_policy is None:
            policy = "retain" if self.version == "2.0" else "reindex"
            object.__setattr__(self, "position_policy", policy)
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.version not in tuple(plan.SCHEDULES):
            raise unknown("compressor.version", str(self.version), plan.SCHEDULES)
        for name in ("keep", "layers"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_tuple(f"compressor.{name}", value))
        for keep in self.keep or ():
            check_keep("compressor.keep", keep)
        check_falling("compressor.keep", self.keep or ())
        cuts = plan.CUTS if self.layers is None else self.layers
        one_cut = self.budget is not None and len(self.keep or ()) == 1
        if self.keep is not None and len(self.keep) != len(cuts) and not one_cut:
            raise UserError(
                f"compressor.keep: {len(self.keep)} numbers for {len(cuts)} cuts",
                allowed="one number for each of compressor.layers, which are three by default",
            )
        checks.whole("compressor.num_heads", self.num_heads)
        for name in ("recycle", "rope_fraction"):
            checks.number(f"compressor.{name}", getattr(self, name), 0, 1)

    @nn.nowrap
    def _cuts(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of layers before each cut."""
        if self.layers is None:
            return self.scaled(plan.CUTS, plan.DEPTH, num_layers)
        return self.check_layers("compressor.layers", self.layers, num_layers)

    @nn.nowrap
    def _recycle(self) -> float:
        return self.recycle if self.version == "1.5" else 0.0

    @nn.nowrap
    def _solve(self, budget: int, num_layers: int, num_tokens: int) -> tuple[int, ...]:
        cuts = self._cuts(num_layers)
        if len(cuts) != len(plan.CUTS):
            raise UserError(
                f"compressor.layers: {len(cuts)} cuts, but the published schedules have three",
                allowed="compressor.keep, one number for each cut",
            )
        shapes = plan.SCHEDULES[self.version]
        return plan.solve(budget, shapes, cuts, num_layers, num_tokens, self._recycle())

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        if self.budget is not None and self.keep is not None:
            raise UserError(
                f"compressor.keep: {self.keep}, and compressor.budget={self.budget} beside it",
                allowed="one of the two: a budget is the name of a schedule",
                fix="omit one of them",
            )
        cuts = self._cuts(num_layers)
        if self.keep is None:
            budget = self._budget_of(num_tokens)
            if (plan.named(budget, self.version, num_tokens) is None) or len(cuts) != 3:
                self._solve(budget, num_layers, num_tokens)
                plan.check_reached(budget, cuts, num_layers, num_tokens, self._recycle())
        elif count_of(self.keep[0], num_tokens) > num_tokens:
            raise UserError(
                f"compressor.keep: {self.keep[0]}, but only {num_tokens} visual tokens",
                allowed=f"1 to {num_tokens}, or a fraction",
            )
        keeps_of = functools.cache(functools.partial(self._keeps, num_layers))

        def counts(total):
            return plan.counts_after(keeps_of(total), total, self._recycle())

        keeps = row_table(keeps_of)
        left = row_table(counts)

        def row_plan(index, most):
            after = left(most)
            before = after[:, index - 1] if index else np.arange(most + 1)
            kept = np.minimum(keeps(most)[:, index], after[:, index])
            return np.stack([before, kept, after[:, index]], axis=1)

        places = range(len(cuts))
        return self.cuts(
            cuts,
            counts(num_tokens),
            num_tokens,
            rows=counts,
            layers=(None,) * len(cuts),
            keep=[(keep,) for keep in keeps_of(num_tokens)],
            entering=(num_tokens,) * len(cuts),
            row_plan=[functools.partial(row_plan, index) for index in places],
        )

    @nn.nowrap
    def _budget_of(self, total: int) -> int:
        return self.budget or max(1, round(total / 3))

    @nn.nowrap
    def _keeps(self, num_layers: int, total: int) -> tuple[int, ...]:
        """Tokens kept at each cut of a row of `total` tokens, without merged ones."""
        if self.keep is not None:
            return tuple(count_of(keep, total) for keep in self.keep)
        budget, cuts = min(self._budget_of(total), total), self._cuts(num_layers)
        if total == plan.TOKENS and budget in plan.SCHEDULES[self.version] and len(cuts) == 3:
            return plan.SCHEDULES[self.version][budget]
        return self._solve(budget, num_layers, total)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        """Solved schedules for a mean of 1, 2, ..., N processed tokens, without duplicates."""
        solved = (self._solve(mean, num_layers, num_tokens) for mean in range(1, num_tokens + 1))
        return [{"budget": None, "keep": keeps} for keeps in dict.fromkeys(solved)]

    @nn.nowrap
    def _kept(self, num_tokens: int) -> int:
        """In the one-cut form: slots of kept tokens; merged ones take the rest."""
        if self.keep is not None and isinstance(self.keep[0], int):
            return min(self.keep[0], self.budget)
        return plan.kept_of(self.budget, num_tokens, self._recycle())

    @nn.nowrap
    def _candidates(self, num_tokens: int) -> int:
        """The largest number of losers that are clustered."""
        kept = self._kept(num_tokens)
        return max(plan.candidates(num_tokens - kept, self._recycle()), self.budget - kept)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0, *, num_text=0):
        del text_width
        if self.budget == num_tokens:
            return 0
        relevance = 2 * (self.entering or num_tokens) * num_text * width
        score = range_flops(num_text, num_tokens + num_text, width)
        places = self.budget - self._kept(num_tokens)
        if not places:
            return relevance + score
        count = self._candidates(num_tokens)
        # Distances; sums of embeddings, positions and sizes.
        return relevance + score + 2 * count * count * width + 2 * places * count * (width + 3)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        """The one-cut form: `budget` tokens, some of which may be merged."""
        self.check_cut(tokens, signals)
        num_tokens = tokens.mask.shape[1]
        if self.keeps_all(tokens):
            return tokens
        state = jax.lax.stop_gradient(signals.decoder)
        scores, kept = self.scores(tokens, state), self._kept(num_tokens)
        places, losers, each = self.budget - kept, num_tokens - kept, None
        if self.row_plan is not None:
            before, own, left = self.row_plan(state.first_live.shape[1]).T
            if self.uneven:
                kept, places = int(own.max()), int((left - own).max())
                losers = int((before - own).max())
            live = jnp.sum(state.first_live, axis=1)
            each = np.minimum(own, kept), np.minimum(left - own, places)
            each = tuple(jnp.asarray(numbers, jnp.int32)[live] for numbers in each)
        if not places:
            count = None if each is None else each[0]
            return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget, count))
        # How many of p real losers are clustered: never fewer than there are clusters.
        table = [plan.candidates(p, self.recycle) for p in range(losers + 1)]
        return keep_and_cluster(tokens, scores, kept, places, table, each, self.budget)

    @nn.nowrap
    def scores(self, tokens, state):
        """Mean attention of the raters."""
        count = tokens.mask.shape[1]
        words = raters(state)
        number = jnp.maximum(jnp.sum(words, axis=1, dtype=jnp.float32), 1.0)
        if self.version == "1.5":
            return range_sums(state, count, words)[:, :count] / number[:, None]
        divisor = functools.partial(rotary_bias, state, turns(state, self.rope_fraction))
        attention = range_sums(state, count, words, heads="each", divisor=divisor)[..., :count]
        attention = jnp.where(tokens.mask[:, None], attention, 0.0) / number[:, None, None]
        heads = attention.shape[1]
        most = min(self.num_heads, heads)
        chosen, _ = select.top_k(
            jnp.sum(attention, axis=-1), jnp.ones((len(attention), heads), bool), most
        )
        return jnp.take_along_axis(attention, chosen[..., None], axis=1).mean(axis=1)
