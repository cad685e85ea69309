"""Overlapping crops of Molmo and Molmo2: tiling, raster order, pooling windows.

Crops overlap by a margin on every inner side. Patches in a margin are encoded for context, but only
the window inside the margins becomes tokens. So the windows together cover the resized picture (the
canvas) once, and its tokens are in raster order over all crops.

Source: Deitke et al. 2024, "Molmo and PixMo", section 2, and the behaviour of the released
preprocessors ("overlap-and-resize-c2").
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.limits import Limited

PATCH, COLUMN, START, LOW_RES_START, END = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<im_end>",
)


def layout(rows: int, columns: int, *, start: str = START, column_token: bool = True) -> str:
    """The text of a grid of visual tokens, row by row."""
    return start + (PATCH * columns + COLUMN * column_token) * rows + END


def select_tiling(
    height: int,
    width: int,
    window: int,
    most: int,
    fits: Callable[[tuple[int, int]], bool] = lambda tiling: True,
) -> tuple[int, int]:
    """Rows and columns of windows for a picture.

    The tiling that enlarges the picture least; if all of them shrink it, the one that shrinks it
    least. Ties go to fewer windows, then to fewer rows. Sides of zero and below (a picture smaller
    than the margins) are allowed: the other side then decides, or the result is 1 x 1.

    Args:
      height, width: pixels of the picture without the margins.
      window: edge of a window in pixels.
      most: largest number of windows.
      fits: which tilings there are to choose from; at least one.
    """
    tilings = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    tilings = [tiling for tiling in tilings if fits(tiling)]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    # float32, like the released code, so that a picture that fits exactly compares alike.
    with np.errstate(divide="ignore"):
        scale = np.float32(tilings) * np.float32(window) / np.float32([height, width])
    scale = scale.min(1)
    if (scale < 1).all():
        return tilings[int(scale.argmax())]
    return tilings[int(np.where(scale < 1, np.inf, scale).argmin())]


def raster(tiling: tuple[int, int], side: int, before: int, after: int) -> np.ndarray:
    """The cell and crop that show each cell of the canvas.

    Args:
      tiling: rows and columns of crops.
      side: cells along the edge of a crop.
      before, after: cells of the margin left of (above) and right of (below) a window.

    Returns:
      int32 [R, C], indices into the cells of all crops, crop after crop.
    """

    def along(crops: int) -> tuple[np.ndarray, np.ndarray]:
        window = side - before - after
        cells = np.arange(crops * window + before + after)
        # At the rim nothing overlaps: the first and the last crop show their margins, too.
        crop = np.clip((cells - before) // window, 0, crops - 1)
        return crop, cells - crop * window

    (crop_row, row), (crop_column, column) = along(tiling[0]), along(tiling[1])
    crop = crop_row[:, None] * tiling[1] + crop_column
    return ((crop * side + row[:, None]) * side + column).astype(np.int32)


def pooling_windows(grid: np.ndarray, pool: int) -> np.ndarray:
    """int32 [ceil(R / pool), ceil(C / pool), pool * pool] of int [R, C], padded with -1.

    Padding is on both sides; an odd rest has its larger half at the right and bottom.
    """
    missing = [-length % pool for length in grid.shape]
    grid = np.pad(grid, [(n // 2, n - n // 2) for n in missing], constant_values=-1)
    rows, columns = (length // pool for length in grid.shape)
    windows = grid.reshape(rows, pool, columns, pool).swapaxes(1, 2)
    return windows.reshape(rows, columns, pool * pool).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Overlapping(Limited):
    """Crop geometry of both generations.

    Attributes:
      crop: edge of a crop and of the whole view in pixels.
      patch: edge of a patch in pixels.
      pool: patches along the edge of a pooling window.
      max_crops: most crops beside the whole view.
      margins: patches left of (above) and right of (below) the window of a crop.
      mean, std: of the encoder's normalisation.
    """

    crop: int
    patch: int
    pool: int
    max_crops: int
    margins: tuple[int, int]
    mean: base.Triple
    std: base.Triple
    _least: ClassVar[str] = "the whole picture and one crop"

    def __post_init__(self):
        if self.crop % self.patch or self.window < self.patch:
            raise UserError(
                f"preprocessor: {self.crop} px crops, {self.patch} px patches, "
                f"margins {list(self.margins)}",
                allowed="whole patches in a crop, at least one of them between the margins",
            )
        super().__post_init__()

    @property
    def side(self) -> int:
        """Patches along the edge of a crop."""
        return self.crop // self.patch

    @property
    def window(self) -> int:
        """Edge in pixels of the window of a crop."""
        return self.crop - sum(self.margins) * self.patch

    @property
    def least(self) -> int:
        """Visual tokens of the whole and of one crop."""
        return self._tokens((1, 1))

    def tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of crops for a picture of this size."""
        margin = self.crop - self.window
        sizes = (height - margin, width - margin, self.window, self.max_crops)
        if self.max_visual_tokens is None:
            return select_tiling(*sizes)
        return select_tiling(*sizes, lambda tiling: self.fits(self._tokens(tiling)))

    def canvas(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of the canvas that these crops cover."""
        rows, columns = (count * self.window + self.crop - self.window for count in tiling)
        return rows, columns

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the visual tokens of all crops of a picture of this size.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return self._grid(self.tiling(height, width))

    def _grid(self, tiling: tuple[int, int]) -> tuple[int, int]:
        rows, columns = self.canvas(tiling)
        edge = self.patch * self.pool
        return math.ceil(rows / edge), math.ceil(columns / edge)

    def _tokens(self, tiling: tuple[int, int]) -> int:
        """Visual tokens of these crops and of the whole view."""
        return math.ceil(self.side / self.pool) ** 2 + math.prod(self._grid(tiling))

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size, those of the whole view included.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return self._tokens(self.tiling(height, width))

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        rows, columns = self.tiling(height, width)
        return 1 + rows * columns, self.crop, self.crop

    def corners(self, tiling: tuple[int, int]) -> list[tuple[int, int]]:
        """Top left of each crop on the canvas in pixels, row by row."""
        rows, columns = (range(0, count * self.window, self.window) for count in tiling)
        return [(top, left) for top in rows for left in columns]

    def crops(self, canvas: np.ndarray, tiling: tuple[int, int]) -> np.ndarray:
        """[crops, crop, crop, ...] of [H, W, ...], row by row."""
        return np.stack(
            [canvas[y : y + self.crop, x : x + self.crop] for y, x in self.corners(tiling)]
        )


def from_files(
    kind: type[Overlapping],
    preprocessor: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    max_visual_tokens: int | None = None,
    skip_blank: int | None = None,
    **options: Any,
) -> Overlapping:
    """The processor of a checkpoint's files.

    Args:
      kind: its class.
      preprocessor, config: contents of the files.
      max_visual_tokens: see `Limited`.
      skip_blank: only to say that there is no such thing.
      **options: in place of what `preprocessor` says.

    Raises:
      UserError: blank crops are to be left out, or a setting is wrong.
    """
    if skip_blank is not None:
        raise UserError(
            f"skip_blank: {short(skip_blank)} for Molmo",
            allowed="None: rows of visual tokens run across all crops, so none can be left out",
            fix="max_visual_tokens, for fewer crops",
        )
    settings = {**preprocessor, **options}
    return kind.from_hf(settings, config, max_visual_tokens=max_visual_tokens)


# ---- settings ------------------------------------------------------------------------------------


def square(name: str, settings: Mapping[str, Any], default: int) -> int:
    """The edge of a square, written as one number or as two equal ones."""
    value = settings.get(name, default)
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise UserError(f"preprocessor: {name} {list(value)}", allowed="a square")
        value = value[0]
    return reading.whole(name, value)


def margins_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """`overlap_margins`, in patches."""
    value = settings.get("overlap_margins", (4, 4))
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(
            f"preprocessor: overlap_margins {short(value)}", allowed="two whole numbers"
        )
    before, after = (reading.whole("overlap_margins", margin, 0) for margin in value)
    return before, after
