"""Pixels of token maps and heat maps, with NumPy and Pillow alone.

Pixels are repeated, never interpolated, so that a 64 px image stays crisp.
"""

import io

import numpy as np
from PIL import Image

from efficient_vlm.errors import UserError

MIN_SIDE = 256  # Pixels; smaller images are enlarged by a whole factor.

_VEIL = np.array([168.0, 172.0, 180.0])  # Dropped patches fade to this grey, light and dark alike.
# Okabe-Ito without black: readable by the colour-blind.
_MERGED = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
     (204, 121, 167)], np.float64
)  # fmt: skip
# Beyond seven merged tokens the same colours, darker, then lighter.
_MERGED = np.concatenate([_MERGED, 0.55 * _MERGED, 0.5 * _MERGED + 127.5])
# Idle, even, busy: colour-blind-safe, neutral in the middle.
_DIVERGING = np.array([(0, 114, 178), (236, 236, 232), (213, 94, 0)], np.float64)
# Anchors of a perceptually even scale from dark blue to yellow (cividis), read at k/8.
_HEAT = np.array(
    [(0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 92, 109), (112, 113, 115), (138, 134, 120),
     (165, 156, 116), (195, 179, 105), (254, 232, 56)], np.float64
)  # fmt: skip


def _grid_of(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = int(round(patches**0.5))
        grid = (side, side)
    if grid[0] * grid[1] != patches:
        raise UserError(
            f"grid: {tuple(grid)} does not hold {patches} patches",
            fix="pass grid=(rows, columns) of the source patches",
        )
    return int(grid[0]), int(grid[1])


def enlarged(image: np.ndarray, min_side: int) -> np.ndarray:
    """float64 [H', W', 3] in 0..255: a uint8 image, its pixels repeated by a whole factor."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise UserError(f"image: shape {image.shape}", allowed="[height, width, 3]")
    if image.dtype != np.uint8:
        raise UserError(f"image: dtype {image.dtype}", allowed="uint8")
    factor = -(-min_side // min(image.shape[:2]))
    return np.kron(image, np.ones((factor, factor, 1))) if factor > 1 else image.astype(float)


def _per_pixel(values: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Values [N] of the patches at every pixel [H, W], also where sizes do not divide."""
    rows = np.arange(shape[0]) * grid[0] // shape[0]
    columns = np.arange(shape[1]) * grid[1] // shape[1]
    return np.asarray(values).reshape(grid)[rows[:, None], columns]


def _outline(labels: np.ndarray, thickness: int) -> np.ndarray:
    """bool [H, W]: pixels within `thickness` of a change of label or of the border."""
    padded = np.pad(labels, 1, constant_values=-2)
    centre = padded[1:-1, 1:-1]
    edge = np.zeros(labels.shape, bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= centre != neighbour
    for _ in range(thickness - 1):
        grown = np.pad(edge, 1)
        edge = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:] | edge
    return edge


def token_map(
    image: np.ndarray,
    source: np.ndarray,
    *,
    grid: tuple[int, int] | None = None,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """The image with kept patches clear, merged ones tinted and outlined, dropped ones veiled.

    Patches of one token share one outline and one of 21 colours, wherever they lie; a token holding
    a single patch keeps its own pixels under a white outline. An untouched image has no outlines.

    Args:
      image: uint8 [H, W, 3].
      source: int [N], a row of `VisualTokens.source`.
      grid: (rows, columns) of the patches; None for a square.
      min_side: the shorter side of the result has at least this many pixels.

    Returns:
      uint8 [H', W', 3].

    Raises:
      UserError: shapes that do not fit.
    """
    source = np.asarray(source).reshape(-1)
    grid = _grid_of(source.size, grid)
    pixels = enlarged(image, min_side)
    shape = pixels.shape[:2]
    kept = source >= 0
    sizes = np.bincount(source[kept], minlength=1)
    merged = kept & (sizes[np.where(kept, source, 0)] > 1)
    if kept.all() and not merged.any():
        return pixels.astype(np.uint8)

    # Ordered by first appearance so that neighbouring tokens get different colours.
    rank, place = _by_appearance(source), _by_appearance(np.where(merged, source, -1))
    colour = _MERGED[_per_pixel(place % len(_MERGED), grid, shape)]
    is_kept = _per_pixel(kept, grid, shape)[..., None]
    is_merged = _per_pixel(merged, grid, shape)[..., None]
    grey = pixels.mean(-1, keepdims=True)
    out = np.where(is_kept, pixels, 0.82 * _VEIL + 0.18 * grey)
    out = np.where(is_merged, 0.68 * pixels + 0.32 * colour, out)
    # Dropped patches are one region without lines; every token is a region of its own.
    labels = _per_pixel(np.where(kept, rank, -1), grid, shape)
    edge = _outline(labels, max(1, min(shape) // 128))[..., None] & is_kept
    out = np.where(edge, np.where(is_merged, colour, 255.0), out)
    return np.clip(out, 0, 255).astype(np.uint8)


def _by_appearance(source: np.ndarray) -> np.ndarray:
    """int [N]: tokens numbered by their first patch, -1 for none."""
    _, first, inverse = np.unique(source, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[inverse.reshape(-1)]
    if not (source < 0).any():
        return rank
    none = rank[source < 0][0]
    return np.where(source < 0, -1, rank - (rank > none))


def score_range(scores: np.ndarray) -> tuple[float, float]:
    """The scores of the darkest and of the brightest colour.

    The brightest is the highest score or, where few scores are far above the others (attention has
    sinks), the 98th percentile: all above it look the same, so that the rest can be told apart.
    """
    finite = np.asarray(scores, np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return 0.0, 0.0
    low, most, high = finite.min(), np.percentile(finite, 98), finite.max()
    outlying = most > low and high - low > 1.5 * (most - low)
    return float(low), float(most if outlying else high)


def score_map(
    image: np.ndarray,
    scores: np.ndarray,
    *,
    grid: tuple[int, int] | None = None,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """The image under a heat map of patch scores, from dark blue to yellow (`score_range`).

    Args:
      image: uint8 [H, W, 3].
      scores: float [N]; not finite means not scored, drawn without colour.
      grid: (rows, columns) of the patches; None for a square.
      min_side: the shorter side of the result has at least this many pixels.

    Returns:
      uint8 [H', W', 3].

    Raises:
      UserError: shapes that do not fit.
    """
    scores = np.asarray(scores, np.float64).reshape(-1)
    grid = _grid_of(scores.size, grid)
    pixels = enlarged(image, min_side)
    finite, (low, high) = np.isfinite(scores), score_range(scores)
    unit = np.where(finite, scores - low, 0.0) / (high - low if high > low else 1.0)
    heat = heat_colours(np.minimum(unit, 1.0)).astype(np.float64)
    index = _per_pixel(np.arange(scores.size), grid, pixels.shape[:2])
    grey = pixels.mean(-1, keepdims=True)
    out = np.where(finite[index][..., None], 0.7 * heat[index] + 0.3 * grey, pixels)
    return np.clip(out, 0, 255).astype(np.uint8)


def heat_colours(unit: np.ndarray, *, diverging: bool = False) -> np.ndarray:
    """Colours of values in [0, 1], uint8 [..., 3]; NaN is a neutral grey.

    From dark blue over grey to yellow or, diverging, from blue over near-white to vermilion.
    """
    anchors = _DIVERGING if diverging else _HEAT
    place = np.linspace(0, 1, len(anchors))
    known = np.nan_to_num(np.asarray(unit, np.float64))
    colours = np.stack([np.interp(known, place, anchors[:, c]) for c in range(3)], -1)
    return np.where(np.isnan(unit)[..., None], _VEIL, colours).round().astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    # Repeated pixels have few colours; a palette then halves the file at no loss.
    colours = image.getcolors(256)
    if colours:
        image = image.quantize(len(colours), dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
