"""Families that take pictures near their own size: Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Both edges are rounded to whole visual tokens (Qwen2-VL, arXiv 2409.12191, section 2.1), and a
picture outside min_pixels..max_pixels is scaled into that range first. The number of visual tokens
is the resized area over the area of one token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm.errors import UserError
from efficient_vlm.processing.decode_image import MAX_PIXELS
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple
from efficient_vlm.processing.pictures.limits import Limited

# The published limit on the longer over the shorter edge.
MAX_ASPECT = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width in whole multiples of `factor`, with the area within the limits.

    Edges are rounded to the nearest multiple (halves to even). If the area is then too large, both
    are scaled by sqrt(max_pixels / area) and rounded down, to one multiple at least; if it is too
    small, by sqrt(min_pixels / area) and rounded up.

    Args:
      height: pixels.
      width: pixels.
      factor: edge of a visual token in pixels.
      min_pixels: smallest area.
      max_pixels: largest area; exceeded only where an edge is already a single `factor`.

    Raises:
      UserError: one edge is more than 200 times the other, or there are no pixels or too many.
    """
    base.check_size(height, width)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"picture: {width} x {height} pixels",
            allowed=f"one edge at most {MAX_ASPECT} times the other",
            fix="crop or pad the picture",
        )
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor**2
    if area > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / scale / factor))
        columns = max(1, math.floor(width / scale / factor))
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor)
        columns = math.ceil(width * scale / factor)
    return rows * factor, columns * factor


def most_within(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of the largest grid that fits: both edges at one scale, rounded down.

    That is what `smart_resize` makes of a picture that is too large, at the scale that leaves the
    most. A picture whose single row or column would be too long is squeezed to `tokens` cells.

    Args:
      height, width: of the picture.
      tokens: the most cells of the grid, 1 or more.
    """
    short, long = min(height, width), max(height, width)
    few = max(
        (n for n in range(1, math.isqrt(tokens) + 1) if n * (long * n // short) <= tokens),
        default=1,
    )
    # As the picture grows, the longer edge gains cells until the shorter one has its next.
    many = min(tokens // few, (long * (few + 1) - 1) // short)
    return (few, many) if height <= width else (many, few)


@dataclasses.dataclass(frozen=True)
class Qwen2VLPictures(Limited):
    """Qwen2-VL and Qwen2.5-VL: 28 x 28 pixels per visual token.

    Attributes:
      patch: edge of an encoder patch in pixels.
      merge: edge of the square of patches that makes one visual token.
      min_pixels: smallest area after resizing.
      max_pixels: largest area after resizing.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    resample: int = Image.Resampling.BICUBIC
    mean: Triple = base.CLIP_MEAN
    std: Triple = base.CLIP_STD
    _least: ClassVar[str] = "those of min_pixels"

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads the files of a checkpoint.

        "min_pixels" and "max_pixels" take precedence over "shortest_edge" and "longest_edge" of
        "size", which are areas in pixels too, not edges.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the class defaults above.
          config: content of `config.json`.
          min_pixels: smallest area instead of the file's.
          max_pixels: largest area instead of the file's, which may allow 16,384 visual tokens.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: a setting out of range.
        """
        settings = reading.image_settings(preprocessor)
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        size = settings.get("size")
        names = {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
        if not isinstance(size, Mapping | None) or set(size or ()) - names:
            raise UserError(
                f"preprocessor: size {size!r:.80}",
                allowed="a mapping with shortest_edge and longest_edge, both areas in pixels",
            )

        def area(argument: int | None, name: str, edge: str, default: int) -> int:
            if argument is None:
                argument = settings.get(name)
            if argument is None and size is not None:
                argument = size.get(edge, size.get(name))
                if argument is None:  # The class's default is that of a size as a whole.
                    raise UserError(
                        f"preprocessor: size {dict(size)!r:.80}, no {edge}",
                        allowed="a mapping with shortest_edge and longest_edge",
                        fix=f"add {edge} or {name}, an area in pixels",
                    )
            if isinstance(argument, float) and argument.is_integer():  # JSON's 1e6.
                argument = int(argument)
            return reading.whole(name, default if argument is None else argument, high=MAX_PIXELS)

        least = area(min_pixels, "min_pixels", "shortest_edge", cls.min_pixels)
        most = area(max_pixels, "max_pixels", "longest_edge", cls.max_pixels)
        if least > most:
            raise UserError(
                f"max_pixels: {most}",
                allowed=f"min_pixels ({least}) or more",
                fix="raise max_pixels or lower min_pixels",
            )
        patch = reading.config_setting(config, "vision_config.patch_size", cls.patch)
        merge = reading.config_setting(config, "vision_config.spatial_merge_size", cls.merge)
        return cls(
            patch=reading.whole("patch_size", settings.get("patch_size", patch)),
            merge=reading.whole("merge_size", settings.get("merge_size", merge)),
            min_pixels=least,
            max_pixels=most,
            resample=reading.resample_of(settings, cls.resample),
            mean=mean,
            std=std,
            max_visual_tokens=max_visual_tokens,
        )

    @property
    def least(self) -> int:
        """Visual tokens of `min_pixels`, rounded up."""
        return math.ceil(self.min_pixels / (self.patch * self.merge) ** 2)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; see `smart_resize` for errors."""
        token = self.patch * self.merge
        limits = dict(min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        size = smart_resize(height, width, factor=token, **limits)
        if self.fits(math.prod(size) // token**2):
            return size
        rows, columns = most_within(height, width, self.max_visual_tokens)
        return rows * token, columns * token

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size; see `smart_resize` for errors."""
        rows, columns = self.size(height, width)
        return rows * columns // (self.patch * self.merge) ** 2

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """One image of its resized height and width; see `smart_resize` for errors."""
        return 1, *self.size(height, width)

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return "<|image_pad|>" * self.count(height, width)

    def __call__(self, picture: Any) -> Pictured:
        """One image. For `picture` and errors see `base.load_picture` and `smart_resize`.

        `text` replaces `<|image_pad|>`: the prompt itself has `<|vision_start|>` before it and
        `<|vision_end|>` after it.
        """
        image = base.load_picture(picture)
        height, width = self.size(image.height, image.width)
        token = self.patch * self.merge
        grid = (height // token, width // token)
        return base.pictured(
            [base.resize(image, height, width, self.resample)],
            patch=self.patch,
            grid=grid,
            text="<|image_pad|>" * (grid[0] * grid[1]),
            boxes=[base.WHOLE_PICTURE],
        )


@dataclasses.dataclass(frozen=True)
class Qwen3VLPictures(Qwen2VLPictures):
    """Qwen3-VL: 32 x 32 pixels per visual token, and other defaults."""

    patch: int = 16
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    mean: Triple = base.HALF
    std: Triple = base.HALF
