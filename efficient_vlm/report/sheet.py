"""A sheet of pictures with captions: token maps, and beside them heat maps with a scale."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efficient_vlm.report.drawing import heat_colours

_INK, _PALE, _PAPER = (20, 24, 32), (88, 96, 110), (255, 255, 255)
_GAP, _BAR = 20, 9  # Pixels.
_TITLE, _HEAD, _TEXT = 20, 16, 13  # Font sizes.


@dataclasses.dataclass(frozen=True)
class HeatPanel:
    """A heat map uint8 [h, w, 3], what it shows, and what the ends of its colours stand for."""

    pixels: np.ndarray
    meaning: str
    scale: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture with its caption.

    Attributes:
      pixels: uint8 [H, W, 3].
      title, lines: caption.
      scale: what the ends of its colours stand for, if it is a heat map.
      heat: a smaller heat map to the right of it.
    """

    pixels: np.ndarray
    title: str
    lines: Sequence[str] = ()
    scale: tuple[str, str] | None = None
    heat: HeatPanel | None = None


def draw_sheet(
    title: str, notes: Sequence[str], panels: Sequence[Panel], *, columns: int
) -> np.ndarray:
    """Lays panels out in rows.

    Args:
      title: first line.
      notes: paragraphs below it.
      panels: pictures of one size; heat maps may be smaller.
      columns: panels in a row.

    Returns:
      uint8 [H, W, 3].
    """
    height, width = panels[0].pixels.shape[:2]
    heats = [panel.heat.pixels.shape[1] for panel in panels if panel.heat is not None]
    beside = max(heats, default=0) + _GAP // 2 if heats else 0
    columns = min(columns, len(panels))
    cell = width + beside
    total = max(2 * _GAP + columns * cell + (columns - 1) * _GAP, 560)
    captions = [
        [line for text in panel.lines for line in _wrap(text, cell, _TEXT)] for panel in panels
    ]
    line_height = _TEXT + 5
    below = _HEAD + 12 + line_height * max(map(len, captions), default=0)
    below = max(below, _HEAD + 20 + _BAR + line_height * any(panel.scale for panel in panels))
    head = [line for note in notes for line in _wrap(note, total - 2 * _GAP, _TEXT)]
    top = _GAP + _TITLE + 12 + line_height * len(head) + _GAP // 2
    rows = -(-len(panels) // columns)
    size = (total, top + rows * (height + below + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _fit(title, total - 2 * _GAP, _TITLE), _INK, _font(_TITLE))
    for i, line in enumerate(head):
        draw.text((_GAP, _GAP + _TITLE + 10 + i * line_height), line, _PALE, _font(_TEXT))
    for k, (panel, lines) in enumerate(zip(panels, captions, strict=True)):
        x = _GAP + k % columns * (cell + _GAP)
        y = top + k // columns * (height + below + _GAP)
        sheet.paste(Image.fromarray(panel.pixels), (x, y))
        draw.text((x, y + height + 6), _fit(panel.title, cell, _HEAD), _INK, _font(_HEAD))
        for i, line in enumerate(lines):
            at = (x, y + height + _HEAD + 12 + i * line_height)
            draw.text(at, line, _PALE, _font(_TEXT))
        if panel.scale is not None:
            _draw_scale(sheet, draw, panel.scale, x, y + height + _HEAD + 16, width)
        if panel.heat is not None:
            _draw_heat(sheet, draw, panel.heat, x + width + _GAP // 2, y, height)
    return np.asarray(sheet)


def _draw_heat(sheet, draw, heat: HeatPanel, x: int, y: int, room: int) -> None:
    """A heat map with its scale and meaning under it, as far as there is room."""
    height, width = heat.pixels.shape[:2]
    sheet.paste(Image.fromarray(heat.pixels), (x, y))
    _draw_scale(sheet, draw, heat.scale, x, y + height + 6, width)
    first = y + height + _BAR + 26
    for i, line in enumerate(_wrap(heat.meaning, width, _TEXT - 1)):
        if first + (i + 1) * (_TEXT + 3) <= y + room:
            draw.text((x, first + i * (_TEXT + 3)), line, _PALE, _font(_TEXT - 1))


def _draw_scale(sheet, draw, ends: tuple[str, str], x: int, y: int, width: int) -> None:
    colours = np.broadcast_to(heat_colours(np.linspace(0, 1, width)), (_BAR, width, 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(colours)), (x, y))
    font, (low, high) = _font(_TEXT - 1), ends
    draw.text((x, y + _BAR + 2), low, _PALE, font)
    draw.text((x + width - font.getlength(high), y + _BAR + 2), high, _PALE, font)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(text: str, width: int, size: int) -> str:
    """`text`, its end left out if it is wider than `width` pixels."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fit(line, width, size) for line in lines if line]
