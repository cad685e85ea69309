"""InternVL 2.5 and 3 (arXiv 2404.16821, section 3.2).

A picture becomes the arrangement of at most 12 tiles with the nearest aspect ratio.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base, tiles
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class InternVLPictures(tiles.Tiled):
    """InternVL 2.5 and 3: the nearest arrangement of tiles, then the whole if it has several.

    Attributes:
      tile: edge of a tile in pixels.
      patch: edge of an encoder patch in pixels.
      shuffle: edge of the square of patches that makes one visual token (pixel shuffle).
      min_tiles: fewest tiles, the whole not counted.
      max_tiles: most tiles, the whole not counted; 1: only the whole picture.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    tile: int = 448
    patch: int = 14
    shuffle: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    resample: int = Image.Resampling.BICUBIC
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    _least: ClassVar[str] = "the fewest tiles"

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_tiles: int | None = None,
        **limits: int | None,
    ) -> Self:
        """Reads the files of a checkpoint.

        "crop_to_patches" is ignored: the released files say false, but the model's own processor
        cuts tiles regardless.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the published 448 pixels.
          config: content of `config.json`.
          max_tiles: instead of the file's "max_patches".
          **limits: `max_visual_tokens` and `skip_blank`, see `tiles.Tiled`.

        Raises:
          UserError: a setting out of range, or tiles that do not make whole visual tokens.
        """
        settings = reading.image_settings(preprocessor)
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        default = reading.config_setting(config, "vision_config.image_size", cls.tile)
        tile = reading.edge("size", settings.get("size", default))
        patch = reading.config_setting(config, "vision_config.patch_size", cls.patch)
        ratio = config.get("downsample_ratio", 1 / cls.shuffle)
        shuffle = round(1 / ratio) if isinstance(ratio, int | float) and 0 < ratio <= 1 else 0
        if not shuffle or abs(shuffle * ratio - 1) > 1e-6:
            raise UserError(
                f"config: downsample_ratio {short(ratio)}", allowed="0.5, or another 1/n"
            )
        reading.patches_along(tile, patch, multiple=shuffle)
        if max_tiles is None:
            max_tiles = settings.get("max_patches", cls.max_tiles)
        max_tiles = reading.whole("max_patches", max_tiles, high=256)
        least = settings.get("min_patches", cls.min_tiles)
        return cls(
            tile=tile,
            patch=patch,
            shuffle=shuffle,
            min_tiles=reading.whole("min_patches", least, high=max_tiles),
            max_tiles=max_tiles,
            resample=reading.resample_of(settings, cls.resample),
            mean=mean,
            std=std,
            **limits,
        )

    @property
    def least(self) -> int:
        """Visual tokens of the fewest tiles, and of the whole if they are several."""
        return self.tokens(1, self.min_tiles)

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of this size.

        Of those that fit, the arrangement with the nearest aspect ratio; of several equally near
        ones, the largest that the picture fills to more than half.
        """
        options = sorted(
            (
                (rows, columns)
                for columns in range(1, self.max_tiles + 1)
                for rows in range(1, self.max_tiles // columns + 1)
                if rows * columns >= self.min_tiles and self.fits(self.tokens(rows, columns))
            ),
            key=lambda option: option[0] * option[1],
        )
        best, nearest = (1, 1), math.inf
        for rows, columns in options:
            distance = abs(width / height - columns / rows)
            filled = height * width > 0.5 * self.tile**2 * rows * columns
            if distance < nearest or (distance == nearest and filled):
                best, nearest = (rows, columns), distance
        return best

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return self._text(self.views(height, width)[0])

    def _text(self, images: int) -> str:
        return f"<img>{'<IMG_CONTEXT>' * (images * self.grid**2)}</img>"

    def __call__(self, picture: Any) -> Pictured:
        """Tiles [tile, tile] row by row, the whole picture last. See `base.load_picture`.

        `text` replaces `<IMG_CONTEXT>` (`<image>` in older prompts).
        """
        image = base.load_picture(picture)
        rows, columns = self.arrangement(image.height, image.width)
        canvas = base.resize(image, rows * self.tile, columns * self.tile, self.resample)
        views, boxes = tiles.cut(canvas, self.tile), tiles.boxes_of(rows, columns)
        if len(views) > 1:
            shown = [*self.shown(views), True]
            views.append(base.resize(image, self.tile, self.tile, self.resample))
            boxes.append(base.WHOLE_PICTURE)
            views, boxes = (list(itertools.compress(part, shown)) for part in (views, boxes))
        return base.pictured(
            views,
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=self._text(len(views)),
            boxes=boxes,
        )
