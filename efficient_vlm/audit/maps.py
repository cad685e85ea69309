"""Token maps: which patches a compressor kept, merged or dropped, drawn over the image.

Drawn with NumPy and Pillow alone; pixels are repeated, never interpolated, so that a 64 px image
stays crisp. `write_maps` leaves PNG files and `maps.json` in a workdir for the HTML report.
"""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efficient_vlm.errors import UserError

MIN_SIDE = 256  # Pixels; smaller images are enlarged by a whole factor.

_VEIL = np.array([168.0, 172.0, 180.0])  # Dropped patches fade to this grey, light and dark alike.
# Okabe-Ito without black: readable by the colour-blind. Green and vermilion mark right and wrong.
_MERGED = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
     (204, 121, 167)], np.float64
)  # fmt: skip
RIGHT, WRONG = (0, 130, 95), (200, 75, 0)
# Anchors of a perceptually even scale from dark blue to yellow (cividis), read at k/8.
_HEAT = np.array(
    [(0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 92, 109), (112, 113, 115), (138, 134, 120),
     (165, 156, 116), (195, 179, 105), (254, 232, 56)], np.float64
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method made of one question.

    Attributes:
      compressor: name of the method.
      budget: its number of visual tokens.
      source: int [N], for every patch of the grid (row-major) the token holding it, -1 dropped.
      prediction: the generated answer.
      grid: (rows, columns) with rows * columns = N; None for a square grid.
      scores: float [N] or None, what the method ranked the patches by.
    """

    compressor: str
    budget: int
    source: np.ndarray
    prediction: str
    grid: tuple[int, int] | None = None
    scores: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one image [H, W, 3] uint8, and what each method made of it."""

    image: np.ndarray
    question: str
    answer: str
    cells: Sequence[Cell]
    task: str = ""
    record: int = -1


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


def _enlarged(image: np.ndarray, min_side: int) -> np.ndarray:
    """float64 [H', W', 3] in 0..255, by a whole factor."""
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

    Patches of one token share one outline and one of seven colours; a token holding a single
    patch keeps its own pixels under a white outline. An untouched image has no outlines.

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
    pixels = _enlarged(image, min_side)
    shape = pixels.shape[:2]
    kept = source >= 0
    sizes = np.bincount(source[kept], minlength=1)
    merged = kept & (sizes[np.where(kept, source, 0)] > 1)
    if kept.all() and not merged.any():
        return pixels.astype(np.uint8)

    # Ordered by first appearance so that neighbouring tokens get different colours.
    _, first, rank = np.unique(source, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[rank.reshape(-1)]
    colour = _MERGED[_per_pixel(rank % len(_MERGED), grid, shape)]
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


def score_map(
    image: np.ndarray,
    scores: np.ndarray,
    *,
    grid: tuple[int, int] | None = None,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """The image under a heat map of patch scores, from dark blue (lowest) to yellow (highest).

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
    pixels = _enlarged(image, min_side)
    finite = np.isfinite(scores)
    low, high = (scores[finite].min(), scores[finite].max()) if finite.any() else (0.0, 0.0)
    unit = np.where(finite, scores - low, 0.0) / (high - low if high > low else 1.0)
    heat = heat_colours(unit).astype(np.float64)
    index = _per_pixel(np.arange(scores.size), grid, pixels.shape[:2])
    grey = pixels.mean(-1, keepdims=True)
    out = np.where(finite[index][..., None], 0.7 * heat[index] + 0.3 * grey, pixels)
    return np.clip(out, 0, 255).astype(np.uint8)


def heat_colours(unit: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] from dark blue (0) over grey to yellow (1); NaN is a neutral grey."""
    place = np.linspace(0, 1, len(_HEAT))
    known = np.nan_to_num(np.asarray(unit, np.float64))
    colours = np.stack([np.interp(known, place, _HEAT[:, c]) for c in range(3)], -1)
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


def question_figure(example: Example, *, columns: int | None = None) -> bytes:
    """PNG of one question: the image, then one token map per method with its prediction.

    Args:
      example: the question and what each method made of it.
      columns: pictures per row; None for as many as there are budgets, at most 5.

    Returns:
      PNG bytes; each caption is marked with a tick (green) or a cross (vermilion).
    """
    title, small = ImageFont.load_default(18), ImageFont.load_default(14)
    tiles = [("image", "", _enlarged(example.image, MIN_SIDE).astype(np.uint8), None)]
    for cell in example.cells:
        drawn = token_map(example.image, cell.source, grid=cell.grid)
        right = cell.prediction.strip() == example.answer.strip()
        tiles.append((f"{cell.compressor} at {cell.budget}", cell.prediction, drawn, right))
    if columns is None:
        columns = min(5, max(2, len({cell.budget for cell in example.cells})))
    height, width = tiles[0][2].shape[:2]
    gap, caption, header = 16, 46, 48
    rows = -(-len(tiles) // columns)
    size = (columns * (width + gap) + gap, header + rows * (height + caption + gap))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 14), f"{example.question}   answer: {example.answer}", (20, 24, 32), title)
    for k, (name, prediction, drawn, right) in enumerate(tiles):
        x = gap + k % columns * (width + gap)
        y = header + k // columns * (height + caption + gap)
        sheet.paste(Image.fromarray(drawn), (x, y))
        draw.text((x, y + height + 4), name, (70, 76, 88), small)
        if right is not None:
            colour = RIGHT if right else WRONG
            _mark(draw, x, y + height + 26, right, colour)
            draw.text((x + 18, y + height + 22), prediction or "(nothing)", colour, small)
    return png(np.asarray(sheet))


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool, colour: tuple) -> None:
    """A tick or a cross of 12 px, so that the colour is not the only sign."""
    if right:
        draw.line([(x, y + 6), (x + 4, y + 10), (x + 12, y)], colour, 2)
    else:
        draw.line([(x, y), (x + 10, y + 10)], colour, 2)
        draw.line([(x, y + 10), (x + 10, y)], colour, 2)


def write_maps(workdir: str | os.PathLike, examples: Sequence[Example]) -> Path:
    """Writes `maps/*.png` and `maps/maps.json`, replacing those of an earlier evaluation.

    Args:
      workdir: of the run; made if missing.
      examples: a handful of questions; the report shows them all.

    Returns:
      The path of `maps.json`: a list of {"question", "answer", "task", "record", "image",
      "maps": [{"compressor", "budget", "prediction", "correct", "tokens", "file", "scores"}]},
      files relative to `maps/`, "scores" null or a file.
    """
    folder = Path(workdir) / "maps"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    listing = []
    for q, example in enumerate(examples):
        original = f"{q:02d}_image.png"
        (folder / original).write_bytes(png(_enlarged(example.image, MIN_SIDE)))
        entry = {
            "question": example.question,
            "answer": example.answer,
            "task": example.task,
            "record": int(example.record),
            "image": original,
            "maps": [],
        }
        for c, cell in enumerate(example.cells):
            source = np.asarray(cell.source).reshape(-1)
            name, scores = f"{q:02d}_{c:02d}.png", None
            (folder / name).write_bytes(png(token_map(example.image, source, grid=cell.grid)))
            if cell.scores is not None:
                scores = f"{q:02d}_{c:02d}_scores.png"
                heat = score_map(example.image, cell.scores, grid=cell.grid)
                (folder / scores).write_bytes(png(heat))
            entry["maps"].append(
                {
                    "compressor": cell.compressor,
                    "budget": int(cell.budget),
                    "prediction": cell.prediction,
                    "correct": cell.prediction.strip() == example.answer.strip(),
                    "tokens": int(np.unique(source[source >= 0]).size),
                    "file": name,
                    "scores": scores,
                }
            )
        listing.append(entry)
    path = folder / "maps.json"
    path.write_text(json.dumps(listing, indent=1), encoding="utf-8")
    return path
