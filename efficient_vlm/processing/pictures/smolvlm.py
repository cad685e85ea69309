"""SmolVLM (arXiv 2504.05299), SmolVLM2 and Idefics3 (arXiv 2408.12637).

Every picture, even a small one, is scaled to a fixed length and cut into square tiles.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures import base, tiles
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple

# No resized edge exceeds this, whatever size.longest_edge says.
SMOLVLM_MAX_EDGE = 4096
# The tokenizers know <row_1_col_1> to <row_6_col_6>.
SMOLVLM_MAX_TILES = 6


def _longest(field: str, value: Any) -> int:
    """The longest edge of a size, beside which a shortest one counts for nothing."""
    found = reading.lengths(field, value, square=False)
    if "longest_edge" not in found and isinstance(value, Mapping):
        raise UserError(f"config: {field} {found}", allowed="longest_edge")
    return found.get("longest_edge") or found["shortest_edge"]


@dataclasses.dataclass(frozen=True)
class SmolVLMPictures(tiles.Tiled):
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
    _least: ClassVar[str] = "the whole picture as one tile"

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        split: bool | None = None,
        **limits: int | None,
    ) -> Self:
        """Reads the files of a checkpoint.

        Args:
          preprocessor: content of `preprocessor_config.json`; without sizes, tiles are as large as
            the encoder's images and the longer edge has four of them.
          config: content of `config.json`; {}: that of SmolVLM-256M and 500M.
          split: instead of the file's "do_image_splitting".
          **limits: `max_visual_tokens` and `skip_blank`, see `tiles.Tiled`.

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
            **limits,
        )

    @property
    def least(self) -> int:
        """Visual tokens of one tile."""
        return self.grid**2

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Size after scaling: the published one, or the largest that fits of those with a whole
        number of tiles along the longer edge."""
        if self.stretch is not None:
            height, width = scaled = self.stretch
        else:
            scaled = _scale(height, width, self.longest)
        along = math.ceil(max(scaled) / self.tile)
        while self.split and not self.fits(self.tokens(*self._tiles(*scaled))):
            along -= 1  # One tile always fits, see `least`.
            rows, columns = _scale(height, width, along * self.tile)
            # Rounding up to even edges must not begin another tile.
            scaled = min(rows, along * self.tile), min(columns, along * self.tile)
        return scaled

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

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        return self._tiles(*self._scaled(height, width)) if self.split else (1, 1)

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
        views = tiles.cut(image, self.tile) if rows * columns > 1 else []
        shown = self.shown(views)
        boxes = tiles.boxes_of(rows, columns) if views else []
        whole = base.resize(image, self.tile, self.tile, self.resample)
        return base.pictured(
            [*itertools.compress(views, shown), whole],
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=self._text(rows, columns, shown),
            boxes=[*itertools.compress(boxes, shown), base.WHOLE_PICTURE],
        )

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        base.check_size(height, width)
        rows, columns = self.arrangement(height, width)
        return self._text(rows, columns, [rows * columns > 1] * (rows * columns))

    def _text(self, rows: int, columns: int, shown: Sequence[bool]) -> str:
        """A line for each row of tiles of which any is shown."""
        slots = "<image>" * self.grid**2
        whole = f"<fake_token_around_image><global-img>{slots}<fake_token_around_image>"
        lines = []
        for r in range(rows):
            its = itertools.compress(range(columns), shown[r * columns : (r + 1) * columns])
            names = (f"<fake_token_around_image><row_{r + 1}_col_{c + 1}>{slots}" for c in its)
            lines.append("".join(names))
        lines = [line for line in lines if line]
        return "\n".join([*lines, "", whole]) if lines else whole


def _scale(height: int, width: int, longest: int) -> tuple[int, int]:
    """Scales the longer edge to `longest`; the shorter is rounded down, then up to even."""
    # Another order of divisions would round differently from the published code by a pixel.
    aspect = width / height
    if width >= height:
        height, width = int(longest / aspect), longest
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if max(height, width) > SMOLVLM_MAX_EDGE:
        if width >= height:
            height, width = int(SMOLVLM_MAX_EDGE / aspect), SMOLVLM_MAX_EDGE
        else:
            height, width = SMOLVLM_MAX_EDGE, int(SMOLVLM_MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)
