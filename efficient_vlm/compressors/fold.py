"""Folds: turn tokens and a selection or a grid into fewer tokens. Pure functions.

`drop` discards what was not selected; `pool` merges the cells of a regular grid, `area_pool` any
static areas, `pool_each` cells of images that have unlike sizes. `tokens.merge` merges by an
assignment that depends on the data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from efficient_vlm.compressors import grids
from efficient_vlm.compressors.select import Selection
from efficient_vlm.compressors.tokens import (
    VisualTokens,
    remap,
    take,
    weighted_means,
    zero_padding,
)
from efficient_vlm.kernels import ordering


def drop(tokens: VisualTokens, selection: Selection) -> VisualTokens:
    """Keeps the selection, in source order, and drops the rest."""
    indices, valid = selection
    return take(tokens, indices, valid)


def without_padding(tokens: VisualTokens, room: int) -> VisualTokens:
    """The real tokens, of which there may not be more than `room`; then padding."""
    _, real = ordering.top_k(tokens.mask.astype(jnp.float32), room)
    return take(tokens, real, jnp.ones(real.shape, bool))


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


def pool_each(tokens: VisualTokens, grid: grids.Grid, budget: int) -> VisualTokens:
    """Size-weighted means over the cells into which `grids.bands` cuts each image alone.

    Args:
      tokens: h*w tokens per row, in raster order of `grid`; the image of a row lies in its upper
        left corner.
      grid: (h, w), in which the largest image fits.
      budget: static, at most h*w. An image of no more tokens keeps them, padding last.
    """
    tokens = zero_padding(tokens)
    rows, columns = tokens.extent(grid)
    count = jnp.minimum(rows * columns, budget)[:, None]
    bands = jnp.asarray(_numbers_of_bands(grid, budget))[rows - 1, columns - 1][:, None]
    # Cells in front of each band, and for each cell its band and its place in it.
    before = jnp.arange(grid[0] + 1) * count // bands
    cell = jnp.arange(budget)
    inner = (jnp.arange(grid[0] + 1) < bands)[:, None]
    band = jnp.sum((before[:, None] <= cell[:, None]) & inner, axis=2) - 1
    first = jnp.take_along_axis(before, band, axis=1)
    wide = jnp.maximum(jnp.take_along_axis(before, band + 1, axis=1) - first, 1)

    def overlap(start, stop, side, length):
        """Of cells [B, K] and unit intervals of `length`, both stretched by `side`."""
        unit = jnp.arange(side) * length[..., None]
        stop = jnp.minimum(stop[..., None], unit + length[..., None])
        return jnp.maximum(stop - jnp.maximum(start[..., None], unit), 0)

    # Integers as long as possible: shares that are equal have to stay so, see `grids.most`.
    rows, columns = rows[:, None], columns[:, None]
    down = overlap(first * rows, (first + wide) * rows, grid[0], count)
    place = cell - first
    across = overlap(place * columns, (place + 1) * columns, grid[1], wide)
    area = down[..., :, None] * across[..., None, :] * (cell < count)[..., None, None]
    area = area.reshape(*area.shape[:2], -1).astype(jnp.float32) / wide[..., None]
    shares = area / count[..., None]
    real = tokens.mask[:, None]

    def sums(x):
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("bkt,btc->bkc", jnp.where(real, shares, 0), x, precision=exact)

    holder = jnp.where(tokens.mask, ordering.best(area, axis=1), -1)
    return VisualTokens(**weighted_means(tokens, sums), source=remap(tokens.source, holder))


@functools.lru_cache(maxsize=64)
def _numbers_of_bands(grid: grids.Grid, budget: int) -> Int[np.ndarray, "h w"]:
    """For images of 1 x 1 up to `grid` patches the bands that `grids.bands` cuts them into."""
    sides = [range(1, side + 1) for side in grid]
    return np.array(
        [[len(grids.bands((h, w), min(budget, h * w))) for w in sides[1]] for h in sides[0]]
    )
