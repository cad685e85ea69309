"""Folds: turn tokens and a selection or a grid into fewer tokens. Pure functions.

`drop` discards what was not selected; `pool` merges the cells of a regular grid, `area_pool` any
static areas. `tokens.merge` merges by an assignment that depends on the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from efficient_vlm.compressors import grids
from efficient_vlm.compressors.select import Selection
from efficient_vlm.compressors.tokens import VisualTokens, remap, take, weighted_means


def drop(tokens: VisualTokens, selection: Selection) -> VisualTokens:
    """Keeps the selection, in source order, and drops the rest."""
    indices, valid = selection
    return take(tokens, indices, valid)


def pool(tokens: VisualTokens, grid: grids.Grid, cells: grids.Grid) -> VisualTokens:
    """Size-weighted means over the cells of a coarser grid; padding is excluded.

    Where the cells do not divide the grid, a token belongs to several cells in proportion to the
    area (area resampling), sizes are areas, and `source` names the cell that covers most of the
    token (ties: the lowest).

    Args:
      tokens: h*w tokens per row, in raster order of `grid`.
      grid: (h, w).
      cells: (h', w') with h' <= h and w' <= w; the result has h'*w' tokens in raster order. A cell
        without real tokens becomes padding at its own index.
    """
    (rows, columns), (cell_rows, cell_columns) = grid, cells

    if rows % cell_rows == 0 and columns % cell_columns == 0:
        split = (cell_rows, rows // cell_rows, cell_columns, columns // cell_columns)

        def sums(x):
            x = x.reshape(x.shape[0], *split, x.shape[-1]).sum(axis=(2, 4))
            return x.reshape(x.shape[0], -1, x.shape[-1])
    else:
        down = jnp.asarray(grids.overlap(rows, cell_rows), jnp.float32)
        across = jnp.asarray(grids.overlap(columns, cell_columns), jnp.float32)

        def sums(x):
            x = x.reshape(x.shape[0], rows, columns, x.shape[-1])
            x = jnp.einsum("ih,bhwc->biwc", down, x, precision=jax.lax.Precision.HIGHEST)
            x = jnp.einsum("jw,biwc->bijc", across, x, precision=jax.lax.Precision.HIGHEST)
            return x.reshape(x.shape[0], -1, x.shape[-1])

    holder = jnp.broadcast_to(jnp.asarray(grids.holders(grid, cells)), tokens.mask.shape)
    return VisualTokens(**weighted_means(tokens, sums), source=remap(tokens.source, holder))


def area_pool(tokens: VisualTokens, shares: Float[np.ndarray, "K T"]) -> VisualTokens:
    """Size-weighted means over arbitrary areas; padding is excluded.

    Args:
      tokens: T tokens per row.
      shares: static, the part of each token that lies in each area; columns sum to 1. Sizes are
        these areas, and `source` names the area with the largest share (ties: the lowest).
    """
    matrix = jnp.asarray(shares, jnp.float32)

    def sums(x):
        return jnp.einsum("kt,btc->bkc", matrix, x, precision=jax.lax.Precision.HIGHEST)

    holder = jnp.broadcast_to(jnp.asarray(grids.most(shares)), tokens.mask.shape)
    return VisualTokens(**weighted_means(tokens, sums), source=remap(tokens.source, holder))
