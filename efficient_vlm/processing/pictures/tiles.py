"""Families that cut a picture into tiles and add a small view of the whole.

SmolVLM (arXiv 2504.05299), SmolVLM2 and Idefics3 (arXiv 2408.12637) scale every picture, even a
small one, to a fixed length and cut it into square tiles. InternVL (arXiv 2404.16821, section 3.2)
chooses the arrangement of at most 12 tiles with the nearest aspect ratio. Neither keeps the ratio
exactly: the picture is stretched to whole tiles, so no tile has padding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from PIL import Image

from efficient_vlm import checks
from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple

# No resized edge exceeds this, whatever size.longest_edge says.
SMOLVLM_MAX_EDGE = 4096
# The tokenizers know <row_1_col_1> to <row_6_col_6>.
SMOLVLM_MAX_TILES = 6
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _cut(image: Image.Image, tile: int) -> list[Image.Image]:
    """The tiles of an image of whole tiles, row by row."""
    return [
        image.crop((left, top, left + tile, top + tile))
        for top in range(0, image.height, tile)
        for left in range(0, image.width, tile)
    ]


def _boxes(rows: int, columns: int) -> list[tuple[float, float, float, float]]:
    """The boxes of the tiles of a picture, row by row, see `Pictured.boxes`."""
    return [
        (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns)
        for r in range(rows)
        for c in range(columns)
    ]


def _longest(field: str, value: Any) -> int:
    """The longest edge of a size, beside which a shortest one counts for nothing."""
    found = reading.lengths(field, value, square=False)
    if "longest_edge" not in found and isinstance(value, Mapping):
        raise UserError(f"config: {field} {found}", allowed="longest_edge")
    return found.get("longest_edge") or found["shortest_edge"]


@dataclasses.dataclass(frozen=True)
class SmolVLMPictures:
    """SmolVLM, SmolVLM2 and Idefics3: tiles row by row, then the whole picture as one tile.

    Attributes:
      longest: length in pixels that the longer edge is scaled to, up or down.
      stretch: height and width that every picture is stretched to instead; None keeps the aspect.
      tile: edge of a tile in pixels; at most 6 tiles along an edge.
      patch: edge of an encoder patch in pixels.
      shuffle: edge of the square of patches that makes one visual token (pixel shuffle).
      split: False: only the whole picture as one tile.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    longest: int = 2048
    tile: int = 512
    patch: int = 16
    shuffle: int = 4
    split: bool = True
    resample: int = Image.Resampling.LANCZOS
    mean: Triple = base.HALF
    std: Triple = base.HALF
    stretch: tuple[int, int] | None = None

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        split: bool | None = None,
    ) -> Self:
        """Reads the files of a checkpoint.

        Args:
          preprocessor: content of `preprocessor_config.json`; without sizes, tiles are as large as
            the encoder's images and the longer edge has four of them.
          config: content of `config.json`; {}: that of SmolVLM-256M and 500M.
          split: instead of the file's "do_image_splitting".

        Raises:
          UserError: a setting out of range, more tiles than the tokenizer can name, or tiles that
            do not make whole visual tokens.
        """
        settings = reading.image_settings(preprocessor)
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        default = reading.config_setting(config, "vision_config.image_size", cls.tile)
        tile = _longest(
            "max_image_size", settings.get("max_image_size", dict(longest_edge=default))
        )
        size = settings.get("size", dict(longest_edge=4 * tile))
        size = reading.lengths("size", size)
        stretch = (size["height"], size["width"]) if "height" in size else None
        longest = max(stretch) if stretch else _longest("size", size)
        if math.ceil(min(longest, SMOLVLM_MAX_EDGE) / tile) > SMOLVLM_MAX_TILES:
            raise UserError(
                f"preprocessor: size {size} with tiles of {tile}",
                allowed=f"{SMOLVLM_MAX_TILES * tile} or less: the tokenizer names "
                f"{SMOLVLM_MAX_TILES} tiles along an edge",
            )
        patch = reading.config_setting(config, "vision_config.patch_size", cls.patch)
        # The default of the configuration class, which files omit.
        shuffle = reading.config_setting(config, "scale_factor", 2 if config else cls.shuffle)
        reading.patches_along(tile, patch, multiple=shuffle)
        if split is None:
            split = bool(settings.get("do_image_splitting", cls.split))
        checks.flag("split", split)
        return cls(
            longest=longest,
            stretch=stretch,
            tile=tile,
            patch=patch,
            shuffle=shuffle,
            split=split,
            resample=reading.resample_of(settings, cls.resample),
            mean=mean,
            std=std,
        )

    @property
    def grid(self) -> int:
        """Edge of the square of visual tokens of a tile."""
        return self.tile // self.patch // self.shuffle

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Size after scaling the longer edge; the shorter is rounded down, then up to even."""
        if self.stretch is not None:
            return self.stretch
        # Another order of divisions would round differently from the published code by a pixel.
        aspect = width / height
        if width >= height:
            height, width = int(self.longest / aspect), self.longest
            height += height % 2
        else:
            height, width = self.longest, int(self.longest * aspect)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        aspect = width / height
        if max(height, width) > SMOLVLM_MAX_EDGE:
            if width >= height:
                height, width = int(SMOLVLM_MAX_EDGE / aspect), SMOLVLM_MAX_EDGE
            else:
                height, width = SMOLVLM_MAX_EDGE, int(SMOLVLM_MAX_EDGE * aspect)
        return max(height, 1), max(width, 1)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for a scaled picture: the longer edge is rounded up first."""
        aspect = width / height
        if width >= height:
            columns = math.ceil(width / self.tile)
            rows = math.ceil(int(columns * self.tile / aspect) / self.tile)
        else:
            rows = math.ceil(height / self.tile)
            columns = math.ceil(int(rows * self.tile * aspect) / self.tile)
        return max(rows, 1), max(columns, 1)

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size; see `views` for errors."""
        return self.views(height, width)[0] * self.grid**2

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        tiles = 1
        if self.split:
            rows, columns = self._tiles(*self._scaled(height, width))
            tiles = rows * columns + (rows * columns > 1)
        return tiles, self.tile, self.tile

    def __call__(self, picture: Any) -> Pictured:
        """Tiles [tile, tile] row by row, the whole picture last. See `base.load_picture`.

        `text` replaces `<image>`: a line per row of tiles, an empty line, the whole.
        """
        image = base.load_picture(picture)
        image = base.resize(image, *self._scaled(image.height, image.width), self.resample)
        rows = columns = 1
        if self.split:
            rows, columns = self._tiles(image.height, image.width)
            image = base.resize(image, rows * self.tile, columns * self.tile, self.resample)
        views = _cut(image, self.tile) if rows * columns > 1 else []
        boxes = _boxes(rows, columns) if views else []
        views.append(base.resize(image, self.tile, self.tile, self.resample))
        boxes.append(base.WHOLE_PICTURE)
        return base.pictured(
            views,
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=self._text(rows, columns),
            boxes=boxes,
        )

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        base.check_size(height, width)
        tiles = self._tiles(*self._scaled(height, width)) if self.split else (1, 1)
        return self._text(*tiles)

    def _text(self, rows: int, columns: int) -> str:
        slots = "<image>" * self.grid**2
        whole = f"<fake_token_around_image><global-img>{slots}<fake_token_around_image>"
        if rows * columns == 1:
            return whole
        lines = [
            "".join(
                f"<fake_token_around_image><row_{r}_col_{c}>{slots}" for c in range(1, columns + 1)
            )
            for r in range(1, rows + 1)
        ]
        return "\n".join([*lines, "", whole])


@dataclasses.dataclass(frozen=True)
class InternVLPictures:
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

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_tiles: int | None = None,
    ) -> Self:
        """Reads the files of a checkpoint.

        "crop_to_patches" is ignored: the released files say false, but the model's own processor
        cuts tiles regardless.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the published 448 pixels.
          config: content of `config.json`.
          max_tiles: instead of the file's "max_patches".

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
        )

    @property
    def grid(self) -> int:
        """Edge of the square of visual tokens of a tile."""
        return self.tile // self.patch // self.shuffle

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of this size.

        The arrangement with the nearest aspect ratio; of several equally near ones, the largest
        that the picture fills to more than half.
        """
        options = sorted(
            (
                (rows, columns)
                for columns in range(1, self.max_tiles + 1)
                for rows in range(1, self.max_tiles // columns + 1)
                if rows * columns >= self.min_tiles
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

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size; see `views` for errors."""
        return self.views(height, width)[0] * self.grid**2

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        rows, columns = self.arrangement(height, width)
        return rows * columns + (rows * columns > 1), self.tile, self.tile

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return f"<img>{'<IMG_CONTEXT>' * self.count(height, width)}</img>"

    def __call__(self, picture: Any) -> Pictured:
        """Tiles [tile, tile] row by row, the whole picture last. See `base.load_picture`.

        `text` replaces `<IMG_CONTEXT>` (`<image>` in older prompts).
        """
        image = base.load_picture(picture)
        rows, columns = self.arrangement(image.height, image.width)
        canvas = base.resize(image, rows * self.tile, columns * self.tile, self.resample)
        views, boxes = _cut(canvas, self.tile), _boxes(rows, columns)
        if len(views) > 1:
            views.append(base.resize(image, self.tile, self.tile, self.resample))
            boxes.append(base.WHOLE_PICTURE)
        return base.pictured(
            views,
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=self.text(image.height, image.width),
            boxes=boxes,
        )
