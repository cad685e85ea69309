"""Position embeddings of patches: tables, and their resampling to the size of an image."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from efficient_vlm.errors import unknown
from efficient_vlm.nn.linear import logical
from efficient_vlm.shapes import Array

# factorised: a row table plus a column table. The others have a table of the whole grid, resampled
# for other image sizes: by area or linearly ("learned"), cubically as in torch without ("bicubic":
# CLIP, SigLIP) or with antialiasing ("bicubic_antialias": Molmo), linearly with aligned corners
# ("corners": Qwen3-VL), or by buckets of the fractional coordinate ("bucketed": Idefics3, SmolVLM).
# none: no embedding.
POSITIONS = (
    "factorised",
    "learned",
    "bicubic",
    "bicubic_antialias",
    "corners",
    "bucketed",
    "none",
)


def patch_mask(grid: tuple[int, int], valid: Int[Array, "B 2"]) -> Bool[Array, "B N"]:
    """Patches within the upper left `valid` rows and columns, in raster order."""
    rows = jnp.arange(grid[0]) < valid[:, :1]
    columns = jnp.arange(grid[1]) < valid[:, 1:]
    return (rows[:, :, None] & columns[:, None]).reshape(len(valid), -1)


def patch_positions(
    vit: Any, grid: tuple[int, int], valid: Int[Array, "B 2"] | None
) -> Float[Array, "*B N width"]:
    """Embeddings for images of `grid` patches, of which `valid` rows and columns are real.

    Called by `encoder.ViT`, which owns the tables.
    """
    (h, w), (rows, columns) = grid, vit.position_grid or vit.grid
    init = nn.initializers.normal(vit.position_scale)

    def table(name: str, *axes: tuple[str, int]):
        names, sizes = zip(*axes, strict=True)
        return vit.param(name, logical(init, *names, "embed"), (*sizes, vit.width))

    if vit.position not in POSITIONS:
        raise unknown("model.encoder.position", vit.position, POSITIONS)
    if vit.position == "none":
        return jnp.zeros((1, vit.width))
    if vit.position == "factorised":
        row = _resample(table("row_position", ("rows", rows)), 0, h)
        column = _resample(table("column_position", ("columns", columns)), 0, w)
        return (row[:, None] + column[None]).reshape(h * w, vit.width)
    whole = table("position", ("rows", rows), ("columns", columns))
    if vit.position == "learned":
        return _resample(_resample(whole, 0, h), 1, w).reshape(h * w, vit.width)
    if vit.position.startswith("bicubic"):
        antialias = vit.position == "bicubic_antialias"
        by_row, by_column = (
            jnp.asarray(cubic_weights(old, new, antialias))
            for old, new in ((rows, h), (columns, w))
        )
        exact = jax.lax.Precision.HIGHEST
        if (h, w) != (rows, columns):
            whole = jnp.einsum("hr,wc,rcd->hwd", by_row, by_column, whole, precision=exact)
        return whole.reshape(h * w, vit.width)
    if valid is None:
        valid = jnp.asarray([[h, w]])
    sample = _bucket if vit.position == "bucketed" else _between_corners
    by_row, by_column = sample(rows, h, valid[:, 0]), sample(columns, w, valid[:, 1])
    exact = jax.lax.Precision.HIGHEST
    out = jnp.einsum("bhr,bwc,rcd->bhwd", by_row, by_column, whole, precision=exact)
    out = out.reshape(len(valid), h * w, vit.width)
    if vit.position == "bucketed":
        # Padding gets the first position: nothing attends to it, but a projector may read it.
        out = jnp.where(patch_mask(grid, valid)[..., None], out, whole[0, 0])
    return out


def _bucket(old: int, new: int, real: jax.Array) -> jax.Array:
    """float32 [B, new, old], 1 at the row of the table that each of `real` rows falls into.

    Row i of n real ones has the coordinate i / n, and takes row k of the table if that lies in
    [k / old, (k + 1) / old) (arXiv 2307.06304, fractional coordinates; Idefics2). Computed in
    float32 with boundaries from `arange`, because coordinates often lie exactly on a boundary.
    """
    boundaries = jnp.asarray(np.arange(1 / old, 1.0, 1 / old, dtype=np.float64), jnp.float32)
    rows = jnp.arange(new, dtype=jnp.float32)
    share = 1 / real.astype(jnp.float32)
    at = jnp.clip(rows * share[:, None], 0.0, 1.0 - 1e-6)
    index = (boundaries[None, None] <= at[..., None]).sum(axis=-1)
    return jax.nn.one_hot(index, old, dtype=jnp.float32)


def _between_corners(old: int, new: int, real: jax.Array) -> jax.Array:
    """float32 [B, new, old], linear weights with the corners of table and image aligned."""
    steps = jnp.maximum(real.astype(jnp.float32) - 1, 1.0)
    at = jnp.arange(new, dtype=jnp.float32) * ((old - 1) / steps)[:, None]
    distance = jnp.abs(jnp.minimum(at, old - 1)[..., None] - jnp.arange(old))
    return jnp.maximum(1 - distance, 0.0)


def cubic_weights(old: int, new: int, antialias: bool) -> Float[np.ndarray, "{new} {old}"]:
    """float32 [new, old], cubic convolution with half-pixel centres, as torch resamples.

    Without antialiasing a = -0.75, and the border is repeated outside; with antialiasing a = -0.5,
    the kernel is stretched to the extent of a new cell, and weights are normalised.
    """
    scale = old / new
    weights = np.zeros((new, old))
    a = -0.5 if antialias else -0.75
    stretch = max(scale, 1.0) if antialias else 1.0

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for i in range(new):
        centre = (i + 0.5) * scale - 0.5
        reach = math.ceil(2 * stretch) + 1
        for j in range(math.floor(centre) - reach, math.floor(centre) + reach + 2):
            weight = kernel((j - centre) / stretch)
            if antialias:
                if 0 <= j < old:
                    weights[i, j] += weight
            else:
                weights[i, min(max(j, 0), old - 1)] += weight
    if antialias:
        weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def _resample(table: jax.Array, axis: int, size: int) -> jax.Array:
    """Resamples `axis` of a table to `size` cells: the mean over each cell, or linear interpolation
    between centres if the new cells are smaller than the old ones."""
    if table.shape[axis] == size:
        return table
    shape = list(table.shape)
    shape[axis] = size
    return jax.image.resize(table, shape, "linear", antialias=True)
