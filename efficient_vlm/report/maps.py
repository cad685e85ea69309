"""Pictures of token maps: which patches each method kept, merged or dropped.

`evaluation.token_maps` has the arrays in a workdir. `tiles` draws those of one question, for the
HTML report; `question_figure` puts them into one picture, for notebooks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efficient_vlm.evaluation.answers import is_right
from efficient_vlm.evaluation.token_maps import Cell, Example
from efficient_vlm.report.drawing import MIN_SIDE, enlarged, png, score_map, token_map

__all__ = ["Cell", "Example", "Tile", "png", "question_figure", "score_map", "tiles", "token_map"]

RIGHT, WRONG = (0, 130, 95), (200, 75, 0)


class Tile(NamedTuple):
    """A picture of a question.

    Attributes:
      png: PNG bytes.
      name: the method, or what the picture shows.
      prediction, right: what the method answered, and whether that is right; None without answer.
    """

    png: bytes
    name: str
    prediction: str = ""
    right: bool | None = None


def tiles(example: Example) -> Iterator[Tile]:
    """The image, then for each method its token map and, where it has scores, a heat map.

    Raises:
      UserError: arrays that do not fit each other.
    """
    yield Tile(png(enlarged(example.image, MIN_SIDE)), "the image")
    for cell in example.cells:
        name = f"{cell.compressor} at {cell.budget}"
        drawn = token_map(example.image, cell.source, grid=cell.grid)
        yield Tile(png(drawn), name, cell.prediction, is_right(cell.prediction, example.answer))
        if cell.scores is not None:
            drawn = score_map(example.image, cell.scores, grid=cell.grid)
            yield Tile(png(drawn), f"{name}: {cell.meaning or 'scores'}")


def question_figure(example: Example, *, columns: int | None = None) -> bytes:
    """PNG of one question: the image, then one token map per method with its prediction.

    Args:
      example: the question and what each method made of it.
      columns: pictures per row; None for as many as there are budgets, at most 5.

    Returns:
      PNG bytes; each caption is marked with a tick (green) or a cross (vermilion).
    """
    title, small = ImageFont.load_default(18), ImageFont.load_default(14)
    shown = [("image", "", enlarged(example.image, MIN_SIDE).astype(np.uint8), None)]
    for cell in example.cells:
        drawn = token_map(example.image, cell.source, grid=cell.grid)
        right = is_right(cell.prediction, example.answer)
        shown.append((f"{cell.compressor} at {cell.budget}", cell.prediction, drawn, right))
    if columns is None:
        columns = min(5, max(2, len({cell.budget for cell in example.cells})))
    height, width = shown[0][2].shape[:2]
    gap, caption, header = 16, 46, 48
    rows = -(-len(shown) // columns)
    size = (columns * (width + gap) + gap, header + rows * (height + caption + gap))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 14), f"{example.question}   answer: {example.answer}", (20, 24, 32), title)
    for k, (name, prediction, drawn, right) in enumerate(shown):
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
