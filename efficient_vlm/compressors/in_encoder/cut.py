"""encoder_cut: whole blocks of patches leave the encoder between two of its layers."""

import fractions
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import grids, score, select
from efficient_vlm.compressors.base import Stage, as_tuple
from efficient_vlm.compressors.in_encoder.unit_cut import UnitCut, exact_share
from efficient_vlm.compressors.in_encoder.unit_scores import CHOICES, SCORES
from efficient_vlm.compressors.units import units_of_grid
from efficient_vlm.errors import UserError, unknown


class EncoderCut(UnitCut):
    """`encoder_cut`: units of patches leave the encoder, at once or in several steps.

    The number of units is static; a row with padding keeps the same share of its own units, rounded
    up. Units: see `unit_cut.UnitCut`.

    Behind layer `layers[i]` the units with the highest mean score of their patches stay:

    * attention: attention that a patch receives, mean over heads and queries of the layer in front;
      cls, mean_query: from the CLS token, or from the mean query (FasterVLM, arXiv 2412.01818).
    * change: |h_l - h_(l-1)|, what the layer in front adds to a patch (IPCV, arXiv 2512.18747).
    * norm: |h_l|.
    * neighbours: 1 minus the mean cosine to the units that touch it.
    * diversity: greedy max-min distances (DivPrune, arXiv 2503.02175) of the units' mean states.
    * stride: evenly spaced in raster order. random: drawn by `seed`, alike in all rows.

    Called as a module it performs one cut.

    Attributes:
      budget: units that are left in the end; with several layers a geometric schedule leads there.
      layers: number of encoder layers in front of each cut; 0 for scores of no layer.
      keep: instead of a budget, shares of all units (below 1) or numbers of units, one for each
        layer.
      score: see above.
      seed: of "random".
    """

    layers: tuple[int, ...] = (2,)
    keep: tuple[float, ...] | None = None
    score: str = "attention"
    seed: int = 0

    label = "encoder_cut"
    needs = frozenset({"attention_row"})

    def __post_init__(self):
        object.__setattr__(self, "layers", as_tuple("compressor.layers", self.layers))
        if self.keep is not None:
            object.__setattr__(self, "keep", as_tuple("compressor.keep", self.keep))
        if not self._asks:
            object.__setattr__(self, "needs", frozenset())
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.score not in SCORES and self.score not in CHOICES:
            raise unknown("compressor.score", str(self.score), (*SCORES, *CHOICES))
        checks.whole("compressor.seed", self.seed, 0)
        for layer in self.layers:
            checks.whole("compressor.layers", layer, 0)
        if sorted(set(self.layers)) != list(self.layers):
            raise UserError(
                f"compressor.layers: {self.layers}", allowed="layers in rising order, each once"
            )
        if 0 in self.layers and self._asks:
            raise UserError(
                f"compressor.layers: 0 with compressor.score={self.score}, which a layer gives",
                allowed="from 1; or score=norm, neighbours, diversity, stride, random",
            )
        if (self.keep is None) == (self.budget is None):
            raise UserError(
                f"compressor.keep: {self.keep} with compressor.budget={self.budget}",
                allowed="one of the two: a share for each layer, or a budget behind the last",
                fix="for example compressor.keep=(0.5,) compressor.layers=(2,)",
            )
        if self.keep is not None:
            self._check_keep()

    @nn.nowrap
    def _check_keep(self) -> None:
        if len(self.keep) != len(self.layers):
            raise UserError(
                f"compressor.keep: {len(self.keep)} values for {len(self.layers)} layers",
                allowed="one for each of compressor.layers",
            )
        for value in self.keep:
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (whole or (isinstance(value, float) and 0 < value < 1)):
                raise UserError(
                    f"compressor.keep: {value}",
                    allowed="shares of all units between 0 and 1, or numbers of units from 1",
                )
        if len({isinstance(value, int) for value in self.keep}) > 1:
            raise UserError(f"compressor.keep: {self.keep}", allowed="shares, or numbers, not both")
        if sorted(self.keep, reverse=True) != list(self.keep):
            raise UserError(
                f"compressor.keep: {self.keep} grows, but what has left does not come back",
                allowed="from the largest to the smallest",
            )

    @property
    def _asks(self) -> str | None:
        """The intermediate that the score reads."""
        return SCORES.get(self.score, (None, None))[0]

    @property
    def observes(self) -> Mapping[str, str]:
        """Signal -> the intermediate of the layer in front of the cut that gives it."""
        return {"attention_row": self._asks} if self._asks else {}

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False, patches=None, side=1):
        if self.layers[-1] >= num_layers:
            raise UserError(
                f"compressor.layers: {self.layers[-1]}, but the encoder has {num_layers} layers",
                allowed=f"0 to {num_layers - 1}: behind the last one nothing is saved",
            )
        if self.score == "cls" and not class_token:
            raise UserError(
                "compressor.score: 'cls', but this encoder has no CLS token",
                allowed=", ".join(name for name in (*SCORES, *CHOICES) if name != "cls"),
            )
        patches = patches or grids.resolve(self.grid, num_tokens)
        units, stages = len(units_of_grid(patches, side).places), []
        for layer, (share, left) in zip(self.layers, self._schedule(units), strict=True):
            if left < units:
                order = "units" if stages else "raster"
                step = dict(side=side, patches=tuple(patches), share=share, order=order)
                one = dict(budget=left * side**2, keep=None, layers=(layer,))
                stages.append(Stage(layer, self.clone(parent=None, **step, **one)))
            units = left
        return tuple(stages)

    @nn.nowrap
    def _schedule(self, units: int) -> list[tuple[tuple[int, int] | None, int]]:
        """For each cut: the share of the units in front of it that stays, and how many it leaves.

        A row with padding takes the same shares of its own units, in whole numbers, so that it
        keeps as many as alone.
        """
        steps, count = len(self.layers), units
        if self.keep is None or isinstance(self.keep[0], int):
            counts = self.keep
            if counts is None:
                ratio = min(1.0, self.budget / units)
                counts = [round(units * ratio ** ((i + 1) / steps)) for i in range(steps)]
                counts[-1] = self.budget
            if counts[-1] > units:
                raise UserError(
                    f"compressor.budget: {counts[-1]} of {units} units",
                    allowed=f"1 to {units}, the tokens that a picture has without a cut",
                )
            return [(None, min(n, units)) for n in counts]
        found, before = [], fractions.Fraction(1)
        for value in self.keep:
            exact = exact_share(value)
            part = exact_share(exact / before)
            share, before = (part.numerator, part.denominator), exact
            count = -(-count * share[0] // share[1])
            found.append((share, count))
        return found

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"budget": budget, "keep": None} for budget in range(1, num_tokens + 1)]

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """FLOPs of one cut; those of its signals are the encoder's."""
        units, kept = num_tokens // self.side**2, self.budget // self.side**2
        if self.score == "neighbours":
            return 2 * units * units * width
        return select.max_min_flops(units, width, kept) if self.score == "diversity" else 0

    @nn.nowrap
    def alone(self, num_tokens):
        share, budget = self._schedule(num_tokens)[0]
        return dict(budget=budget, keep=None, share=share)

    @nn.nowrap
    def choose(self, seen, kept):
        limit = self.limit(seen, kept)
        if self.score == "diversity":
            index, valid = select.max_min(seen.unit, seen.live, kept)
            return index, valid & (jnp.arange(kept) < limit[:, None])
        if self.score == "stride":
            return _evenly(seen.live, limit, kept)
        if self.score == "random":
            values = score.random(jax.random.key(self.seed), (1, seen.live.shape[1]))
            values = jnp.broadcast_to(values, seen.live.shape)
        else:
            values = SCORES[self.score][1](seen)
        return select.top_k(values, seen.live, kept, limit)


def _evenly(mask, limit, kept: int) -> select.Selection:
    """limit of the live units of each row, evenly spaced, see `select.stride`."""
    slot = jnp.arange(kept, dtype=jnp.int32)[None]
    limit, live = limit[:, None], mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
    rank = (2 * slot + 1) * live // jnp.maximum(2 * limit, 1)
    real_first = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    rank = jnp.minimum(rank, mask.shape[1] - 1)
    return jnp.take_along_axis(real_first, rank, axis=1), slot < limit
