"""VisionZip: patches that CLS attends to, and merged tokens that represent all others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool

from efficient_vlm import checks
from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.between.cls_attention import (
    AttentionGuided,
    as_mask,
    as_selection,
    cosine_to,
)
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import merge
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

MERGES = ("published", "mean")


class VisionZip(AttentionGuided):
    """`visionzip`: T - C dominant patches, unchanged, and C merged contextual tokens.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv
    2412.04467, section 3.2 and Algorithm 1.

    1. Dominant: the T - C patches with the most attention from CLS (ties: lowest index).
    2. Of the R remaining patches, in raster order, those of rank 0, s, 2s, ... (C of them) are
       targets, s = max(1, floor(R / C)).
    3. Each other patch joins the target with the highest cosine between keys (mean over heads;
       ties: lowest target).
    4. A contextual token is its target + the mean of the patches that joined it (0 without any).

    Attributes:
      contextual: C, a count; a fraction of the budget if it is a float below 1; None for the
        published share of 10 in 64 (64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30; rounded half up,
        and at least 1 for budgets from 2). 0 is fastervlm.
      merge: "published", step 4; or "mean", the size-weighted mean of the target and the patches
        that joined it, which preserves the scale of the features.
      head_dim: width of one head of the encoder's keys; used by `flops` only (64 in CLIP).

    Deviations: the official code counts the CLS token as one of the dominant ones (64 = CLS + 53
    patches + 10 merged). Our encoder keeps CLS separate, and all T tokens are patches or merged;
    the published patches of "64" are `budget=63 contextual=10`. The official code appends the
    contextual tokens to the dominant ones; ours are all in raster order (a contextual token at the
    index of its target), and the position of a contextual token is the mean of its members'. Ranks,
    R and s count real tokens only. The paper's layer is -2 of CLIP, see `AttentionGuided.layer`.
    """

    contextual: int | float | None = None
    merge: str = "published"
    head_dim: int = 64

    label = "visionzip"
    needs = frozenset({"attention_row", "keys"})

    @nn.nowrap
    def check_options(self):
        super().check_options()
        if self.merge not in MERGES:
            raise unknown("compressor.merge", str(self.merge), MERGES)
        checks.whole("compressor.head_dim", self.head_dim)
        value = self.contextual
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        fraction = isinstance(value, float) and 0 <= value < 1
        if not (value is None or count or fraction):
            raise UserError(
                f"compressor.contextual: {short(value)} is not a number of merged tokens",
                allowed="a count 0, 1, 2, ..., a fraction of the budget in [0, 1), or None",
                fix="omit it for the published 10 of 64",
            )

    @nn.nowrap
    def reachable(self, grid):
        least = max(1, self.contextual) if isinstance(self.contextual, int) else 1
        return tuple(range(grid[0] * grid[1], min(least, grid[0] * grid[1]) - 1, -1))

    @nn.nowrap
    def num_contextual(self) -> int:
        """C, the number of merged tokens in the budget."""
        if self.contextual is None:
            share = (10 * self.budget + 32) // 64
            return max(share, 1) if self.budget > 1 else 0
        if isinstance(self.contextual, float):
            return int(self.contextual * self.budget + 0.5)
        return self.contextual

    @nn.nowrap
    def intermediates(self):
        return {**super().intermediates(), "keys": f"keys/{self.layer}"}

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        contextual = self.num_contextual()
        if self.budget == num_tokens or not contextual:
            return 0
        merged = self.budget * (width + 3)  # with the coordinates and the size
        means = contextual * width if self.merge == "published" else 0
        return 2 * num_tokens * (contextual * self.head_dim + merged + means)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens, contextual = tokens.mask.shape[1], self.num_contextual()
        if self.budget == num_tokens:
            return tokens
        best = select.top_k(self.row(tokens, signals), tokens.mask, self.budget - contextual)
        if not contextual:
            return fold.drop(tokens, best)
        dominant = as_mask(best, num_tokens)
        targets = strided(tokens.mask & ~dominant, contextual)
        others = tokens.mask & ~dominant & ~targets
        target, valid = as_selection(targets, contextual)

        keys = jnp.where(tokens.mask[..., None, None], signals.keys, 0).astype(jnp.float32)
        keys = jax.lax.stop_gradient(keys.mean(axis=2))
        near = cosine_to(keys, jnp.take_along_axis(keys, target[..., None], axis=1))
        joined = ordering.best(near, valid[:, None])  # [B, T], index among the targets.

        slot = jnp.cumsum(dominant | targets, axis=1, dtype=jnp.int32) - 1
        target_slot = jnp.take_along_axis(slot, target, axis=1)
        assignment = jnp.where(others, jnp.take_along_axis(target_slot, joined, axis=1), slot)
        merged = merge(tokens, assignment, self.budget)
        if self.merge == "mean":
            return merged

        member = jax.nn.one_hot(joined, contextual, dtype=jnp.float32, axis=1) * others[:, None]
        embed = jnp.where(tokens.mask[..., None], tokens.embed, 0).astype(jnp.float32)
        total = jnp.einsum("bct,btd->bcd", member, embed, precision=jax.lax.Precision.HIGHEST)
        mean = total / jnp.maximum(member.sum(axis=2), 1)[..., None]
        value = jnp.take_along_axis(embed, target[..., None], axis=1) + mean
        rows = jnp.arange(len(slot))[:, None]
        slots = jnp.where(valid, target_slot, self.budget)
        return merged.replace(
            embed=merged.embed.at[rows, slots].set(value.astype(merged.embed.dtype), mode="drop")
        )


def strided(mask: Bool[Array, "B T"], k: int) -> Bool[Array, "B T"]:
    """The real tokens of rank 0, s, 2s, ..., at most k of them, s = max(1, floor(real / k)).

    Args:
      mask: bool [B, T].
      k: static, at least 1.

    Returns:
      bool [B, T].
    """
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    step = jnp.maximum(1, jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32) // k)
    return mask & (rank % step == 0) & (rank // step < k)
