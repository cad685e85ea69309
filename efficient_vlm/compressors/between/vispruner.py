"""VisPruner: half of the tokens by CLS attention, the other half the least duplicated ones."""

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
from efficient_vlm.compressors.tokens import NO_SIGNALS
from efficient_vlm.shapes import Array


class VisPruner(AttentionGuided):
    """`vispruner`: important tokens by attention, diverse ones by removal of duplicates.

    Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning
    in VLMs", arXiv 2412.01818v2, section 3.3.

    1. Important: the floor(important T) tokens with most attention from CLS.
    2. The rest is a list, most attention first. Until only T_div = T - T_imp of it are left, each
       round matches the tokens at even places (0, 2, ...) with those at odd places: the score of an
       even one is its highest cosine with an odd one, and the r even ones of highest score, the
       duplicates, are removed, r = min(round_size, surplus). The next list is the even ones left,
       highest score first, then the odd ones.

    All that is kept is in raster order, positions re-indexed. Ties: of equal attention the lowest
    index first; of equal scores the first in the list is removed.

    Attributes:
      important: share of the budget that attention selects (0.5 published).
      round_size: tokens removed in a round (8 published).

    Deviations: the number of rounds is fixed by N and T, and a row with fewer real tokens is done
    earlier. r is also at most the number of even places, and the list may have an odd length; the
    official code fails in both cases, which its own N = 576 and even T do not meet. The cosines
    are computed once, for all pairs of the N - T_imp listed tokens.

    Memory: that matrix of (N - T_imp)^2 float32 is held for each image (1.2 MB for 576 patches
    and T = 64, 64 MB for 4096).
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
    """Removes the most duplicated tokens at even places of a list, a few in each round.

    Args:
      similarity: float32 [B, M, M], symmetric, of the tokens in the order of the first list.
      count: int [B], the first `count` of them are in the list.
      keep: static, at least 1: stops when so many are left (or there were no more).
      size: static, tokens removed in a round.

    Returns:
      bool [B, M], which tokens are left; min(count, keep) of each row.
    """
    num_listed = similarity.shape[1]
    rows = jnp.arange(similarity.shape[0])[:, None]
    slots = jnp.broadcast_to(jnp.arange(num_listed, dtype=jnp.int32), similarity.shape[:2])
    count = count.astype(jnp.int32)[:, None]

    def play(_, state):
        place, left = state  # place of each token in the present list, num_listed for none
        in_list = place < left
        even, odd = in_list & (place % 2 == 0), in_list & (place % 2 == 1)
        duplicate = jnp.max(jnp.where(odd[:, None], similarity, -jnp.inf), axis=2)
        removed = jnp.minimum(jnp.minimum(size, left - keep), (left + 1) // 2)
        removed = jnp.maximum(removed, 0)
        # One sort makes the next list: even ones by score, odd ones as they stand, removed ones.
        group = jnp.where(even, 0, jnp.where(odd, 1, 2))
        falling = jnp.where(even & (duplicate != 0), -duplicate, 0.0)
        *_, token = jax.lax.sort((group, falling, place, slots), num_keys=3)
        following = slots - removed
        following = jnp.where((following >= 0) & (slots < left), following, num_listed)
        place = jnp.full_like(place, num_listed).at[rows, token].set(following)
        return place, left - removed

    start = jnp.where(slots < count, slots, num_listed)
    place, left = jax.lax.fori_loop(0, num_rounds(num_listed, keep, size), play, (start, count))
    return place < left


def num_rounds(count: int, keep: int, size: int) -> int:
    """Rounds of `drop_duplicates` until a list of `count` is down to `keep`."""
    rounds = 0
    while count > keep:
        count -= min(size, count - keep, (count + 1) // 2)
        rounds += 1
    return rounds
