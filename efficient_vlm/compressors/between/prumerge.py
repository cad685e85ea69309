"""PruMerge and PruMerge+ with static shapes: kept tokens absorb the tokens most similar to them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm import checks
from efficient_vlm.compressors import select
from efficient_vlm.compressors.between.cls_attention import (
    AttentionGuided,
    as_mask,
    as_selection,
    cosine_to,
)
from efficient_vlm.compressors.signals import NO_SIGNALS, Signals
from efficient_vlm.compressors.tokens import VisualTokens, merge, take
from efficient_vlm.errors import unknown
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

WEIGHTS = ("published", "normalised")


class PruMerge(AttentionGuided):
    """`prumerge`: the tokens CLS attends to most, each plus a weighted sum of its neighbours.

    Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arXiv 2403.15388, section 3 and Algorithm 1. Let a_j be the attention of CLS to patch j with all
    heads as one (softmax of q.k / sqrt(D), not normalised over patches):

    1. Keep the best tokens by a: exactly the budget here; as published (`adaptive`) the outliers,
       a_j > Q3 + 1.5 (Q3 - Q1), quartiles over the patches by linear interpolation.
    2. Each kept token i becomes x_i + sum a_j x_j over the `neighbours` tokens j != i, kept or not,
       whose keys (all heads as one) have the highest cosine with its own (ties: lowest index). The
       sums use the original x.
    3. The official code appends one more token, sum a_j x_j over all that are not kept (`extra`).

    Kept tokens are in raster order, followed by the extra one; positions are re-indexed.

    Attributes:
      attention: as in `AttentionGuided`, but "cls" treats all heads as one.
      adaptive: keep only the outliers, at most the budget, and pad the remaining slots: the
        published number of tokens within a static bucket. No budget is the identity then.
      extra: whether one token of the budget is the sum of the others (for budgets from 2).
      weights: "published", as above; or "normalised", the sums of steps 2 and 3 divided by the sum
        of their a_j (weighted means, whose scale does not depend on the attention).
      neighbours: the number of neighbours in step 2 (32 published); 0 to prune only.

    Deviations: the number of tokens is static, see `adaptive`; by default none is `extra`. An image
    without outliers keeps its best token (in the official code, none). With fewer than 33 real
    tokens there are fewer neighbours. The official code orders kept tokens by attention and reads
    keys and attention of CLIP's last layer, one layer after the features; our `layer` is the last
    executed one. Kept tokens keep their own size and position, because the sums overlap; patches
    that are not kept are held by the extra token, or by none.
    """

    adaptive: bool = False
    extra: bool = False
    weights: str = "published"
    neighbours: int = 32

    label = "prumerge"
    needs = frozenset({"attention_row", "keys"})

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.flag("compressor.adaptive", self.adaptive)
        checks.flag("compressor.extra", self.extra)
        if self.weights not in WEIGHTS:
            raise unknown("compressor.weights", str(self.weights), WEIGHTS)
        checks.whole("compressor.neighbours", self.neighbours, 0)

    @nn.nowrap
    def intermediates(self):
        asked = {**super().intermediates(), "keys": f"keys/{self.layer}"}
        if self.attention == "cls":
            asked["attention_row"] = f"cls_row_full/{self.layer}"
        return asked

    @nn.nowrap
    def num_extra(self) -> int:
        """Slots of the budget for the sum of what is not kept: 1 or 0."""
        return int(self.extra and self.budget > 1)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens and not self.adaptive:
            return 0
        kept = self.budget - self.num_extra()
        sums = 4 * kept * num_tokens * width if min(self.neighbours, num_tokens - 1) else 0
        return sums + self.num_extra() * 2 * num_tokens * (2 * width + 3)

    @nn.nowrap
    def keep(
        self, row: Float[Array, "B T"], mask: Bool[Array, "B T"], count: int
    ) -> Bool[Array, "B T"]:
        """The kept tokens, at most `count` per row."""
        if self.adaptive:
            mask = outliers(row, mask)
        return as_mask(select.top_k(row, mask, count), mask.shape[1])

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens = tokens.mask.shape[1]
        if self.budget == num_tokens and not self.adaptive:
            return tokens
        out = self._merged(tokens, signals)
        if self.adaptive:
            return out
        # Rows within the budget stay as they are, as all do at the full budget.
        whole = tokens.mask.sum(axis=1) <= self.budget
        same = take(tokens, *as_selection(tokens.mask, self.budget))

        def pick(same, out):
            return jnp.where(whole.reshape(-1, *(1,) * (out.ndim - 1)), same, out)

        return jax.tree.map(pick, same, out)

    @nn.nowrap
    def _merged(self, tokens: VisualTokens, signals: Signals) -> VisualTokens:
        """Kept tokens with the sums of their neighbours, and the extra token."""
        num_tokens = tokens.mask.shape[1]
        row, count = self.row(tokens, signals), self.budget - self.num_extra()
        keep = self.keep(row, tokens.mask, count)
        selection = as_selection(keep, count)
        out = take(tokens, *selection)
        embed = jnp.where(tokens.mask[..., None], tokens.embed, 0).astype(jnp.float32)
        near = min(self.neighbours, num_tokens - 1)
        if near:
            keys = jnp.where(tokens.mask[..., None, None], signals.keys, 0).astype(jnp.float32)
            keys = jax.lax.stop_gradient(keys.reshape(*keys.shape[:2], -1))
            weight = cluster_weights(keys, row, tokens.mask, selection, near)
            own = jnp.take_along_axis(embed, selection[0][..., None], axis=1)
            value = own + self._weighted_sums(weight, embed)
            value = jnp.where(out.mask[..., None], value, 0).astype(out.embed.dtype)
            out = out.replace(embed=value)
        if not self.num_extra():
            return out
        rest = tokens.mask & ~keep
        last = merge(tokens, jnp.where(rest, 0, -1), 1)
        value = self._weighted_sums(jnp.where(rest, row, 0)[:, None], embed)
        return append(out, last.replace(embed=value.astype(out.embed.dtype)), rest, tokens.source)

    @nn.nowrap
    def _weighted_sums(
        self, weight: Float[Array, "B K T"], embed: Float[Array, "B T D"]
    ) -> Float[Array, "B K D"]:
        if self.weights == "normalised":
            total = weight.sum(axis=2, keepdims=True)
            weight = weight / jnp.where(total == 0, 1, total)
        return jnp.einsum("bkt,btd->bkd", weight, embed, precision=jax.lax.Precision.HIGHEST)


class PruMergePlus(PruMerge):
    """`prumerge_plus`: `prumerge` that also keeps tokens spread evenly over the image.

    arXiv 2403.15388, section 3.4. The kept set is the union of the best tokens by attention and of
    samples at regular steps in raster order. Published (`adaptive`): with k outliers of N, the
    samples are 0, s, 2s, ... below N - 1 with s = floor(floor(N / k) / 3), about 3 k of them.
    Static: `share` of the budget by attention, the rest evenly spaced over the tokens that
    attention did not choose (`select.stride`).

    Attributes:
      share: fraction of the kept tokens that attention chooses if not `adaptive`, rounded half up
        and at least one token; 0.25 corresponds to the published steps.

    Deviations: those of `prumerge`. If outliers and samples exceed the budget, the last samples are
    dropped (a larger budget is a larger bucket). s is at least 1; the official code fails if more
    than a third are outliers. N and the ranks of the samples count real tokens.
    """

    share: float = 0.25

    label = "prumerge_plus"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.number("compressor.share", self.share, 0, 1)

    @nn.nowrap
    def keep(self, row, mask, count):
        if not self.adaptive:
            guided = min(count, max(1, int(self.share * count + 0.5)))
            best = as_mask(select.top_k(row, mask, guided), mask.shape[1])
            if guided == count:
                return best
            return best | as_mask(select.stride(mask & ~best, count - guided), mask.shape[1])
        best = super().keep(row, mask, count)
        real = mask.sum(axis=1, keepdims=True)
        step = jnp.maximum(
            1, real // jnp.maximum(1, outliers(row, mask).sum(1, keepdims=True)) // 3
        )
        rank = jnp.cumsum(mask, axis=1) - 1
        sample = mask & ~best & (rank % step == 0) & (rank < real - 1)
        room = count - best.sum(axis=1, keepdims=True)
        return best | (sample & (jnp.cumsum(sample, axis=1) <= room))


def outliers(row: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Real tokens with a score above Q3 + 1.5 (Q3 - Q1) of their row, or else the best one.

    Args:
      row: float32 [B, T].
      mask: bool [B, T].

    Returns:
      bool [B, T].
    """
    row = ordering.comparable(row)
    rising = jnp.sort(jnp.where(mask, row, jnp.inf), axis=1)
    last = jnp.maximum(mask.sum(axis=1, keepdims=True) - 1, 0)

    def quantile(quarters):
        below, part = last * quarters // 4, (last * quarters % 4) / 4
        low = jnp.take_along_axis(rising, below, axis=1)
        high = jnp.take_along_axis(rising, jnp.minimum(below + 1, last), axis=1)
        return jnp.where(part == 0, low, low + part * (high - low))

    first, third = quantile(1), quantile(3)
    out = mask & (row > third + 1.5 * (third - first))
    best = as_mask(select.top_k(row, mask, 1), mask.shape[1])
    return jnp.where(out.any(axis=1, keepdims=True), out, best)


def cluster_weights(
    keys: Float[Array, "B T D"],
    row: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    selection: select.Selection,
    near: int,
) -> Float[Array, "B K T"]:
    """The attention a_j of the nearest neighbours of each kept token, 0 for all others.

    Args:
      keys: float32 [B, T, D], zero for padding.
      row: float32 [B, T], a.
      mask: bool [B, T].
      selection: the K kept tokens.
      near: static number of neighbours, below T; rows with few real tokens have fewer.

    Returns:
      float32 [B, K, T].
    """
    indices, _ = selection
    num_tokens = mask.shape[1]
    cosine = cosine_to(jnp.take_along_axis(keys, indices[..., None], axis=1), keys)
    other = mask[:, None] & (jnp.arange(num_tokens) != indices[..., None])
    shape = (-1, num_tokens)
    flat = select.top_k(cosine.reshape(shape), other.reshape(shape), near)
    member = as_mask(flat, num_tokens).reshape(other.shape)
    return jnp.where(member, row[:, None], 0)


def append(
    kept: VisualTokens,
    last: VisualTokens,
    rest: Bool[Array, "B T"],
    source: Int[Array, "B N"],
) -> VisualTokens:
    """`kept` with one more slot, and the token `last` right after its real tokens.

    Args:
      kept: K slots.
      last: one slot, padding in rows where `rest` is empty.
      rest: bool [B, T], tokens before the step that `last` holds.
      source: int32 [B, N], patch -> token before the step.
    """
    count = kept.mask.sum(axis=1, dtype=jnp.int32)[:, None]
    new_slot = jnp.arange(kept.mask.shape[1] + 1) == count

    def put(kept, last):
        padded = jnp.pad(kept, ((0, 0), (0, 1)) + ((0, 0),) * (kept.ndim - 2))
        chosen = new_slot.reshape(new_slot.shape + (1,) * (kept.ndim - 2))
        return jnp.where(chosen, last, padded)

    held = (source >= 0) & jnp.take_along_axis(rest, jnp.maximum(source, 0), axis=1)
    return VisualTokens(
        embed=put(kept.embed, last.embed),
        position=put(kept.position, last.position),
        size=put(kept.size, last.size),
        mask=put(kept.mask, last.mask),
        source=jnp.where(held, count, kept.source),
        bias=None if kept.bias is None else put(kept.bias, last.bias),
    )
