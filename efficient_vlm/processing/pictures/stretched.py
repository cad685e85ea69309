"""Families that stretch the whole picture to one square: PaliGemma and Gemma 3.

PaliGemma (arXiv 2407.07726, 2412.03555), Gemma 3 (arXiv 2503.19786).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple
from efficient_vlm.processing.pictures.limits import Limited


@dataclasses.dataclass(frozen=True)
class PaliGemmaPictures(Limited):
    """PaliGemma 1 and 2: the whole picture stretched to 224, 448 or 896, one token per patch.

    Attributes:
      size: edge in pixels of the square that the encoder sees.
      patch: edge of an encoder patch in pixels.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    size: int = 224
    patch: int = 14
    resample: int = Image.Resampling.BICUBIC
    mean: Triple = base.HALF
    std: Triple = base.HALF

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; {} means the published 224 pixels.

        Args:
          preprocessor, config: contents of those files.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: a setting out of range.
        """
        fields = reading.stretched(cls, preprocessor, config)
        return cls(**fields, max_visual_tokens=max_visual_tokens)

    @property
    def least(self) -> int:
        """Visual tokens of every picture."""
        return (self.size // self.patch) ** 2

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size, whatever it is.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return self.least

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return 1, self.size, self.size

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return "<image>" * self.count(height, width)

    def __call__(self, picture: Any) -> Pictured:
        """One image [size, size]. For `picture` and errors see `base.load_picture`.

        `text` has the visual slots only: the prompt puts them before `<bos>`.
        """
        image = base.load_picture(picture)
        grid = self.size // self.patch
        return base.pictured(
            [base.resize(image, self.size, self.size, self.resample)],
            patch=self.patch,
            grid=(grid, grid),
            text="<image>" * grid**2,
            boxes=[base.WHOLE_PICTURE],
        )


@dataclasses.dataclass(frozen=True)
class Gemma3Pictures(Limited):
    """Gemma 3: the picture stretched to 896, 64 x 64 patches averaged to 16 x 16 tokens.

    With pan and scan (section 2.1 of the report), an elongated picture is followed by up to
    `max_crops` non-overlapping cuts along its longer edge, each stretched in the same way. The
    published processor does that only for a caller who asks for it.

    Attributes:
      size: edge in pixels of the square that the encoder sees.
      patch: edge of an encoder patch in pixels.
      grid: edge of the square of visual tokens.
      pan_and_scan: add cuts of elongated pictures.
      min_crop: smallest edge in pixels of a cut; a picture with smaller cuts is not cut.
      max_crops: most cuts of a picture; at most `min_crop`.
      min_ratio: longer over shorter edge from which a picture is cut.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    size: int = 896
    patch: int = 14
    grid: int = 16
    pan_and_scan: bool = False
    min_crop: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2
    resample: int = Image.Resampling.BILINEAR
    mean: Triple = base.HALF
    std: Triple = base.HALF
    _least: ClassVar[str] = "those of the whole picture"

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        pan_and_scan: bool = False,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; {} means the published 896 pixels.

        Args:
          preprocessor, config: contents of those files.
          pan_and_scan: add cuts of elongated pictures.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: a setting out of range, or a number of tokens that is not a square.
        """
        checks.flag("pan_and_scan", pan_and_scan)
        tokens = reading.config_setting(config, "mm_tokens_per_image", cls.grid**2)
        grid = math.isqrt(tokens)
        if grid**2 != tokens:
            raise UserError(f"config: mm_tokens_per_image {tokens}", allowed="a square number")
        shared = reading.stretched(cls, preprocessor, config, square=True)
        reading.patches_along(shared["size"], shared["patch"], multiple=grid)
        # "do_pan_and_scan" and the limits beside it are not read: whatever an image processor was
        # saved with, transformers' Gemma3Processor puts its class's own values (off, 256 pixels, 4
        # cuts, ratio 1.2) in their place, so that no caller of AutoProcessor has seen the file's.
        given = dict(pan_and_scan=pan_and_scan, max_visual_tokens=max_visual_tokens)
        return cls(**shared, grid=grid, **given)

    @property
    def least(self) -> int:
        """Visual tokens of the whole picture."""
        return self.grid**2

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return (1 + self._cuts(height, width)) * self.grid**2

    def _cuts(self, height: int, width: int) -> int:
        """How many cuts pan and scan makes along the longer edge: none, or some that fit."""
        long, short = max(height, width), min(height, width)
        if not self.pan_and_scan or long / short < self.min_ratio:
            return 0
        wanted = min(math.floor(long / short + 0.5), long // self.min_crop)
        cuts = min(max(wanted, 2), self.max_crops)
        while cuts and not self.fits((1 + cuts) * self.grid**2):
            cuts = cuts - 1 if cuts > 2 else 0
        return cuts if cuts and min(math.ceil(long / cuts), short) >= self.min_crop else 0

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return 1 + self._cuts(height, width), self.size, self.size

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        base.check_size(height, width)
        one = "<image_soft_token>" * self.grid**2
        one = f"\n\n<start_of_image>{one}<end_of_image>\n\n"
        cuts = self._cuts(height, width)
        if not cuts:
            return one
        crops = " ".join([one] * cuts)
        seen = f"Here is the original image {one} and here are some crops "
        return f"{seen}to help you see better {crops}"

    def __call__(self, picture: Any) -> Pictured:
        """The whole picture, then its cuts, each [size, size]. See `base.load_picture`.

        `text` replaces `<start_of_image>` in the prompt.
        """
        image = base.load_picture(picture)
        height, width = image.height, image.width
        cuts = self._cuts(height, width)
        step = math.ceil(max(height, width) / max(cuts, 1))
        edges = [(0, 0, height, width)]
        for start in range(0, cuts * step, step):
            end = min(start + step, max(height, width))
            edges.append((0, start, height, end) if width >= height else (start, 0, end, width))
        views = [image.crop((left, top, right, low)) for top, left, low, right in edges]
        return base.pictured(
            [base.resize(view, self.size, self.size, self.resample) for view in views],
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=self.text(height, width),
            boxes=[
                (top / height, left / width, low / height, right / width)
                for top, left, low, right in edges
            ],
        )
