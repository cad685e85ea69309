"""divprune: the subset whose tokens are as far apart as possible (arXiv 2503.02175)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, remap, zero_padding
from efficient_vlm.errors import unknown
from efficient_vlm.shapes import Array

ORDERS = ("sorted", "selection")


class DivPrune(Compressor):
    """`divprune` (arXiv 2503.02175, Algorithm 1): greedy max-min diversity of projected tokens.

    Distance D_ij = 1 - cos(x_i, x_j). The first kept token is the argmax of the second smallest
    entry of its row of D, the distance to its nearest other token. Then argmax_j min_{i kept} D_ij
    is added until `budget` tokens are kept. Neither text nor attention is needed. The published
    ratio is 0.098 (56 of 576).

    Distances within 1e-5 are ties, which the lowest index wins. The second smallest entry is
    computed as the smallest off the diagonal: the same in exact arithmetic, but rounding may make
    the diagonal larger than the distance to a duplicate.

    Attributes:
      order: "sorted" keeps source order; "selection" returns the tokens in the order of selection,
        as the code behind the published numbers did (vbdi/divprune issue 8). This option breaks
        the contract of source order on purpose.
      position_policy: "reindex", as in the official code.
    """

    position_policy: str | None = "reindex"
    order: str = "sorted"

    label = "divprune"
    projected = True

    @nn.nowrap
    def check_options(self):
        if self.order not in ORDERS:
            raise unknown("compressor.order", str(self.order), ORDERS)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens:
            return 0
        return select.max_min_flops(num_tokens, width, self.budget)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        embed = jax.lax.stop_gradient(zero_padding(tokens).embed)
        selection = select.max_min(score.unit(embed), tokens.mask, self.budget)
        kept = fold.drop(tokens, selection)
        if self.order == "sorted":
            return kept
        indices, valid = selection
        # Rows within the budget stay as they are, as at the full budget.
        whole = tokens.mask.sum(axis=1, keepdims=True) <= self.budget
        in_source = jnp.sort(jnp.where(valid, indices, tokens.mask.shape[1]), axis=1)
        return in_selection_order(kept, jnp.where(whole, in_source, indices), valid)


def in_selection_order(
    kept: VisualTokens, indices: Int[Array, "B K"], valid: Bool[Array, "B K"]
) -> VisualTokens:
    """Permutes kept tokens from source order to the order of `indices`; padding stays last."""
    # holder[o]: the choice at index o of the source order. slot[s]: source-order index of choice s.
    holder = jnp.argsort(jnp.where(valid, indices, jnp.iinfo(jnp.int32).max), axis=1)
    slot = jnp.argsort(holder, axis=1)

    def permuted(x):
        return jnp.take_along_axis(x, slot.reshape(slot.shape + (1,) * (x.ndim - 2)), axis=1)

    return VisualTokens(
        embed=permuted(kept.embed),
        position=permuted(kept.position),
        size=permuted(kept.size),
        mask=permuted(kept.mask),
        source=remap(kept.source, holder.astype(jnp.int32)),
        bias=None if kept.bias is None else permuted(kept.bias),
    )
