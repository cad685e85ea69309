"""Families that cut a picture into tiles and add a small view of the whole: what they share.

`smolvlm` and `internvl` choose how many tiles there are. Neither keeps the aspect ratio exactly:
the picture is stretched to whole tiles, so no tile has padding.
"""

import dataclasses

import numpy as np
from PIL import Image

from efficient_vlm import checks
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures.limits import Limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiled(Limited):
    """Square tiles, and a view of the whole if they are several; blank tiles may be left out.

    Attributes:
      tile: edge of a tile in pixels.
      patch: edge of an encoder patch in pixels.
      shuffle: edge of the square of patches that makes one visual token (pixel shuffle).
      skip_blank: leave out tiles whose pixels all lie within this many 8-bit steps of the tile's
        median, channel by channel; 0: only those of one colour. They enter neither the encoder nor
        the prompt, which published models never saw; the whole picture stays. Sizes cannot tell
        blank tiles, so `count`, `views` and `text` of a size are then upper bounds. None: none.
    """

    tile: int
    patch: int
    shuffle: int
    skip_blank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        checks.whole("skip_blank", self.skip_blank, 0, 255, none=True)

    @property
    def grid(self) -> int:
        """Edge of the square of visual tokens of a tile."""
        return self.tile // self.patch // self.shuffle

    def tokens(self, rows: int, columns: int) -> int:
        """Visual tokens of the tiles, and of the whole if they are several."""
        return (rows * columns + (rows * columns > 1)) * self.grid**2

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of this size."""
        raise NotImplementedError

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size; see `views` for errors."""
        return self.views(height, width)[0] * self.grid**2

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        images = self.tokens(*self.arrangement(height, width)) // self.grid**2
        return images, self.tile, self.tile

    def shown(self, tiles: list[Image.Image]) -> list[bool]:
        """Which tiles enter the encoder."""
        level = self.skip_blank
        return [level is None or not is_blank(tile, level) for tile in tiles]


def is_blank(tile: Image.Image, level: int) -> bool:
    """Whether all 8-bit pixels lie within `level` steps of the median, channel by channel."""
    # Two pixels further apart cannot both be that near; this is faster than the median.
    if any(high - low > 2 * level for low, high in tile.getextrema()):
        return False
    pixels = np.asarray(tile, np.float32)
    return bool((np.abs(pixels - np.median(pixels, axis=(0, 1))) <= level).all())


def cut(image: Image.Image, tile: int) -> list[Image.Image]:
    """The tiles of an image of whole tiles, row by row."""
    return [
        image.crop((left, top, left + tile, top + tile))
        for top in range(0, image.height, tile)
        for left in range(0, image.width, tile)
    ]


def boxes_of(rows: int, columns: int) -> list[tuple[float, float, float, float]]:
    """The boxes of the tiles of a picture, row by row, see `Pictured.boxes`."""
    return [
        (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns)
        for r in range(rows)
        for c in range(columns)
    ]
