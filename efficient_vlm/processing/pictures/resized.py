"""Families whose pictures are resized as CLIP's are: LLaVA-1.5 and MobileVLM.

LLaVA-1.5 (arXiv 2310.03744) and MobileVLM (arXiv 2312.16886, 2402.03766) keep the aspect ratio:
either the shortest edge is resized and the centre is cut out (CLIP's own preprocessing), or the
picture is first padded to a square with the mean colour.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL import Image

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple
from efficient_vlm.processing.pictures.limits import Limited


@dataclasses.dataclass(frozen=True)
class LlavaPictures(Limited):
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
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads the files of a checkpoint.

        `pad` follows "do_pad" of the preprocessor, or "image_aspect_ratio": "pad" of the model,
        which original (not converted) checkpoints have. "size" is read by its keys: height and
        width stretch, shortest_edge (or an integer) keeps the aspect ratio.

        Args:
          preprocessor: content of `preprocessor_config.json`; {}: the published 336 pixels.
          config: content of `config.json`.
          max_visual_tokens: see `Limited`.

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
                f"config: vision_feature_select_strategy {short(select)}",
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
            max_visual_tokens=max_visual_tokens,
        )

    @staticmethod
    def _pads(config: Mapping[str, Any]) -> bool:
        return config.get("image_aspect_ratio") == "pad"

    @property
    def least(self) -> int:
        """Visual tokens of every picture."""
        return self.grid**2 + self.class_feature

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
        return 1, self.crop, self.crop

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return "<image>" * self.count(height, width)

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
