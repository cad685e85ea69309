"""Scenes of real handwritten digits: composition is here, the questions are in `questions.py`.

A scene is a canvas of cells over a tinted, noisy background. Cells hold handwritten digits (the
8 x 8 glyphs that ship with this package) in one of eight colours: five colours occur once
(needles), three occur 0 to `max_count` times, and `clutter` white digits are never asked for.
Everything is a pure function of (config.seed, split, index).
"""

import dataclasses
import functools
import hashlib
import json
import statistics
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from efficient_vlm import checks
from efficient_vlm.data.glyphs import FONTS, SOURCE_PIXELS, TRAIN_GLYPHS, font, glyph_table
from efficient_vlm.errors import UserError

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "grey")
WHITE = len(COLOURS)  # Colour number of clutter; no question names it.
RGB = np.array(
    [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 1, 0],
        [1, 0, 1],
        [0, 1, 1],
        [1, 0.5, 0],
        [0.6, 0.6, 0.6],
        [1, 1, 1],
    ],
    np.float32,
)
TASKS = (
    "needle",
    "needle_hr",
    "count",
    "point",
    "relation",
    "absent",
    "dense",
    "global",
)
NEEDLES = 5  # Colours that occur exactly once.
SPLITS = ("train", "test")
MAX_CANVAS = 512
MAX_GRID = 64
# O and I look like 0 and 1 at six pixels: a reader could not be right.
ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """The settings that define every image and question of a build.

    Attributes:
      tasks: names from `TASKS`. "needle_hr" is needle with a grid as fine as the glyphs, so
        glyphs keep their pixel size when the canvas grows.
      seed: of the whole build.
      canvas: side of the image in pixels.
      grid: cells per side; 0 means as many as fit glyphs with their jitter.
      glyph: side of a digit in pixels (source glyphs are 8 x 8, enlarged by bicubic).
      jitter: every digit is moved by up to this many pixels each way, inside its cell.
      clutter: number of white digits that no question asks about.
      max_count: colours that occur several times occur 0..max_count times.
      dense_length: characters of the text to read.
      dense_px: smallest and largest font size in pixels.
      noise: standard deviation of the pixel noise (1 = full range).
      tint: strength of the background colour.
      question_pool: questions stored per image.
    """

    tasks: tuple[str, ...] = ("needle", "count", "point", "global")
    seed: int = 0
    canvas: int = 64
    grid: int = 8
    glyph: int = 8
    jitter: int = 0
    clutter: int = 0
    max_count: int = 9
    dense_length: int = 4
    dense_px: tuple[int, int] = (8, 12)
    noise: float = 0.03
    tint: float = 0.15
    question_pool: int = 16

    @property
    def cells(self) -> int:
        """Cells per side."""
        if self.grid == 0 or "needle_hr" in self.tasks:
            return min(self.canvas // (self.glyph + 2 * self.jitter), MAX_GRID)
        return self.grid

    @property
    def most_glyphs(self) -> int:
        """Most digits that one scene can hold."""
        several = 2 if "absent" in self.tasks else 3
        return NEEDLES + several * self.max_count + self.clutter

    def fingerprint(self) -> str:
        """Twelve hex digits that differ when any field differs."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Scene(NamedTuple):
    """One image and its content.

    Attributes:
      image: uint8 [canvas, canvas, 3].
      glyphs: int32 [n, 7], per digit: row, column (cells), top, left (pixels), colour (index in
        `COLOURS`, 8 = white clutter), digit, number of the source glyph. The first NEEDLES rows
        are the needles.
      several: the colours that occur 0..max_count times and may be asked about.
      background: index in `COLOURS`.
      text: the string to read, "" when "dense" is not a task.
      text_box: (top, left, height, width) of the text in pixels, zeros without text.
    """

    image: np.ndarray
    glyphs: np.ndarray
    several: tuple[int, ...]
    background: int
    text: str
    text_box: tuple[int, int, int, int]


def check(config: SceneConfig) -> None:
    """Raises UserError for settings that no scene can have."""
    if not config.tasks:
        raise UserError("data.tasks: empty", allowed=", ".join(TASKS), fix="name one task or more")
    for task in config.tasks:
        checks.one_of("data.tasks", task, TASKS)
    limits = {
        "canvas": (16, MAX_CANVAS),
        "grid": (0, MAX_GRID),
        "glyph": (SOURCE_PIXELS, MAX_CANVAS),
        "jitter": (0, MAX_CANVAS),
        "clutter": (0, MAX_GRID**2),
        "max_count": (1, 20),
        "dense_length": (1, 32),
        "noise": (0.0, 1.0),
        "tint": (0.0, 1.0),
        "question_pool": (1, 256),
    }
    for name, (low, high) in limits.items():
        checks.number(f"data.{name}", getattr(config, name), low, high)
    pitch = config.glyph + 2 * config.jitter  # smallest cell
    if config.cells < 1 or config.canvas // config.cells < pitch:
        raise UserError(
            f"data.grid: {config.cells} cells of {pitch} px (glyph + 2 x jitter) need more than"
            f" data.canvas={config.canvas} px",
            allowed=f"data.grid up to {config.canvas // pitch}",
            fix=f"data.grid={config.canvas // pitch}, or a larger canvas",
        )
    low, high = config.dense_px
    if not 6 <= low <= high <= 12:
        raise UserError(
            f"data.dense_px: {config.dense_px}",
            allowed="6 <= smallest <= largest <= 12",
            fix="data.dense_px=(8, 12)",
        )
    free = config.cells**2 - (_most_text_cells(config) if "dense" in config.tasks else 0)
    if config.most_glyphs > free:
        raise UserError(
            f"data.max_count, data.clutter: {config.most_glyphs} digits in {free} free cells",
            fix="lower data.max_count or data.clutter, or raise data.grid",
        )


def compose(config: SceneConfig, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """Draws scene number `index` of `split`.

    Returns:
      The scene, and the generator from which its questions are drawn next.
    """
    rng = np.random.default_rng((config.seed, SPLITS.index(split), index))
    pixels, labels = glyph_table(config.glyph)
    first, last = (0, TRAIN_GLYPHS) if split == "train" else (TRAIN_GLYPHS, len(labels))
    side, px = config.canvas, config.glyph

    background = int(rng.integers(len(COLOURS)))
    # Normal noise from a table of quantiles, four times as fast as drawing normal numbers.
    image = _quantiles()[rng.integers(0, 2**16, (side, side, 3), dtype=np.uint16)]
    image *= np.float32(config.noise)
    image += np.float32(config.tint) * RGB[background]

    text, text_box = "", (0, 0, 0, 0)
    cells = np.arange(config.cells**2)
    if "dense" in config.tasks:
        text, mask, text_box = _draw_text(config, rng)
        top, left, height, width = text_box
        image[top : top + height, left : left + width] += mask[..., None]
        cells = cells[~_covered(config, text_box)]

    colours = rng.permutation(len(COLOURS))
    # With "absent" one colour never occurs, so that "no" is always possible. Counting questions
    # leave it out, so their answers stay uniform over 0..max_count.
    several = colours[NEEDLES : -1 if "absent" in config.tasks else None]
    counts = rng.integers(0, config.max_count + 1, len(several))
    colour = np.concatenate(
        [colours[:NEEDLES], np.repeat(several, counts), np.full(config.clutter, WHITE)]
    )
    number = len(colour)
    cell = rng.choice(cells, number, replace=False, shuffle=True)
    source = rng.integers(first, last, number)
    row, column = np.divmod(cell, config.cells)
    pitch = side // config.cells
    spare = pitch - px
    shift = np.full((2, number), spare // 2)
    if config.jitter:
        shift += rng.integers(-config.jitter, config.jitter + 1, (2, number))
    # The grid is centred when the canvas is not a multiple of it.
    margin = (side - pitch * config.cells) // 2
    top, left = np.stack([row, column]) * pitch + margin + shift
    ys = top[:, None, None] + np.arange(px)[:, None]
    xs = left[:, None, None] + np.arange(px)
    image[ys, xs] += pixels[source][..., None] * RGB[colour][:, None, None, :]

    np.clip(image, 0, 1, out=image)
    image *= 255
    image += 0.5
    glyphs = np.stack([row, column, top, left, colour, labels[source], source], 1)
    scene = Scene(
        image=image.astype(np.uint8),
        glyphs=glyphs.astype(np.int32),
        several=tuple(int(c) for c in several),
        background=background,
        text=text,
        text_box=text_box,
    )
    return scene, rng


@functools.lru_cache(maxsize=1)
def _quantiles() -> np.ndarray:
    """float32 [65536]: equally likely values of a standard normal variable."""
    normal = statistics.NormalDist()
    half = np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**15)], np.float32)
    return np.concatenate([half, -half[::-1]])


def _draw_text(
    config: SceneConfig, rng: np.random.Generator
) -> tuple[str, np.ndarray, tuple[int, int, int, int]]:
    """A random string: (text, mask float32 [h, w] in 0..1, box)."""
    text = "".join(ALPHABET[i] for i in rng.integers(0, len(ALPHABET), config.dense_length))
    name = FONTS[rng.integers(len(FONTS))]
    face = font(name, int(rng.integers(*config.dense_px, endpoint=True)))
    x0, y0, x1, y1 = (int(v) for v in face.getbbox(text))
    height, width = y1 - y0, x1 - x0
    if height > config.canvas or width > config.canvas:
        raise UserError(
            f"data.dense_length: {config.dense_length} characters exceed {config.canvas} px",
            fix="lower data.dense_length or data.dense_px, or raise data.canvas",
        )
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((-x0, -y0), text, fill=255, font=face)
    top = int(rng.integers(0, config.canvas - height + 1))
    left = int(rng.integers(0, config.canvas - width + 1))
    return text, np.asarray(mask, np.float32) / 255, (top, left, height, width)


def _covered(config: SceneConfig, box: tuple[int, int, int, int]) -> np.ndarray:
    """bool [cells * cells]: cells that touch the text."""
    pitch = config.canvas // config.cells
    margin = (config.canvas - pitch * config.cells) // 2
    start = np.arange(config.cells) * pitch + margin
    top, left, height, width = box
    rows = (start < top + height) & (start + pitch > top)
    columns = (start < left + width) & (start + pitch > left)
    return (rows[:, None] & columns[None]).reshape(-1)


@functools.lru_cache(maxsize=16)
def _most_text_cells(config: SceneConfig) -> int:
    """Upper bound of the number of cells that a text can touch."""
    px = config.dense_px[1]
    boxes = [font(name, px).getbbox("W" * config.dense_length) for name in FONTS]
    pitch = config.canvas // config.cells
    span = [max(int(b[k + 2] - b[k]) for b in boxes) for k in (0, 1)]
    columns, rows = (min(config.cells, (s - 2) // pitch + 2) for s in span)
    return rows * columns
