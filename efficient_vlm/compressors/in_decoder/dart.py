"""dart: keeps tokens unlike a few pivots, because duplicates of a kept token add little."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import select
from efficient_vlm.compressors.in_decoder.base import InDecoder, Keep, check_keep, count_of
from efficient_vlm.compressors.in_decoder.rows import judges
from efficient_vlm.errors import UserError, short
from efficient_vlm.kernels import ordering

DEFAULT_KEEP = 0.222


class Dart(InDecoder):
    """`dart` (arXiv 2502.11494): keeps a few pivots and the tokens least similar to them.

    "Stop looking for important tokens: duplication matters more".

    Before layer `layer`, with queries, keys and hidden states of the previous layer:

    1. Pivots: the `visual_pivots` visual tokens and the `text_pivots` tokens of the prompt whose
       keys (with rotary positions, all heads in one vector) have the largest L1 norm.
    2. The visual pivots are kept. Then each pivot in turn, visual ones first, each kind in order of
       decreasing norm, adds its share of the visual tokens that are not kept yet: those with the
       lowest cosine similarity to it.

    No attention weights are needed. Positions: "retain" by default, as published.

    DEVIATIONS from the official code: (a) the count is exact. In the official code each of 8 pivots
    adds int(N (1 - r) / 8) tokens to the visual pivots, so the total is a little above or below
    N (1 - r), and candidates come in the order of a Python set. Here the pivots count, the rest of
    the budget is shared equally among the pivots of the row, and the first ones take the remainder.
    (b) Similarities use the outputs of the layer without the decoder's final norm, which the code
    of LightCompress applies first (dividing by a root mean square preserves cosines; its learned
    scale does not). (c) Only prompt tokens can be text pivots, never those of an answer. Ties go to
    the lowest index.

    Attributes:
      budget: a count to keep, for all images of a row together; an alternative to `keep`.
      keep: visual tokens after the cut, for all images of a row together: a count, or a fraction of
        those before it. None is 0.222, the published reduction of 77.8 %.
      layer: K, number of layers before the cut.
      visual_pivots, text_pivots: numbers of pivots, together at least 1. At most `budget` visual
        pivots are used, and fewer of either kind in rows with fewer tokens.
    """

    keep: Keep | None = None
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    position_policy: str | None = "retain"

    label = "dart"
    text_guided = True

    @nn.nowrap
    def check_options(self):
        if self.keep is not None:
            check_keep("compressor.keep", self.keep)
            if self.budget is not None:
                raise UserError(
                    f"compressor.keep: {self.keep}, and compressor.budget={self.budget} beside it",
                    allowed="one of the two: a budget is a count to keep",
                    fix="omit one of them",
                )
        checks.whole("compressor.layer", self.layer)
        counts = (self.visual_pivots, self.text_pivots)
        whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts)
        if not whole or not any(counts):
            raise UserError(
                f"compressor.visual_pivots and text_pivots: {short(counts)}",
                allowed="integers from 0, not both 0",
                fix="compressor.visual_pivots=4 compressor.text_pivots=4",
            )

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        layers = self.check_layers("compressor.layer", (self.layer,), num_layers)
        keep = DEFAULT_KEEP if self.keep is None else self.keep
        keep = keep if self.budget is None else self.budget

        def counts(total):
            return (count_of(keep, total),)

        return self.cuts(layers, counts(num_tokens), num_tokens, rows=counts, keep=(None,))

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"keep": count} for count in range(1, num_tokens + 1)]

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0, *, num_text=0):
        del text_width
        if self.budget == num_tokens:
            return 0
        pivots = min(self.visual_pivots, self.budget) + min(self.text_pivots, num_text)
        return 2 * pivots * num_tokens * width

    @nn.nowrap
    def selection(self, tokens, signals):
        """The visual pivots and the tokens that all pivots add."""
        state = jax.lax.stop_gradient(signals.decoder)
        count = tokens.mask.shape[1]
        candidates = judges(state)
        norm = jnp.sum(jnp.abs(state.key.astype(jnp.float32)), axis=(2, 3))
        norm = jnp.where(state.live, norm, 0.0)
        unit = jnp.where(state.live[..., None], state.after, 0).astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(unit), axis=-1, keepdims=True))
        unit = unit / jnp.where(length > 0, length, 1.0)  # A zero vector is unlike all others.

        def pivots(part, number):
            number = min(number, part.stop - part.start)
            index, valid = select.top_k(norm[:, part], candidates[:, part], number)
            return index + part.start, valid

        real = jnp.sum(tokens.mask, axis=1)
        kept_of_row = self.row_budget(tokens, state)
        kept_of_row = jnp.minimum(self.budget if kept_of_row is None else kept_of_row, real)
        index, valid = pivots(slice(0, count), min(self.visual_pivots, self.budget))
        visual = index, valid & (jnp.arange(index.shape[1]) < kept_of_row[:, None])
        text = pivots(slice(count, candidates.shape[1]), self.text_pivots)
        index, valid = (jnp.concatenate(pair, axis=1) for pair in zip(visual, text, strict=True))
        pivot = jnp.take_along_axis(unit, index[..., None], axis=1)
        alike = jnp.einsum(
            "bpd,btd->bpt", pivot, unit[:, :count], precision=jax.lax.Precision.HIGHEST
        )

        rows = jnp.arange(count)
        kept = jnp.any((rows == visual[0][..., None]) & visual[1][..., None], axis=1)
        wanted = kept_of_row - jnp.sum(kept, axis=1)
        parts = jnp.maximum(jnp.sum(valid, axis=1), 1)
        # The first valid pivots take the remainder.
        turn = jnp.cumsum(valid, axis=1) - 1
        share = (wanted // parts)[:, None] + (turn < (wanted % parts)[:, None])
        share = jnp.where(valid, share, 0)

        def take(kept, step):
            similarity, share = step
            free = tokens.mask & ~kept
            rank = ordering.ranks(-similarity, free)
            return kept | (free & (rank < share[:, None])), None

        steps = (jnp.moveaxis(alike, 1, 0), jnp.moveaxis(share, 1, 0))
        kept, _ = jax.lax.scan(take, kept, steps)
        # A row without pivots (no prompt, and `visual_pivots` 0) keeps its first tokens.
        return select.top_k(kept.astype(jnp.float32), tokens.mask, self.budget, kept_of_row)
