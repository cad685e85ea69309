"""`feather`: FastV's criterion without rotary positions, plus an even grid, in two stages."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder import rows
from efficient_vlm.compressors.in_decoder.base import InDecoder, Keep, check_keep, count_of
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

SOFTMAX = ("visual", "all")
DEPTH, LAYERS = 32, (8, 16)  # as published


class Feather(InDecoder):
    """`feather`: keeps an even grid and the best by attention without rotary positions.

    Endo et al., "Feather the Throttle" (fast and effective acceleration with ensemble criteria),
    arXiv 2412.13180 (ICCV 2025), section 5. FastV's score favours the bottom of the image, because
    rotary positions strengthen nearby keys. The score is therefore the attention of the last prompt
    token, mean over heads, from queries and keys *before* rotary positions, and

    1. the first cut keeps every `stride`-th token of every `stride`-th row of the grid, and the
       best int(keep * N) other tokens;
    2. the second cut, where the score is more reliable, keeps int(keep^2 * T) of the remaining T
       tokens by score alone.

    Defaults of the official script: layers 8 and 16 of 32, reduction R = 0.7 (keep = 0.3), stride
    3. Positions are retained. The official code takes the softmax over the visual keys only.

    Deviations: the official first stage keeps the *union* of the grid and of the int(keep * N)
    best of all tokens, whose size depends on the data (172 to 236 of 576); here the slots of the
    overlap go to the next best tokens, which makes the count static (236) and the kept set a
    superset of the official one. A stage keeps at least one token. Padded grid tokens free their
    slots as well.

    Attributes:
      budget: of the one-cut form only.
      layers: numbers of layers before the two cuts; None for 1/4 and 1/2 of the depth.
      keep: 1 - R, a fraction of the N visual tokens of all images of a row together; or a count c
        of them, which gives R = 1 - c/N. None is 0.3.
      stride: step of the grid; 0 for no grid.
      softmax: "visual", over the visual keys (the official code); "all", over all keys that the
        last prompt token attends to, as in FastV.
      second: whether a one-cut form is the second cut; set by `stages`.
    """

    layers: Sequence[int] | None = None
    keep: Keep | None = None
    stride: int = 3
    softmax: str = "visual"
    position_policy: str | None = "retain"
    second: bool = False

    label = "feather"
    text_guided = True
    internal = InDecoder.internal | {"second"}

    @nn.nowrap
    def check_options(self):
        if self.layers is not None:
            layers = as_tuple("compressor.layers", self.layers)
            if len(layers) != 2:
                raise UserError(
                    f"compressor.layers: {layers}, but feather has two stages",
                    allowed="two layers",
                    fix="for example compressor.layers=(8,16)",
                )
            object.__setattr__(self, "layers", layers)
        if self.keep is not None:
            check_keep("compressor.keep", self.keep)
        if self.stride != 0:
            checks.whole("compressor.stride", self.stride)
        if self.softmax not in SOFTMAX:
            raise unknown("compressor.softmax", str(self.softmax), SOFTMAX)

    @nn.nowrap
    def _grid_tokens(self, num_tokens: int) -> list[int]:
        """Indices of the evenly spaced tokens; several images of `grid` follow one another."""
        if not self.stride:
            return []
        size = self.grid[0] * self.grid[1] if self.grid is not None else num_tokens
        images = max(1, num_tokens // size) if num_tokens % size == 0 else 1
        height, width = grids.resolve(self.grid, num_tokens // images)
        return [
            image * size + y * width + x
            for image in range(images)
            for y in range(0, height, self.stride)
            for x in range(0, width, self.stride)
        ]

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        self.no_budget("compressor.keep")
        layers = (
            self.scaled(LAYERS, DEPTH, num_layers)
            if self.layers is None
            else self.check_layers("compressor.layers", self.layers, num_layers)
        )
        best = count_of(self._keep, num_tokens)
        if best > num_tokens:
            raise UserError(
                f"compressor.keep: feather cannot keep {best} of {num_tokens} tokens",
                allowed=f"1 to {num_tokens}, or a fraction",
            )
        spaced = len(self._grid_tokens(num_tokens))

        def counts(total):  # For rows at most: those with padding may have a smaller grid.
            first = min(total, spaced + count_of(self._keep, total))
            return first, max(1, math.floor(first * self._share(total) ** 2 + 1e-9))

        return self.cuts(
            layers,
            counts(num_tokens),
            num_tokens,
            rows=counts,
            stride=(self.stride, 0),
            layers=(None, None),
            second=(False, True),
        )

    @property
    def _keep(self) -> Keep:
        return 0.3 if self.keep is None else self.keep

    @nn.nowrap
    def _share(self, total: int) -> float:
        """1 - R, for N = `total`."""
        return min(self._keep / total, 1.0) if isinstance(self._keep, int) else self._keep

    @nn.nowrap
    def row_budget(self, tokens, state):
        """int [B]: the grid in the picture of a row, and the best of all that it had."""
        if self.row_counts is None:
            return None
        now, had = jnp.sum(tokens.mask, axis=1), jnp.sum(state.first_live, axis=1)
        totals = range(1, state.first_live.shape[1] + 1)
        if not self.second:
            best = jnp.array([0, *(count_of(self._keep, total) for total in totals)])
            spaced = jnp.sum(tokens.mask & self._spaced(tokens.mask.shape[1]), axis=1)
            count = spaced + best[had]
        elif isinstance(self._keep, int):
            square = jnp.array([0, *(self._share(total) ** 2 for total in totals)], jnp.float32)
            count = jnp.maximum(1, jnp.floor(now * square[had] + 1e-4).astype(jnp.int32))
        else:
            kept = range(1, tokens.mask.shape[1] + 1)
            kept = [max(1, math.floor(n * self._keep**2 + 1e-9)) for n in kept]
            count = jnp.array([0, *kept])[now]
        return jnp.minimum(count, self.budget)

    @nn.nowrap
    def _spaced(self, num_tokens: int) -> Bool[Array, " T"]:
        index = jnp.array(self._grid_tokens(num_tokens), int)
        return jnp.zeros(num_tokens, bool).at[index].set(True)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"keep": count} for count in range(1, num_tokens + 1)]

    @nn.nowrap
    def score_flops(self, num_places, width):
        return rows.row_flops(1, num_places, width)

    @nn.nowrap
    def scores(self, tokens, state):
        count = tokens.mask.shape[1]
        among = None
        if self.softmax == "visual":
            among = jnp.broadcast_to(jnp.arange(state.live.shape[1]) < count, state.live.shape)
        attention = rows.attention_rows(state, state.last[:, None], rotary=False, among=among)
        score = attention.mean(axis=1)[:, 0, :count]
        if not self.stride:
            return score
        # The grid comes first. Ranks are exact; adding a bonus to the scores would round them.
        rank = ordering.ranks(score, tokens.mask)
        return jnp.where(self._spaced(count), count - rank, -rank).astype(jnp.float32)
