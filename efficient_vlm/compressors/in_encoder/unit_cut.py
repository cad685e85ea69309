"""The bases of methods that leave whole units of patches in the encoder."""

import fractions
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Int

from efficient_vlm.compressors import grids, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.in_encoder.unit_scores import Seen
from efficient_vlm.compressors.signals import NO_SIGNALS, Signals
from efficient_vlm.compressors.tokens import VisualTokens, arranged, at_slots
from efficient_vlm.compressors.units import Units, units_in_order, units_of_grid
from efficient_vlm.shapes import Array

# Shares of units are fractions of whole numbers up to this, so that rows count them exactly.
_FINEST = 10_000

Reduced = tuple[VisualTokens, Callable[[jax.Array], jax.Array]]


def exact_share(share: float | fractions.Fraction) -> fractions.Fraction:
    """A share of units in whole numbers."""
    return fractions.Fraction(share).limit_denominator(_FINEST)


class UnitMethod(Compressor):
    """Base class of methods that leave whole units.

    A unit is the block of patches that the model's projector makes one token of (SmolVLM 4 x 4,
    InternVL and Qwen-VL 2 x 2, Gemma 3 4 x 4; a patch without such a projector), so that the
    projector works unchanged on what is left: patches vanish in the encoder and tokens in the
    decoder. A unit with a real patch is real; where others of it are padding, the projector gets
    zeros for them. (No published processor makes such units, all pad to whole ones.)

    Attributes:
      budget: units that are left in the end; of one step, patches.
      side, patches, order: of one step; `stages` sets them. The side of a unit, the grid of
        patches, and whether patches still are in raster order.
    """

    budget: int | None = None
    side: int = 1
    patches: grids.Grid | None = None
    order: str = "raster"

    where = "encoder"
    of_units = True
    optional_budget = True
    internal = frozenset({"side", "patches", "order"})

    @property
    def leaves_padding(self) -> bool:
        """Whether a full row may have padding behind a step: units at the border lack patches."""
        return not self.units(math.prod(self.patches)).complete

    @nn.nowrap
    def units(self, num_tokens: int) -> Units:
        """The units among the patches that this step gets."""
        if self.order == "units":
            return units_in_order(num_tokens // self.side**2, self.side)
        return units_of_grid(self.patches or grids.resolve(self.grid, num_tokens), self.side)

    @nn.nowrap
    def reduced(self, tokens: VisualTokens, signals: Signals) -> Reduced:
        """What a step leaves, unit behind unit, and how features [B, T, D] of the same patches
        become features of that."""
        raise NotImplementedError(f"{type(self).__name__}.reduced")


class UnitCut(UnitMethod):
    """Base class of methods that take units out. Subclasses say with `choose` which units stay.

    Patches that stay keep their positions and windows. Choices have no gradient; what stays has its
    own.

    Attributes:
      share: of one step; the share of its own units that a row keeps, numerator and denominator;
        None for `budget` units in every row.
    """

    share: tuple[int, int] | None = None

    keeps_all = True  # Whether a budget for all units keeps all of them.
    internal = UnitMethod.internal | {"share"}

    @nn.nowrap
    def slots(self, tokens: VisualTokens, signals: Signals) -> Int[Array, "B KP"]:
        """The places of the patches that stay: unit behind unit, from T on for padding."""
        num_tokens = tokens.mask.shape[1]
        units = self.units(num_tokens)
        kept, count = self.budget // self.side**2, len(units.places)
        seen = Seen(*jax.lax.stop_gradient((tokens, signals)), units)
        index, valid = self.choose(seen, kept)
        index = jnp.sort(jnp.where(valid, index, count), axis=1)
        places = at_slots(jnp.broadcast_to(units.places, (len(index), *units.places.shape)), index)
        real = at_slots(units.real(tokens.mask), index) & (index < count)[..., None]
        return jnp.where(real, places, num_tokens).reshape(len(index), -1).astype(jnp.int32)

    @nn.nowrap
    def reduced(self, tokens, signals):
        slots = self.slots(tokens, signals)
        return arranged(tokens, slots), functools.partial(at_slots, slots=slots)

    @nn.nowrap
    def alone(self, num_tokens: int) -> dict[str, Any]:
        """Options of the step that a module without a budget is when it is called as one."""
        raise NotImplementedError(f"{type(self).__name__}.alone")

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens = tokens.mask.shape[1]
        if self.budget is None:
            return self.clone(parent=None, **self.alone(num_tokens))(tokens, signals)
        self.check_call(tokens, signals, needs_grid=self.patches is None)
        if self.keeps_all and self.budget == num_tokens:
            return tokens
        return arranged(tokens, self.slots(tokens, signals))

    @nn.nowrap
    def limit(self, seen: Seen, kept: int) -> Int[Array, " B"]:
        """How many units each row keeps: its share rounded up, at most `kept` of those it has."""
        live = seen.live.sum(axis=1, dtype=jnp.int32)
        if self.share is None:
            return jnp.minimum(live, kept)
        top, bottom = self.share
        return -(-live * top // bottom)

    @nn.nowrap
    def choose(self, seen: Seen, kept: int) -> select.Selection:
        """`kept` of the units of each row, or fewer that are valid."""
        raise NotImplementedError(f"{type(self).__name__}.choose")
