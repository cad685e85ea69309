"""Arithmetic of patch grids: which budgets a grid can be pooled to, and what covers what.

Everything here is NumPy on static Python integers: it runs at trace time and is never traced.
"""

import functools
import math

import numpy as np

from efficient_vlm.errors import UserError

Grid = tuple[int, int]


def as_grid(field: str, value) -> Grid:
    """`value` as a (rows, columns) tuple of positive ints; UserError if it is not one."""
    try:
        rows, columns = (int(v) if v == int(v) else 0 for v in value)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise UserError(
            f"{field}: {value!r} is not a grid",
            allowed="a pair of positive integers (rows, columns)",
            fix=f"for example {field}=(8, 8)",
        )
    return rows, columns


def resolve(grid: Grid | None, num_tokens: int) -> Grid:
    """The static grid of `num_tokens` tokens: `grid`, or the square if it is None.

    Raises:
      UserError: the count is not a square and no grid is given, or the grid has another count.
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

    A square grid has square cells only (8 x 8: 64, 16, 4, 1). Another grid takes square cells where
    they give the budget, and otherwise the dividing cell that is nearest to a square.
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


def resized_grids(grid: Grid) -> dict[int, Grid]:
    """Budget -> grid of the resized image, largest budget first.

    An image can be resized to any size, so a square grid reaches every smaller square; another grid
    takes the dividing factors of `pooled_grids`, which come nearest to keeping the aspect ratio.
    """
    if grid[0] == grid[1]:
        return {side * side: (side, side) for side in range(grid[0], 0, -1)}
    return pooled_grids(grid)


@functools.lru_cache(maxsize=256)
def overlap(fine: int, coarse: int) -> np.ndarray:
    """How much of each of `fine` unit intervals lies in each of `coarse` equal parts.

    Returns:
      float64 [coarse, fine]; columns sum to 1, rows to fine / coarse; 0 or 1 if coarse divides.
    """
    edges = np.arange(coarse + 1) * fine / coarse
    start, stop = edges[:-1, None], edges[1:, None]
    cell = np.arange(fine)[None, :]
    return np.clip(np.minimum(stop, cell + 1) - np.maximum(start, cell), 0.0, 1.0)


@functools.lru_cache(maxsize=256)
def holders(fine: Grid, coarse: Grid) -> np.ndarray:
    """For each cell of `fine` the cell of `coarse` that covers most of it (ties: the lowest).

    Returns:
      int32 [rows x columns of fine], indices in raster order.
    """
    # Rounding: in thirds and sevenths two equal overlaps can differ in the last bit.
    rows, columns = (
        np.argmax(np.round(overlap(f, c), 9), axis=0) for f, c in zip(fine, coarse, strict=True)
    )
    return (rows[:, None] * coarse[1] + columns[None, :]).reshape(-1).astype(np.int32)
