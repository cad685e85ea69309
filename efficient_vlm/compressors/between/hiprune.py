"""HiPrune: anchors of a middle layer, their neighbours, and register tokens of the last layer."""

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
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.kernels import ordering
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
      layer: layer of the registers.
      middle_layer: layer of the anchors; 9 of CLIP-L/14's 24 layers (16 for Qwen2.5-VL's encoder).
        A float in (0, 1) is a fraction of the depth.
      alpha: fraction of the budget for anchors and buffers (0.1 published).
      border: neighbours of an anchor at the edge. "wrap", as in the official code: the previous or
        next patch in raster order (of another row at the ends of a row), with indices clipped to
        the image; "stop", as in the paper: no neighbour.

    Deviations: buffers that are padding are skipped. If anchors and buffers exceed T (rounding at
    alpha near 1), the buffers with the lowest scores in the middle layer are skipped; the official
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
                    f"compressor.middle_layer: {short(self.middle_layer)} is not a layer",
                    allowed="a layer of the encoder, or a fraction of its depth between 0 and 1",
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
        extent = tokens.extent(grid) if tokens.uneven else grid
        buffer = neighbours(best, grid, self.border, extent) & tokens.mask & ~anchor
        # Anchors, buffers, registers, padding; each by falling score.
        group = jnp.where(anchor, 0, jnp.where(buffer, 1, jnp.where(tokens.mask, 2, 3)))
        index = ordering.by_group(group, jnp.where(group < 2, middle, deep))[:, : self.budget]
        return fold.drop(tokens, (index, jnp.take_along_axis(group, index, axis=1) < 3))


def neighbours(
    selection: select.Selection, grid: Grid, border: str, extent: tuple | None = None
) -> Bool[Array, "B N"]:
    """The four neighbours of each selected patch, which may be selected patches themselves.

    Args:
      selection: indices on the grid.
      grid: (rows, columns).
      border: see `HiPrune`.
      extent: rows and columns of the image of each row in the corner of the grid, int [B]; None for
        the whole grid.
    """
    indices, valid = selection
    rows, columns = (jnp.reshape(side, (-1, 1)) for side in extent or grid)
    own_row, own_column = indices // grid[1], indices % grid[1]
    patches, inside = [], []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        row, column = own_row + down, own_column + right
        inside.append((row >= 0) & (row < rows) & (column >= 0) & (column < columns))
        patch = jnp.clip(row * columns + column, 0, rows * columns - 1)
        patches.append(patch // columns * grid[1] + patch % columns)
    valid = jnp.concatenate([valid & (i | (border == "wrap")) for i in inside], axis=1)
    return as_mask((jnp.concatenate(patches, axis=1), valid), grid[0] * grid[1])
