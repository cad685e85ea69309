"""VisPruner: half of the tokens by CLS attention, the other half by removal of duplicates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm import checks
from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.between.cls_attention import (
    AttentionGuided,
    as_mask,
    as_selection,
    cosine_to,
)
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array


class VisPruner(AttentionGuided):
    """`vispruner`: important tokens by attention, diverse ones by removal of duplicates.

    Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning
    in VLMs", arXiv 2412.01818v2, section 3.3.

    1. Important: the floor(important T) tokens with the most attention from CLS.
    2. The rest form a list, most attention first. Until only T_div = T - T_imp of them are left,
       each round matches the tokens at even indices (0, 2, ...) with those at odd indices: the
       score of an even one is its highest cosine with an odd one, and the r even ones with the
       highest scores, the duplicates, are removed, r = min(round_size, surplus). The next list has
       the remaining even ones, highest score first, then the odd ones.

    Kept tokens are in raster order, positions re-indexed. Ties: the lowest index comes first for
    equal attention; the first in the list is removed for equal scores.

    Attributes:
      important: fraction of the budget that attention selects (0.5 published).
      round_size: tokens removed in a round (8 published).

    Deviations: N and T fix the number of rounds; rows with fewer real tokens finish earlier. r is
    also at most the number of even indices, and the list may have an odd length; the official code
    fails in both cases, which its N = 576 and even T never reach. The cosines are computed once,
    for all pairs of the N - T_imp listed tokens.

    Memory: that matrix of (N - T_imp)^2 float32 is kept for each image (1.2 MB for 576 patches and
    T = 64, 64 MB for 4096).
    """

    important: float = 0.5
    round_size: int = 8

    label = "vispruner"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.number("compressor.important", self.important, 0, 1)
        checks.whole("compressor.round_size", self.round_size)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        important = int(self.budget * self.important)
        if self.budget in (num_tokens, important):
            return 0
        return 2 * (num_tokens - important) ** 2 * width

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens = tokens.mask.shape[1]
        if self.budget == num_tokens:
            return tokens
        order, real = select.top_k(self.row(tokens, signals), tokens.mask, num_tokens)
        important = int(self.budget * self.important)
        rest, listed = order[:, important:], real[:, important:]
        if important < self.budget:
            embed = jnp.where(tokens.mask[..., None], tokens.embed, 0).astype(jnp.float32)
            embed = jax.lax.stop_gradient(jnp.take_along_axis(embed, rest[..., None], axis=1))
            lengths = jnp.sqrt(jnp.sum(jnp.square(embed), axis=-1, keepdims=True))
            similarity = cosine_to(embed, embed) / jnp.maximum(lengths, 1e-12)
            diverse = self.budget - important
            listed = drop_duplicates(similarity, listed.sum(axis=1), diverse, self.round_size)
        else:
            listed = jnp.zeros_like(listed)
        valid = jnp.concatenate([real[:, :important], listed], axis=1)
        keep = as_mask((order, valid), num_tokens)
        return fold.drop(tokens, as_selection(keep, self.budget))


def drop_duplicates(
    similarity: Float[Array, "B M M"], count: Int[Array, " B"], keep: int, size: int
) -> Bool[Array, "B M"]:
    """Removes the most duplicated tokens at even indices of a list, a few per round.

    Args:
      similarity: float32 [B, M, M], symmetric, of the tokens in the order of the first list.
      count: int [B]; the first `count` of them are in the list.
      keep: static, at least 1, the number of tokens to leave (shorter lists stay as they are).
      size: static, tokens removed in a round.

    Returns:
      bool [B, M], the remaining tokens; min(count, keep) per row.
    """
    num_listed = similarity.shape[1]
    rows = jnp.arange(similarity.shape[0])[:, None]
    slots = jnp.broadcast_to(jnp.arange(num_listed, dtype=jnp.int32), similarity.shape[:2])
    count = count.astype(jnp.int32)[:, None]
    similarity = ordering.comparable(similarity)  # A NaN would be the highest of its row.

    def one_round(_, state):
        rank, left = state  # Index of each token in the current list; num_listed once removed.
        in_list = rank < left
        even, odd = in_list & (rank % 2 == 0), in_list & (rank % 2 == 1)
        duplicate = jnp.max(jnp.where(odd[:, None], similarity, -jnp.inf), axis=2)
        removed = jnp.minimum(jnp.minimum(size, left - keep), (left + 1) // 2)
        removed = jnp.maximum(removed, 0)
        # One sort makes the next list: even ones by score, odd ones in order, removed ones.
        group = jnp.where(even, 0, jnp.where(odd, 1, 2))
        token = ordering.by_group(group, jnp.where(even, duplicate, 0.0), rank)
        following = slots - removed
        following = jnp.where((following >= 0) & (slots < left), following, num_listed)
        rank = jnp.full_like(rank, num_listed).at[rows, token].set(following)
        return rank, left - removed

    start = jnp.where(slots < count, slots, num_listed)
    rank, left = jax.lax.fori_loop(0, num_rounds(num_listed, keep, size), one_round, (start, count))
    return rank < left


def num_rounds(count: int, keep: int, size: int) -> int:
    """Rounds of `drop_duplicates` that shorten a list from `count` to `keep`."""
    rounds = 0
    while count > keep:
        count -= min(size, count - keep, (count + 1) // 2)
        rounds += 1
    return rounds
