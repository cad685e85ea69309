"""Bipartite soft matching of units of patches (arXiv 2210.09461, section 3)."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from efficient_vlm.compressors import score
from efficient_vlm.compressors.tokens import VisualTokens, remap, weighted_means, zero_padding
from efficient_vlm.compressors.units import Units
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

# Cosines are rounded to this step, so that equal tokens tie for any order of summation.
STEP = 2.0**-16


@flax.struct.dataclass
class Pairs:
    """Which of U units merge into which, r of them at most, so that K = U - r are left.

    Attributes:
      stay: int32 [B, K], the units that are left, in source order, padding last.
      come: int32 [B, r], the units that merge into one of them.
      joins: bool [B, K, r], into which.
      holder: int32 [B, U], for each unit the one that it becomes or merges into.
    """

    stay: Int[Array, "B K"]
    come: Int[Array, "B r"]
    joins: Bool[Array, "B K r"]
    holder: Int[Array, "B U"]


def pair(
    metric: Float[Array, "B U C"],
    mask: Bool[Array, "B U"],
    r: int,
    *,
    every: bool = False,
    class_token: bool = False,
) -> Pairs:
    """Pairs units with the most similar one of the other half; the r best pairs merge.

    Args:
      metric: compared by cosine, without gradient.
      mask: which units are real; only those alternate between the halves.
      r: static, at most U // 2.
      every: whether r pairs merge in every row, or half of the units of a row that has fewer than
        2 r. Else all rows are to end at U - r: one with R real units merges R - (U - r) pairs, or
        none if that is negative.
      class_token: whether the alternation starts with a protected token that is no unit.
    """
    batch, count = mask.shape
    kept = count - r
    # Real units first, in source order: indices in this order alternate between the sets.
    order = jnp.argsort(~mask, axis=1, stable=True)
    real = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    in_a = int(class_token)  # First index of A; B has the other parity.
    metric = jnp.where(mask[..., None], jax.lax.stop_gradient(metric), 0)
    unit = score.unit(jnp.take_along_axis(metric, order[..., None], axis=1))
    a, b = unit[:, in_a::2], unit[:, 1 - in_a :: 2]
    a_index = in_a + 2 * jnp.arange(a.shape[1], dtype=jnp.int32)
    b_index = 1 - in_a + 2 * jnp.arange(b.shape[1], dtype=jnp.int32)

    cosine = jnp.einsum("bxc,byc->bxy", a, b, precision=jax.lax.Precision.HIGHEST)
    cosine = jnp.round(cosine / STEP) * STEP  # Small negative ones become -0.0.
    cosine = ordering.comparable(cosine, (b_index < real)[:, None, :])
    partner = jnp.argmax(cosine, axis=2)
    _, best = ordering.top_k(jnp.max(cosine, axis=2), r, a_index < real)
    most = jnp.minimum(real // 2, r) if every else real - kept
    live = jnp.arange(r)[None, :] < most  # Never more pairs than real units in A.
    moved = a_index[best]
    target = b_index[jnp.take_along_axis(partner, best, axis=1)]

    rows = jnp.arange(batch)[:, None]
    dropped = jnp.where(live, moved, count)  # Out of range: no effect.
    gone = jnp.zeros((batch, count), bool).at[rows, dropped].set(True, mode="drop")
    slot = jnp.cumsum(~gone, axis=1, dtype=jnp.int32) - 1
    new = jnp.take_along_axis(slot, target, axis=1)
    assignment = slot.at[rows, dropped].set(new, mode="drop")
    survivors = jnp.argsort(gone, axis=1, stable=True)[:, :kept]
    return Pairs(
        stay=jnp.take_along_axis(order, survivors, axis=1),
        come=jnp.take_along_axis(order, moved, axis=1),
        joins=jax.nn.one_hot(jnp.where(live, new, -1), kept, dtype=bool, axis=1),
        holder=jnp.zeros_like(assignment).at[rows, order].set(assignment),
    )


class Merge:
    """The step from T patches to those of the units that are left, unit behind unit.

    Patches of two units merge place by place: the upper left one with the upper left one.

    Args:
      tokens: T patches.
      units: static, U of them among the T places, P patches each.
      pairs: of these units.
      drops: whether units that would merge are dropped instead.
      keeps_norm: whether a merged state has the direction of the mean and the length of the longest
        of its members (MLERP, arXiv 2312.01026), not that of the mean.
    """

    def __init__(
        self,
        tokens: VisualTokens,
        units: Units,
        pairs: Pairs,
        *,
        drops: bool = False,
        keeps_norm: bool = False,
    ):
        self.before, self.units, self.pairs = zero_padding(tokens), units, pairs
        self.drops, self.keeps_norm = drops, keeps_norm

    def __call__(self) -> VisualTokens:
        """The tokens that are left."""
        tokens, places = self.before, self.units.places
        fields = weighted_means(tokens, self._sums)
        if self.keeps_norm and not self.drops:
            fields["embed"] = self._lengthened(fields["embed"], tokens.embed)
        unit_of, place_of = np.zeros((2, tokens.mask.shape[1]), np.int32)
        unit_of[places[places >= 0]] = np.nonzero(places >= 0)[0]
        place_of[places[places >= 0]] = np.nonzero(places >= 0)[1]
        holder = self.pairs.holder
        if self.drops:
            rows = jnp.arange(len(holder))[:, None]
            came = jnp.where(self.pairs.joins.any(axis=1), self.pairs.come, holder.shape[1])
            holder = holder.at[rows, came].set(-1, mode="drop")
        holder = holder[:, unit_of]
        holder = jnp.where(holder >= 0, holder * places.shape[1] + place_of, -1)
        holder = jnp.where(tokens.mask, holder, -1)
        return VisualTokens(**fields, source=remap(tokens.source, holder))

    def features(self, x: Float[Array, "B T D"]) -> Float[Array, "B TK D"]:
        """Other features of the same patches, merged alike."""
        weight = self.before.size[..., None]
        total = jnp.maximum(self._sums(weight), 1e-6)
        mean = (self._sums(x.astype(jnp.float32) * weight) / total).astype(x.dtype)
        return self._lengthened(mean, x) if self.keeps_norm and not self.drops else mean

    def _parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, C] -> [B, K, P*C] of the units that stay and [B, r, P*C] of those that come."""
        there = self.units.real(self.before.mask)[..., None]
        each = jnp.where(there, self.units.gather(x), 0).reshape(len(x), len(there[0]), -1)
        stay, come = self.pairs.stay[..., None], self.pairs.come[..., None]
        return jnp.take_along_axis(each, stay, axis=1), jnp.take_along_axis(each, come, axis=1)

    def _sums(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, K*P, C]."""
        # A K x r matrix instead of K x U: the other units are only gathered.
        total, added = self._parts(x)
        if not self.drops:
            joins = self.pairs.joins.astype(jnp.float32)
            total = total + jnp.einsum(
                "bkr,brc->bkc", joins, added, precision=jax.lax.Precision.HIGHEST
            )
        return total.reshape(len(x), -1, x.shape[-1])

    def _lengthened(self, mean: jax.Array, x: jax.Array) -> jax.Array:
        """The merged states [B, K*P, D] of x [B, T, D] at the length of their longest members."""
        own, others = self._parts(_length(x))
        joined = jnp.where(self.pairs.joins[..., None], others[:, None], 0).max(axis=2, initial=0)
        longest = jnp.maximum(own, joined).reshape(*mean.shape[:2], 1)
        length = _length(mean)
        merged = jnp.repeat(self.pairs.joins.any(axis=2), own.shape[-1], axis=1)[..., None]
        # Others keep their bits, and zeros their gradient.
        scale = jnp.where(merged & (length > 0), longest / jnp.where(length > 0, length, 1), 1)
        return (mean * scale).astype(mean.dtype)


def _length(x: jax.Array) -> jax.Array:
    """float32 [..., 1], with a gradient of 0 where it is 0."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
