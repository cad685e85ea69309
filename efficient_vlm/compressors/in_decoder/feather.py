"""`feather`: FastV's criterion without rotary positions, plus an even grid, in two stages."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder import rows
from efficient_vlm.compressors.in_decoder.base import InDecoder, Keep, check_keep, count_of
from efficient_vlm.errors import UserError, unknown

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
    """

    layers: Sequence[int] | None = None
    keep: Keep | None = None
    stride: int = 3
    softmax: str = "visual"
    position_policy: str | None = "retain"

    label = "feather"
    text_guided = True

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
        keep = 0.3 if self.keep is None else self.keep
        best = count_of(keep, num_tokens)
        if best > num_tokens:
            raise UserError(
                f"compressor.keep: feather cannot keep {best} of {num_tokens} tokens",
                allowed=f"1 to {num_tokens}, or a fraction",
            )
        share = best / num_tokens if isinstance(keep, int) else keep
        first = min(num_tokens, len(self._grid_tokens(num_tokens)) + best)
        second = max(1, math.floor(first * share**2 + 1e-9))
        none = (None, None)
        strides = (self.stride, 0)
        return self.cuts(
            layers, (first, second), num_tokens, stride=strides, layers=none, keep=none
        )

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
        rank = jnp.argsort(jnp.argsort(-score, axis=1, stable=True), axis=1)
        spaced = jnp.zeros(count, bool).at[jnp.array(self._grid_tokens(count), int)].set(True)
        return jnp.where(spaced, count - rank, -rank).astype(jnp.float32)
