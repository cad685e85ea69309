"""Plain float64 loops of the pooling and elastic methods, from their definitions, row by row.

Every function takes embed [N, D], mask [N] and what else the method has, and gives a dict of the
fields of VisualTokens. Nothing here is vectorised over tokens, and nothing comes from the package.
"""

import itertools
import math
from fractions import Fraction

import numpy as np


def blank(budget, num_tokens, width):
    return {
        "embed": np.zeros((budget, width)),
        "position": np.zeros((budget, 2)),
        "size": np.zeros(budget),
        "mask": np.zeros(budget, bool),
        "source": np.full(num_tokens, -1),
    }


def mean_of_shares(embed, mask, positions, shares):
    """shares[cell][patch]: exact area of the patch in the cell."""
    row = blank(len(shares), len(mask), embed.shape[1])
    for cell, areas in enumerate(shares):
        for patch, area in areas.items():
            if mask[patch] and area:
                row["mask"][cell] = True
                row["size"][cell] += float(area)
                row["embed"][cell] += float(area) * np.float64(embed[patch])
                row["position"][cell] += float(area) * np.float64(positions[patch])
        if row["mask"][cell]:
            row["embed"][cell] /= row["size"][cell]
            row["position"][cell] /= row["size"][cell]
    for patch in range(len(mask)):
        if mask[patch]:
            best = None
            for cell, areas in enumerate(shares):
                if best is None or areas.get(patch, 0) > shares[best].get(patch, 0):
                    best = cell
            row["source"][patch] = best
    return row


def raster(grid):
    return [divmod(p, grid[1]) for p in range(grid[0] * grid[1])]


def overlap(start, stop, unit):
    return max(Fraction(0), min(stop, Fraction(unit + 1)) - max(start, Fraction(unit)))


def rectangles(grid, bands):
    """Exact areas of cells: bands of rows as high as their share of the cells, equal columns."""
    shares, top, total = [], Fraction(0), sum(bands)
    for columns in bands:
        bottom = top + Fraction(columns * grid[0], total)
        for j in range(columns):
            left, right = Fraction(j * grid[1], columns), Fraction((j + 1) * grid[1], columns)
            shares.append(
                {
                    r * grid[1] + c: overlap(top, bottom, r) * overlap(left, right, c)
                    for r, c in raster(grid)
                }
            )
        top = bottom
    return shares


def pooled(grid, budget):
    """The grid of average_pool for a budget, or None: whole cells, squares where they do it."""
    rows, columns = grid
    found = []
    for r, c in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        fits = rows % r == columns % c == 0 and rows // r * (columns // c) == budget
        if fits and (rows != columns or r == c):
            # The nearest to a square; of equals the one with fewer rows of cells.
            found.append((max(Fraction(r, c), Fraction(c, r)), rows // r, columns // c))
    return min(found)[1:] if found else None


def pool_bands(grid, budget):
    regular = pooled(grid, budget)
    if regular:
        return [regular[1]] * regular[0]
    best = None
    for count in range(1, grid[0] + 1):
        if count <= budget and math.ceil(budget / count) <= grid[1]:
            ratio = Fraction(budget * grid[0], count * count * grid[1])  # height / width of a cell
            cost = max(ratio, 1 / ratio)
            if best is None or cost < best[0]:
                best = (cost, count)
    count, bands, dealt = best[1], [], 0
    for i in range(count):
        upto = math.floor(Fraction((i + 1) * budget, count))
        bands.append(upto - dealt)
        dealt = upto
    return bands


def pool(embed, mask, grid, budget):
    shares = rectangles(grid, pool_bands(grid, budget))
    return mean_of_shares(embed, mask, raster(grid), shares)


def fitted(grid, budget):
    """The largest grid near the aspect ratio with at most `budget` cells."""
    rows, columns = grid
    found = []
    for h, w in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        exact_w, exact_h = Fraction(h * columns, rows), Fraction(w * rows, columns)
        near = abs(w - exact_w) < 1 or abs(h - exact_h) < 1  # one of the two next to the ratio
        if h * w <= budget and near:
            ratio = Fraction(h * columns, w * rows)
            found.append((-h * w, max(ratio, 1 / ratio), h, w))
    return min(found)[2:]


def downsample(embed, mask, grid, budget):
    cells = fitted(grid, budget)
    short = mean_of_shares(embed, mask, raster(grid), rectangles(grid, [cells[1]] * cells[0]))
    row = blank(budget, len(mask), embed.shape[1])
    for name in ("embed", "position", "size", "mask"):
        row[name][: cells[0] * cells[1]] = short[name]
    row["source"] = short["source"]
    return row


def whole_cells(embed, mask, grid, side):
    """Means of side x side cells that may stick out of the grid; also the members of each."""
    down, across = math.ceil(grid[0] / side), math.ceil(grid[1] / side)
    row = blank(down * across, len(mask), embed.shape[1])
    members = [[] for _ in range(down * across)]
    for patch, (r, c) in enumerate(raster(grid)):
        if mask[patch]:
            cell = r // side * across + c // side
            members[cell].append(patch)
            row["source"][patch] = cell
    for cell, patches in enumerate(members):
        for patch in patches:
            row["mask"][cell] = True
            row["size"][cell] += 1
            row["embed"][cell] += np.float64(embed[patch]) / len(patches)
            row["position"][cell] += np.array(divmod(patch, grid[1])) / len(patches)
    return row, members


def side_by_side(embed, mask, grid, side, order):
    """[cells, side * side * D] in one of the three orders of channels."""
    width, cells = embed.shape[1], []
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):

            def at(dy, dx, f, top=top, left=left):
                patch = (top + dy) * grid[1] + left + dx
                return float(embed[patch, f]) if mask[patch] else 0.0

            ys = xs = range(side)
            fs = range(width)
            if order == "row_column_feature":
                channels = [at(y, x, f) for y in ys for x in xs for f in fs]
            elif order == "column_row_feature":
                channels = [at(y, x, f) for x in xs for y in ys for f in fs]
            else:
                channels = [at(y, x, f) for f in fs for y in ys for x in xs]
            cells.append(channels)
    return np.array(cells)


def position_pool(embed, mask, positions, budget, cell=None):
    """Cells counted from the upper left real token, in the box of the real ones."""
    real = [n for n in range(len(mask)) if mask[n]]
    row = blank(budget, len(mask), embed.shape[1])
    if not real:
        return row
    top = min(positions[n][0] for n in real)
    left = min(positions[n][1] for n in real)
    rows = max(positions[n][0] for n in real) - top + 1
    columns = max(positions[n][1] for n in real) - left + 1
    k = cell or 1
    while cell is None and k * k * budget < len(real):
        k += 1
    while math.ceil(rows / k) * math.ceil(columns / k) > budget:
        k += 1
    for n in real:
        r, c = int(positions[n][0] - top), int(positions[n][1] - left)
        row["source"][n] = r // k * math.ceil(columns / k) + c // k
    for t in range(budget):
        patches = [n for n in real if row["source"][n] == t]
        for n in patches:
            row["mask"][t] = True
            row["size"][t] += 1
            row["embed"][t] += np.float64(embed[n]) / len(patches)
            row["position"][t] += np.float64(positions[n]) / len(patches)
    return row
