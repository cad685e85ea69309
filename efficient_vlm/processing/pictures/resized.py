"""Families whose encoder sees one fixed square: LLaVA-1.5, MobileVLM, PaliGemma, Gemma 3.

LLaVA-1.5 (arXiv 2310.03744) and MobileVLM (arXiv 2312.16886, 2402.03766) keep the aspect ratio:
either the shortest edge is resized and the centre is cut out (CLIP's own preprocessing), or the
picture is first padded to a square with the mean colour. PaliGemma (arXiv 2407.07726, 2412.03555)
and Gemma 3 (arXiv 2503.19786) stretch the whole picture to the square.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures.base import Pictured, Triple


@dataclasses.dataclass(frozen=True)
class LlavaPictures:
    """LLaVA-1.5, and every CLIP-preprocessed model with one token per patch.

    Attributes:
      size: length in pixels that the shortest edge is resized to.
      crop: edge in pixels of the square that the encoder sees; at most `size`.
      patch: edge of an encoder patch in pixels.
      grid: edge of the square of visual tokens.
      pad: pad to a square with the mean colour before resizing, so that nothing is cut off.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
      class_feature: whether the CLS token is a visual token as well, before the others.
    """

    size: int = 336
    crop: int = 336
    patch: int = 14
    grid: int = 24
    pad: bool = False
    resample: int = Image.Resampling.BICUBIC
    mean: Triple = base.CLIP_MEAN
    std: Triple = base.CLIP_STD
    class_feature: bool = False
    _merge: ClassVar[int] = 1  # Edge of the square of patches that makes one visual token.

    @classmethod
    def from_hf(cls, preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """Reads the files of a checkpoint.

        `pad` follows "do_pad" of the preprocessor, or "image_aspect_ratio": "pad" of the model,
        which original (not converted) checkpoints have.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the published 336 pixels.
          config: content of `config.json`.

        Raises:
          UserError: a setting out of range, or one that the family does not support.
        """
        settings = base.image_settings(preprocessor)
        mean, std = base.mean_std(settings, cls.mean, cls.std)
        default = base.config_setting(config, "vision_config.image_size", cls.size)
        size = base.edge("size", settings.get("size", settings.get("crop_size", default)))
        crop = base.edge("crop_size", settings.get("crop_size", size))
        if settings.get("do_center_crop") is False or crop > size:
            raise UserError(
                f"preprocessor: crop_size {crop}, size {size}, do_center_crop "
                f"{settings.get('do_center_crop')}",
                allowed="a centre crop within the resized picture",
            )
        select = config.get("vision_feature_select_strategy", "default")
        if select not in ("default", "full"):
            raise UserError(
                f"config: vision_feature_select_strategy {select!r}",
                allowed="default (one visual token per patch), full (and one of CLS)",
            )
        patch = base.config_setting(config, "vision_config.patch_size", cls.patch)
        return cls(
            size=size,
            crop=crop,
            patch=patch,
            grid=base.patches_along(crop, patch, multiple=cls._merge) // cls._merge,
            pad=bool(settings.get("do_pad", cls._pads(config))),
            resample=base.resample_of(settings, cls.resample),
            mean=mean,
            std=std,
            class_feature=select == "full",
        )

    @staticmethod
    def _pads(config: Mapping[str, Any]) -> bool:
        return config.get("image_aspect_ratio") == "pad"

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size, whatever it is.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return self.grid**2 + self.class_feature

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return 1, self.crop, self.crop

    def __call__(self, picture: Any) -> Pictured:
        """One image [crop, crop]. For `picture` and errors see `base.load_picture`.

        Raises:
          UserError: also for a picture so elongated that it would not fit into memory resized.
        """
        image = base.load_picture(picture)
        height, width = image.height, image.width
        above = left = 0  # Of padding, in pixels of the original.
        if self.pad:
            image, above, left = pad_square(image, self.mean)
        short = min(image.height, image.width)
        rows, columns = (int(self.size * edge / short) for edge in (image.height, image.width))
        resized = base.resize(image, rows, columns, self.resample)
        top, start = (rows - self.crop) // 2, (columns - self.crop) // 2
        shown = resized.crop((start, top, start + self.crop, top + self.crop))
        down, across = image.height / rows, image.width / columns
        tokens = self.count(height, width)
        return base.pictured(
            [shown],
            patch=self.patch,
            # With CLS the tokens do not form a square: one row.
            grid=(1, tokens) if self.class_feature else (self.grid, self.grid),
            text="<image>" * tokens,
            boxes=[
                (
                    (top * down - above) / height,
                    (start * across - left) / width,
                    ((top + self.crop) * down - above) / height,
                    ((start + self.crop) * across - left) / width,
                )
            ],
        )


def pad_square(image: Image.Image, mean: Triple) -> tuple[Image.Image, int, int]:
    """The picture in the middle of a square of the mean colour.

    Returns:
      The square, and its pixels above and left of the picture.

    Raises:
      UserError: a picture so elongated that the square would not fit into memory.
    """
    edge = max(image.height, image.width)
    base.check_work(image, edge, edge)
    above, left = (edge - image.height) // 2, (edge - image.width) // 2
    square = Image.new("RGB", (edge, edge), tuple(int(255 * x) for x in mean))
    square.paste(image, (left, above))
    return square, above, left


@dataclasses.dataclass(frozen=True)
class MobileVLMPictures(LlavaPictures):
    """MobileVLM V1 and V2: as LLaVA, padded, and 24 x 24 patches become 12 x 12 tokens."""

    grid: int = 12
    pad: bool = True

    _merge: ClassVar[int] = 2

    @staticmethod
    def _pads(config: Mapping[str, Any]) -> bool:
        return config.get("image_aspect_ratio", "pad") == "pad"


@dataclasses.dataclass(frozen=True)
class PaliGemmaPictures:
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
    def from_hf(cls, preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; {} means the published 224 pixels.

        Raises:
          UserError: a setting out of range.
        """
        return cls(**_stretched(cls, preprocessor, config))

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size, whatever it is.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return (self.size // self.patch) ** 2

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return 1, self.size, self.size

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
class Gemma3Pictures:
    """Gemma 3: the picture stretched to 896, 64 x 64 patches averaged to 16 x 16 tokens.

    With pan and scan (section 2.1 of the report), an elongated picture is followed by up to
    `max_crops` non-overlapping cuts along its longer edge, each stretched in the same way.

    Attributes:
      size: edge in pixels of the square that the encoder sees.
      patch: edge of an encoder patch in pixels.
      grid: edge of the square of visual tokens.
      pan_and_scan: add cuts of elongated pictures; off in the released files.
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

    @classmethod
    def from_hf(cls, preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; {} means the published 896 pixels.

        Raises:
          UserError: a setting out of range, or a number of tokens that is not a square.
        """
        settings = base.image_settings(preprocessor)
        tokens = base.config_setting(config, "mm_tokens_per_image", cls.grid**2)
        grid = math.isqrt(tokens)
        if grid**2 != tokens:
            raise UserError(f"config: mm_tokens_per_image {tokens}", allowed="a square number")
        ratio = settings.get("pan_and_scan_min_ratio_to_activate", cls.min_ratio)
        checks.number("preprocessor: pan_and_scan_min_ratio_to_activate", ratio, 1)
        shared = _stretched(cls, preprocessor, config)
        base.patches_along(shared["size"], shared["patch"], multiple=grid)
        min_crop = base.whole(
            "pan_and_scan_min_crop_size", settings.get("pan_and_scan_min_crop_size", cls.min_crop)
        )
        return cls(
            **shared,
            grid=grid,
            pan_and_scan=bool(settings.get("do_pan_and_scan", cls.pan_and_scan)),
            min_crop=min_crop,
            # At most as many cuts as pixels in one, or rounding up could leave the last one empty.
            max_crops=base.whole(
                "pan_and_scan_max_num_crops",
                settings.get("pan_and_scan_max_num_crops", cls.max_crops),
                high=min_crop,
            ),
            min_ratio=float(ratio),
        )

    def count(self, height: int, width: int) -> int:
        """Visual tokens of a picture of this size.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return (1 + self._cuts(height, width)) * self.grid**2

    def _cuts(self, height: int, width: int) -> int:
        """How many cuts pan and scan makes along the longer edge; 0 for none."""
        long, short = max(height, width), min(height, width)
        if not self.pan_and_scan or long / short < self.min_ratio:
            return 0
        wanted = min(math.floor(long / short + 0.5), long // self.min_crop)
        cuts = min(max(wanted, 2), self.max_crops)
        return cuts if min(math.ceil(long / cuts), short) >= self.min_crop else 0

    def views(self, height: int, width: int) -> tuple[int, int, int]:
        """How many images a picture of this size becomes, and their height and width in pixels.

        Raises:
          UserError: no pixels or too many.
        """
        base.check_size(height, width)
        return 1 + self._cuts(height, width), self.size, self.size

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
        one = "<image_soft_token>" * self.grid**2
        one = f"\n\n<start_of_image>{one}<end_of_image>\n\n"
        text = one
        if cuts:
            crops = " ".join([one] * cuts)
            text = f"Here is the original image {one} and here are some crops "
            text += f"to help you see better {crops}"
        return base.pictured(
            [base.resize(view, self.size, self.size, self.resample) for view in views],
            patch=self.patch,
            grid=(self.grid, self.grid),
            text=text,
            boxes=[
                (top / height, left / width, low / height, right / width)
                for top, left, low, right in edges
            ],
        )


def _stretched(
    family: Any, preprocessor: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that PaliGemma and Gemma 3 share, with the defaults of `family`."""
    settings = base.image_settings(preprocessor)
    mean, std = base.mean_std(settings, family.mean, family.std)
    default = base.config_setting(config, "vision_config.image_size", family.size)
    size = base.edge("size", settings.get("size", default))
    patch = base.config_setting(config, "vision_config.patch_size", family.patch)
    base.patches_along(size, patch)
    return dict(
        size=size,
        patch=patch,
        resample=base.resample_of(settings, family.resample),
        mean=mean,
        std=std,
    )
