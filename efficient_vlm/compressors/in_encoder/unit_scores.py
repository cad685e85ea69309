"""What units of patches are worth to a cut inside the encoder."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_vlm.compressors import score
from efficient_vlm.compressors.signals import Signals
from efficient_vlm.compressors.tokens import VisualTokens, zero_padding
from efficient_vlm.compressors.units import Units


class Seen:
    """What scores read: T places, U units.

    Attributes:
      tokens, signals: see `Compressor.__call__`.
      units: static.
      live: bool [B, U], units with a real patch.
    """

    def __init__(self, tokens: VisualTokens, signals: Signals, units: Units):
        self.tokens, self.signals, self.units = zero_padding(tokens), signals, units
        self.live = units.real(tokens.mask).any(axis=2)

    def mean(self, x: jax.Array) -> jax.Array:
        """[B, T] -> [B, U]."""
        return self.units.mean(x[..., None], self.tokens.mask)[..., 0]

    @property
    def unit(self) -> jax.Array:
        """float32 [B, U, D], the mean state of each unit at length 1."""
        return score.unit(self.units.mean(self.tokens.embed, self.tokens.mask))

    def neighbours(self) -> jax.Array:
        """float32 [B, U], 1 minus the mean cosine to the live units that touch it."""
        unit, grid = self.unit, self.units.mean(self.tokens.position, self.tokens.mask)
        side = math.isqrt(self.units.places.shape[1])
        # Positions of units at the border are means of fewer patches.
        apart = jnp.abs(grid[:, :, None] - grid[:, None]).max(axis=-1)
        near = (apart < 1.5 * side) & self.live[:, None] & ~jnp.eye(grid.shape[1], dtype=bool)
        cosine = jnp.einsum("bud,bvd->buv", unit, unit, precision=jax.lax.Precision.HIGHEST)
        count = near.sum(axis=2)
        mean = jnp.where(near, cosine, 0).sum(axis=2) / jnp.maximum(count, 1)
        return jnp.where(count > 0, 1 - mean, 1.0)


def _row(seen: Seen) -> jax.Array:
    return seen.mean(seen.signals.attention_row)


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


# Score -> (intermediate of the layer in front of the cut that it reads, or None; [B, U] of Seen).
SCORES: dict[str, tuple[str | None, Callable[[Seen], jax.Array]]] = {
    "attention": ("column_mean", _row),
    "cls": ("cls_row", _row),
    "mean_query": ("mean_query_row", _row),
    "change": ("change", _row),
    "norm": (None, lambda seen: seen.mean(_length(seen.tokens.embed))),
    "neighbours": (None, Seen.neighbours),
}
# Choices that are no ranking by one number.
CHOICES = ("diversity", "stride", "random")
