"""Arithmetic of patch grids: the budgets a grid can be pooled to, and the overlap of cells.

All of it is NumPy on static Python integers, which runs at trace time and is never traced.
"""

import functools
import math

import numpy as np
from jaxtyping import Float, Int

from efficient_vlm.errors import UserError, short

Grid = tuple[int, int]


def as_grid(field: str, value) -> Grid:
    """`value` as a (rows, columns) tuple of positive ints; UserError if it is not one."""
    try:
        rows, columns = (int(v) if v == int(v) else 0 for v in value)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise UserError(
            f"{field}: {short(value)} is not a grid",
            allowed="a pair of positive integers (rows, columns)",
            fix=f"for example {field}=(8, 8)",
        )
    return rows, columns


def resolve(grid: Grid | None, num_tokens: int) -> Grid:
    """The static grid of `num_tokens` tokens: `grid`, or a square if it is None.

    Raises:
      UserError: no grid is given and the count is not a square, or the grid has another count.
    """
    if grid is None:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise UserError(
                f"compressor.grid: None, but {num_tokens} tokens are not a square grid",
                allowed=f"(rows, columns) with rows x columns = {num_tokens}",
                fix="give compressor.grid=(rows, columns) of the encoder's patches",
            )
        return side, side
    if grid[0] * grid[1] != num_tokens:
        raise UserError(
            f"compressor.grid: {grid} has {grid[0] * grid[1]} cells, the input {num_tokens} tokens",
            allowed=f"(rows, columns) with rows x columns = {num_tokens}",
            fix="give the grid of the encoder's patches, or None for a square one",
        )
    return grid


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def shuffled_grids(grid: Grid) -> dict[int, Grid]:
    """Budget -> pooled grid for square s x s cells, largest budget first."""
    rows, columns = grid
    sides = _divisors(math.gcd(rows, columns))
    return {rows // s * (columns // s): (rows // s, columns // s) for s in sides}


def pooled_grids(grid: Grid) -> dict[int, Grid]:
    """Budget -> pooled grid for equal rectangular cells, largest budget first.

    A square grid has square cells only (8 x 8: 64, 16, 4, 1). On other grids a budget uses square
    cells if they give it, and otherwise the dividing cell closest to a square.
    """
    square = shuffled_grids(grid)
    rows, columns = grid
    if rows == columns:
        return square
    best: dict[int, tuple[float, Grid]] = {}
    for r in _divisors(rows):
        for c in _divisors(columns):
            pooled = (rows // r, columns // c)
            candidate = (abs(math.log(r / c)), pooled)
            budget = pooled[0] * pooled[1]
            best[budget] = min(best.get(budget, candidate), candidate)
    grids = {budget: square.get(budget, pooled) for budget, (_, pooled) in best.items()}
    return dict(sorted(grids.items(), reverse=True))


def nested_grids(grid: Grid) -> dict[int, Grid]:
    """Budget -> pooled grid for cells of side 1, 2, 4, ... and all in one, largest first.

    The side doubles as long as both rows and columns can be halved (24 x 24: 576, 144, 36, 9, 1).
    """
    rows, columns = grid
    nested = {rows * columns: (rows, columns)}
    while rows % 2 == 0 and columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
        nested[rows * columns] = (rows, columns)
    nested[1] = (1, 1)
    return nested


def covering_grids(grid: Grid) -> dict[int, tuple[int, Grid]]:
    """Budget -> (side k, grid of cells) for k x k cells that may cross the border, largest first.

    Every k gives ceil(rows / k) x ceil(columns / k) cells. Of several sides with the same budget
    the smallest is taken, whose cells are the most even.
    """
    sizes: dict[int, tuple[int, Grid]] = {}
    for side in range(1, max(grid) + 1):
        cells = (-(-grid[0] // side), -(-grid[1] // side))
        sizes.setdefault(cells[0] * cells[1], (side, cells))
    return sizes


def fitted_grid(grid: Grid, budget: int) -> Grid:
    """The largest grid of at most `budget` cells with the shape of `grid`, up to rounding.

    Candidates are each number of rows with the two numbers of columns that bracket the aspect
    ratio, and each number of columns with two such numbers of rows. Among the largest candidates
    the one closest in aspect ratio is taken, then the one with fewer rows. A square grid gives
    squares.
    """
    rows, columns = grid

    def beside(length: int, own: int, other: int) -> set[int]:
        return {max(1, length * other // own), -(-length * other // own)}

    candidates = [(h, w) for h in range(1, rows + 1) for w in beside(h, rows, columns)]
    candidates += [(h, w) for w in range(1, columns + 1) for h in beside(w, columns, rows)]

    def order(cells: Grid):
        stretch = abs(math.log(cells[0] * columns / (cells[1] * rows)))
        return -cells[0] * cells[1], round(stretch, 9), cells[0]

    return min((c for c in candidates if c[0] * c[1] <= budget), key=order)


@functools.lru_cache(maxsize=256)
def bands(grid: Grid, budget: int) -> tuple[int, ...]:
    """Cuts a grid into `budget` cells of equal area: the columns of each band of rows.

    If `pooled_grids` has the budget, its grid is used. Otherwise the number of bands is the one
    whose cells are closest to squares (ties: the smallest), the cells are distributed over them as
    evenly as integers allow, and the height of a band is its share of the cells.

    Args:
      grid: (rows, columns).
      budget: from 1 to rows x columns.

    Returns:
      The number of columns of each band; they sum to the budget and differ by at most 1.
    """
    if budget in (pooled := pooled_grids(grid)):
        return (pooled[budget][1],) * pooled[budget][0]
    rows, columns = grid
    counts = [n for n in range(1, min(rows, budget) + 1) if -(-budget // n) <= columns]
    stretch = {n: abs(math.log(budget * rows / (n * n * columns))) for n in counts}
    best = min(counts, key=lambda n: (round(stretch[n], 9), n))
    return tuple((i + 1) * budget // best - i * budget // best for i in range(best))


@functools.lru_cache(maxsize=64)
def cover(grid: Grid, columns: tuple[int, ...]) -> Float[np.ndarray, "cells patches"]:
    """The part of each patch of `grid` that lies in each cell of `bands`.

    Returns:
      float64 [cells, patches]; columns sum to 1, rows to patches / cells.
    """
    heights = np.concatenate([[0], np.cumsum(columns)]) * grid[0] / sum(columns)
    down = _shares(heights, grid[0])
    across = {c: overlap(grid[1], c) for c in set(columns)}
    return np.concatenate(
        [np.einsum("h,cw->chw", d, across[c]) for d, c in zip(down, columns, strict=True)]
    ).reshape(sum(columns), -1)


@functools.lru_cache(maxsize=256)
def overlap(fine: int, coarse: int) -> Float[np.ndarray, "{coarse} {fine}"]:
    """The part of each of `fine` unit intervals that lies in each of `coarse` equal intervals.

    Returns:
      float64 [coarse, fine]; columns sum to 1, rows to fine / coarse; 0 or 1 if coarse divides.
    """
    return _shares(np.arange(coarse + 1) * fine / coarse, fine)


def _shares(edges: Float[np.ndarray, " edges"], count: int) -> Float[np.ndarray, "parts {count}"]:
    """Overlap of each of `count` unit intervals with the interval between neighbouring edges."""
    start, stop = edges[:-1, None], edges[1:, None]
    cell = np.arange(count)[None, :]
    return np.clip(np.minimum(stop, cell + 1) - np.maximum(start, cell), 0.0, 1.0)


def most(shares: Float[np.ndarray, "cells patches"]) -> Int[np.ndarray, " patches"]:
    """For each column of [cells, patches] the row with the largest share (ties: the lowest)."""
    # Rounding: in thirds and sevenths two equal overlaps can differ in the last bit.
    return np.argmax(np.round(shares, 9), axis=0).astype(np.int32)


@functools.lru_cache(maxsize=256)
def holders(fine: Grid, coarse: Grid) -> Int[np.ndarray, " patches"]:
    """For each cell of `fine` the cell of `coarse` that covers most of it (ties: the lowest).

    Returns:
      int32 [rows x columns of fine], indices in raster order.
    """
    rows, columns = (most(overlap(f, c)) for f, c in zip(fine, coarse, strict=True))
    return (rows[:, None] * coarse[1] + columns[None, :]).reshape(-1).astype(np.int32)
