"""HiPrune: anchors of a middle layer, their neighbours, and the summary of the last layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool

from efficient_vlm import checks
from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.between.cls_attention import (
    ATTENTION,
    AttentionGuided,
    as_mask,
    check_layer,
)
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.compressors.tokens import NO_SIGNALS
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.shapes import Array

BORDERS = ("wrap", "stop")


class HiPrune(AttentionGuided):
    """`hiprune`: object-centred anchors with their surroundings, then global register tokens.

    Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
    Vision-Language Models", arXiv 2508.00553, section "Method". The score of a patch in a layer is
    the attention it receives, mean over heads and queries.

    1. Anchors: the round(T alpha / 5) patches of highest score in a middle layer.
    2. Buffers: the neighbours of each anchor, left, right, above and below.
    3. Registers: the patches of highest score in the last layer, until there are T.

    Kept in raster order, positions re-indexed. Ties: lowest index. No anchors for T alpha <= 2.5
    (halves round to even, as in Python).

    Attributes:
      attention: "column_mean" (published); see `AttentionGuided`.
      layer: of the registers.
      middle_layer: of the anchors; 9 of the 24 of CLIP-L/14 (16 for the encoder of Qwen2.5-VL). A
        float in (0, 1) is a part of the depth, for encoders that understand it.
      alpha: part of the budget that anchors and buffers get (0.1 published).
      border: what the neighbour of an anchor at the edge is. "wrap" as in the official code: the
        patch before or after in raster order (of the next row at the ends of a row), and an index
        outside the image is the first or last patch; "stop" as the paper says: none.

    Deviations: a buffer that is padding is left out. Should anchors and buffers be more than T
    (rounding at alpha near 1), buffers of low score in the middle layer are left out; the official
    code would exceed T.
    """

    attention: str = "column_mean"
    middle_layer: int | float = 9
    alpha: float = 0.1
    border: str = "wrap"

    label = "hiprune"
    needs = frozenset({"attention_row", "middle_row"})

    @nn.nowrap
    def check_options(self):
        super().check_options()
        if isinstance(self.middle_layer, float):
            if not 0 < self.middle_layer < 1:
                raise UserError(
                    f"compressor.middle_layer: {self.middle_layer!r} is not a layer",
                    allowed="a layer of the encoder, or a part of its depth between 0 and 1",
                )
        else:
            check_layer("middle_layer", self.middle_layer)
        checks.number("compressor.alpha", self.alpha, 0, 1)
        if self.border not in BORDERS:
            raise unknown("compressor.border", str(self.border), BORDERS)

    @nn.nowrap
    def intermediates(self):
        kind = ATTENTION[self.attention]
        return {**super().intermediates(), "middle_row": f"{kind}/{self.middle_layer}"}

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        num_tokens = tokens.mask.shape[1]
        if self.budget == num_tokens:
            return tokens
        deep = jax.lax.stop_gradient(self.row(tokens, signals))
        anchors = round(self.budget * self.alpha / 5)
        if not anchors:
            return fold.drop(tokens, select.top_k(deep, tokens.mask, self.budget))
        middle = jnp.where(tokens.mask, signals.middle_row, 0).astype(jnp.float32)
        middle = jax.lax.stop_gradient(middle)
        best = select.top_k(middle, tokens.mask, anchors)
        anchor = as_mask(best, num_tokens)
        buffer = neighbours(best, grid, self.border) & tokens.mask & ~anchor
        # Anchors, buffers, registers, padding; each by falling score.
        group = jnp.where(anchor, 0, jnp.where(buffer, 1, jnp.where(tokens.mask, 2, 3)))
        score = jnp.where(group < 2, middle, deep)
        falling = jnp.where(score == 0, 0.0, -score)
        index = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), group.shape)
        group, _, index = jax.lax.sort((group, falling, index), num_keys=3)
        return fold.drop(tokens, (index[:, : self.budget], group[:, : self.budget] < 3))


def neighbours(selection: select.Selection, grid: Grid, border: str) -> Bool[Array, "B N"]:
    """The four neighbours of each selected patch: bool [B, h*w], selected ones included if so."""
    indices, valid = selection
    rows, columns = grid
    places, inside = [], []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        row, column = indices // columns + down, indices % columns + right
        inside.append((row >= 0) & (row < rows) & (column >= 0) & (column < columns))
        places.append(jnp.clip(indices + down * columns + right, 0, rows * columns - 1))
    valid = jnp.concatenate([valid & (i | (border == "wrap")) for i in inside], axis=1)
    return as_mask((jnp.concatenate(places, axis=1), valid), rows * columns)
