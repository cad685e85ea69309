"""Token maps of example questions: which patches each method kept, merged or dropped.

`write_maps` leaves PNG files and `maps.json` in a workdir for the HTML report; `question_figure`
is one picture of one question, for notebooks.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efficient_vlm.report.drawing import MIN_SIDE, enlarged, png, score_map, token_map

__all__ = ["Cell", "Example", "png", "question_figure", "score_map", "token_map", "write_maps"]

RIGHT, WRONG = (0, 130, 95), (200, 75, 0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method made of one question.

    Attributes:
      compressor: name of the method.
      budget: its number of visual tokens.
      source: int [N], for every patch of the grid (row-major) the token holding it, -1 dropped.
      prediction: the generated answer.
      grid: (rows, columns) with rows * columns = N; None for a square grid.
      scores: float [N] or None, one number per patch, see `report.heat`.
      meaning: what the scores are.
    """

    compressor: str
    budget: int
    source: np.ndarray
    prediction: str
    grid: tuple[int, int] | None = None
    scores: np.ndarray | None = None
    meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one image [H, W, 3] uint8, and what each method made of it."""

    image: np.ndarray
    question: str
    answer: str
    cells: Sequence[Cell]
    task: str = ""
    record: int = -1


def question_figure(example: Example, *, columns: int | None = None) -> bytes:
    """PNG of one question: the image, then one token map per method with its prediction.

    Args:
      example: the question and what each method made of it.
      columns: pictures per row; None for as many as there are budgets, at most 5.

    Returns:
      PNG bytes; each caption is marked with a tick (green) or a cross (vermilion).
    """
    title, small = ImageFont.load_default(18), ImageFont.load_default(14)
    tiles = [("image", "", enlarged(example.image, MIN_SIDE).astype(np.uint8), None)]
    for cell in example.cells:
        drawn = token_map(example.image, cell.source, grid=cell.grid)
        right = _same(cell.prediction, example.answer)
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


def _same(prediction: str, answer: str) -> bool:
    """Exact match as evaluation scores it: spaces and case aside."""
    return prediction.lower().split() == answer.lower().split()


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
      "maps": [{"compressor", "budget", "prediction", "correct", "tokens", "file", "scores",
      "meaning"}]}, files relative to `maps/`, "scores" null or a file, "meaning" what they are.
    """
    folder = Path(workdir) / "maps"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    listing = []
    for q, example in enumerate(examples):
        original = f"{q:02d}_image.png"
        (folder / original).write_bytes(png(enlarged(example.image, MIN_SIDE)))
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
                    "correct": _same(cell.prediction, example.answer),
                    "tokens": int(np.unique(source[source >= 0]).size),
                    "file": name,
                    "scores": scores,
                    "meaning": cell.meaning,
                }
            )
        listing.append(entry)
    path = folder / "maps.json"
    path.write_text(json.dumps(listing, indent=1), encoding="utf-8")
    return path
