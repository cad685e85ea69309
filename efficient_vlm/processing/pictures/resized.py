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
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple


@dataclasses.dataclass(frozen=True)
class LlavaPictures:
    """LLaVA-1.5, and every CLIP-preprocessed model with one token per patch.

    Attributes:
      size: length in pixels that the shortest edge is resized to.
      longest: most pixels of the longest edge, for which the shortest becomes shorter; None for
        any number.
      stretch: height and width that every picture is stretched to instead; None keeps the aspect.
      crop: edge in pixels of the square that the encoder sees, cut out of the middle, with black
        around it where the resized picture is smaller.
      patch: edge of an encoder patch in pixels.
      grid: edge of the square of visual tokens.
      pad: pad to a square before resizing, so that nothing is cut off.
      fill: per channel, the colour of that padding in [0, 1], which is the mean.
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
    longest: int | None = None
    stretch: tuple[int, int] | None = None
    fill: Triple = base.CLIP_MEAN
    _merge: ClassVar[int] = 1  # Edge of the square of patches that makes one visual token.

    @classmethod
    def from_hf(cls, preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """Reads the files of a checkpoint.

        `pad` follows "do_pad" of the preprocessor, or "image_aspect_ratio": "pad" of the model,
        which original (not converted) checkpoints have. "size" is read by its keys: height and
        width stretch, shortest_edge (or an integer) keeps the aspect ratio.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the published 336 pixels.
          config: content of `config.json`.

        Raises:
          UserError: a setting out of range, or one that the family does not support.
        """
        settings = reading.image_settings(preprocessor)
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        default = reading.config_setting(config, "vision_config.image_size", cls.size)
        # CLIP's own processor means another padding: of a batch's pictures to one size.
        is_clip = str(settings.get("image_processor_type")).startswith("CLIP")
        pad = bool(cls._pads(config) if is_clip else settings.get("do_pad", cls._pads(config)))
        cut = settings.get("do_center_crop", True)
        crop = reading.edge("crop_size", settings["crop_size"]) if "crop_size" in settings else None
        size = settings.get("size", crop or default)
        size = reading.lengths("size", size, square=False)
        # What the encoder sees has one size: by the crop, or because all pictures become squares.
        becomes_square = size["height"] == size["width"] if "height" in size else pad
        fixed = min(size.values()) if becomes_square else None
        crop = crop or fixed or size.get("shortest_edge") if cut else fixed
        if crop is None or set(size) == {"longest_edge"}:
            raise UserError(
                f"preprocessor: size {size}, do_center_crop {cut!r:.40}",
                allowed="equal height and width; or shortest_edge, with a centre crop or do_pad",
            )
        select = config.get("vision_feature_select_strategy", "default")
        if select not in ("default", "full"):
            raise UserError(
                f"config: vision_feature_select_strategy {select!r}",
                allowed="default (one visual token per patch), full (and one of CLS)",
            )
        patch = reading.config_setting(config, "vision_config.patch_size", cls.patch)
        return cls(
            size=size.get("shortest_edge", crop),
            longest=size.get("longest_edge"),
            stretch=(size["height"], size["width"]) if "height" in size else None,
            crop=crop,
            patch=patch,
            grid=reading.patches_along(crop, patch, multiple=cls._merge) // cls._merge,
            pad=pad,
            fill=reading.mean_std({**settings, "do_normalize": True}, cls.mean, cls.std)[0],
            resample=reading.resample_of(settings, cls.resample),
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

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture of this size is resized to, before the crop."""
        if self.stretch is not None:
            return self.stretch
        short, long, target = min(height, width), max(height, width), self.size
        if self.longest is not None and long / short * target > self.longest:
            target = self.longest * short / long
        ends = max(1, round(target)), max(1, int(target * long / short))
        if ends[0] == short:  # The published code leaves such a picture as it is.
            ends = short, long
        return (ends[0], ends[1]) if height <= width else (ends[1], ends[0])

    def __call__(self, picture: Any) -> Pictured:
        """One image [crop, crop]. For `picture` and errors see `base.load_picture`.

        Raises:
          UserError: also for a picture so elongated that it would not fit into memory resized.
        """
        image = base.load_picture(picture)
        height, width = image.height, image.width
        above = left = 0  # Of padding, in pixels of the original.
        if self.pad:
            image, above, left = pad_square(image, self.fill)
        rows, columns = self.resized(image.height, image.width)
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


def pad_square(image: Image.Image, fill: Triple) -> tuple[Image.Image, int, int]:
    """The picture in the middle of a square of one colour, given in [0, 1].

    Returns:
      The square, and its pixels above and left of the picture.

    Raises:
      UserError: a picture so elongated that the square would not fit into memory.
    """
    edge = max(image.height, image.width)
    base.check_work(image, edge, edge)
    above, left = (edge - image.height) // 2, (edge - image.width) // 2
    square = Image.new("RGB", (edge, edge), tuple(int(255 * x) for x in fill))
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

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        pan_and_scan: bool = False,
    ) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; {} means the published 896 pixels.

        Raises:
          UserError: a setting out of range, or a number of tokens that is not a square.
        """
        checks.flag("pan_and_scan", pan_and_scan)
        tokens = reading.config_setting(config, "mm_tokens_per_image", cls.grid**2)
        grid = math.isqrt(tokens)
        if grid**2 != tokens:
            raise UserError(f"config: mm_tokens_per_image {tokens}", allowed="a square number")
        shared = _stretched(cls, preprocessor, config)
        reading.patches_along(shared["size"], shared["patch"], multiple=grid)
        # "do_pan_and_scan" and the limits beside it are not read: whatever an image processor was
        # saved with, transformers' Gemma3Processor puts its class's own values (off, 256 pixels, 4
        # cuts, ratio 1.2) in their place, so that no caller of AutoProcessor has seen the file's.
        return cls(**shared, grid=grid, pan_and_scan=pan_and_scan)

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
    settings = reading.image_settings(preprocessor)
    mean, std = reading.mean_std(settings, family.mean, family.std)
    default = reading.config_setting(config, "vision_config.image_size", family.size)
    # Where an integer is a shortest edge, the picture would keep its aspect ratio: refused.
    size = settings.get("size", dict(height=default, width=default))
    size = reading.edge("size", size, square=family is Gemma3Pictures)
    if family is not Gemma3Pictures:
        reading.refuse_crop(settings, size)
    patch = reading.config_setting(config, "vision_config.patch_size", family.patch)
    reading.patches_along(size, patch)
    return dict(
        size=size,
        patch=patch,
        resample=reading.resample_of(settings, family.resample),
        mean=mean,
        std=std,
    )
