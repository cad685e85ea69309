"""Pictures for Molmo and Molmo2: one view of the whole and up to 12 (Molmo2: 8) overlapping crops.

`overlap` has the geometry of the crops. Source: Deitke et al. 2024, "Molmo and PixMo", section 2,
and the behaviour of the released preprocessors; Molmo2 (December 2025).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from PIL import Image

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base, overlap
from efficient_vlm.processing.pictures import settings as reading


@dataclasses.dataclass(frozen=True)
class Molmo(overlap.Overlapping):
    """Molmo 7B-D, 7B-O, 72B and MolmoE-1B.

    The picture keeps its aspect and is centred on black: padding is 0 before normalisation, hence
    -mean / std = (-1.79, -1.75, -1.48) for the encoder, not 0.

    Attributes:
      padding_mask: whether the result has `padding_share`. Its rows are shifted by one, as in the
        released code, with which the weights were trained: row 0 belongs to the whole view but
        holds the mask of crop 0, and so on; all of the last row is -1.
    """

    crop: int = 336
    patch: int = 14
    pool: int = 2
    max_crops: int = 12
    margins: tuple[int, int] = (4, 4)
    mean: base.Triple = base.CLIP_MEAN
    std: base.Triple = base.CLIP_STD
    padding_mask: bool = True

    def __post_init__(self):
        super().__post_init__()
        if any(length % self.pool for length in (self.side, *self.margins)):
            raise UserError(
                f"preprocessor: {self.side} patches, margins {list(self.margins)}",
                allowed=f"multiples of {self.pool}, the edge of a pooling window",
            )

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads `preprocessor_config.json` and `config.json`; the defaults are Molmo's.

        Args:
          preprocessor, config: contents of those files.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: an unknown value of a setting, or another crop mode.
        """
        settings = reading.image_settings(preprocessor)
        for name, known in (("crop_mode", "overlap-and-resize-c2"), ("resize", "default")):
            value = settings.get(name, config.get(name)) or known
            if value != known:
                raise UserError(f"preprocessor: {name} {short(value)}", allowed=known)
        crop = overlap.square("base_image_input_size", settings, cls.crop)
        patch = reading.whole("image_patch_size", settings.get("image_patch_size", cls.patch))
        lengths = {settings.get(f"image_token_length_{axis}", crop // patch // 2) for axis in "hw"}
        tokens = reading.whole("image_token_length", lengths.pop())
        if lengths or crop // patch % tokens:
            raise UserError(
                f"preprocessor: image_token_length {tokens} for {crop // patch} patches",
                allowed="the same length down and across, a divisor of the patches",
            )
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        return cls(
            crop=crop,
            patch=patch,
            pool=crop // patch // tokens,
            max_crops=reading.whole("max_crops", settings.get("max_crops", cls.max_crops), 1, 256),
            margins=overlap.margins_of(settings),
            mean=mean,
            std=std,
            max_visual_tokens=max_visual_tokens,
            padding_mask=bool(settings.get("image_padding_mask", True)),
        )

    def sequence(self, height: int, width: int) -> int:
        """Tokens that a picture of this size takes in the prompt, <im_start> and others included.

        Raises:
          UserError: the size is not one of a picture.
        """
        rows, columns = self.grid(height, width)
        side = self.side // self.pool
        return 2 + side * (side + 1) + 2 + rows * (columns + 1)

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        side = self.side // self.pool
        return overlap.layout(side, side) + overlap.layout(*self.grid(height, width))

    def __call__(self, picture: Any) -> base.Pictured:
        """One picture; see `base.load_picture` for what it can be, `base.Pictured` for the result.

        Raises:
          UserError: the picture cannot be used.
        """
        image = base.load_picture(picture)
        pixels = base.unit(image)
        tiling = self.tiling(image.height, image.width)
        canvas, real, inner = resize_and_pad(pixels, *self.canvas(tiling))
        whole, _, whole_inner = resize_and_pad(pixels, self.crop, self.crop)

        side, margins = self.side // self.pool, [margin // self.pool for margin in self.margins]
        order = overlap.raster(tiling, side, *margins)
        crops = tiling[0] * tiling[1]
        boxes = [_box(self.crop, (0, 0), whole_inner)]
        boxes += [_box(self.crop, corner, inner) for corner in self.corners(tiling)]
        return base.Pictured(
            images=np.concatenate([whole[None], self.crops(canvas, tiling)]),
            valid=np.full((1 + crops, 2), self.side, np.int32),
            text=self.text(image.height, image.width),
            grids=np.full((1 + crops, 2), side, np.int32),
            boxes=np.float32(boxes),
            slots=np.concatenate([np.arange(side**2), side**2 + order.ravel()]).astype(np.int32),
            padding_share=self._shares(real, tiling) if self.padding_mask else None,
        )

    def _shares(self, real: np.ndarray, tiling: tuple[int, int]) -> np.ndarray:
        """`Pictured.padding_share` from the float32 mask of the canvas."""
        side, patch = self.side, self.patch
        crops = self.crops(real, tiling).reshape(-1, side, patch, side, patch)
        shares = crops.mean((2, 4), dtype=np.float32).reshape(-1, side * side)
        return np.pad(shares, [(0, 1), (0, 0)], constant_values=-1)


def resize_and_pad(
    pixels: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Fits a picture into a canvas: aspect kept, antialiased bilinear in float32, black around it.

    Args:
      pixels: float32 [h, w, 3] in [0, 1].
      height, width: of the canvas.

    Returns:
      float32 [height, width, 3]; float32 [height, width], 1 on the picture and 0 on padding;
      and (top, left, height, width) of the picture on the canvas.
    """
    old = np.float32(pixels.shape[:2])
    # In float32, like the released code: the last row is rounded alike. At least one pixel stays.
    scale = min(np.float32(height) / old[0], np.float32(width) / old[1])
    inner = [max(1, int(length * scale)) for length in old]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    area = np.s_[top : top + inner[0], left : left + inner[1]]
    canvas = np.zeros((height, width, 3), np.float32)
    real = np.zeros((height, width), np.float32)
    real[area] = 1
    for channel in range(3):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., channel]))
        plane = base.resize(plane, *inner, Image.Resampling.BILINEAR)
        canvas[*area, channel] = np.clip(np.asarray(plane), 0, 1)
    return canvas, real, (top, left, *inner)


def _box(
    crop: int, corner: tuple[int, int], inner: tuple[int, int, int, int]
) -> tuple[float, float, float, float]:
    """The part of a picture at `inner` that a crop at `corner` shows, as in `Pictured.boxes`."""
    top, left, height, width = inner
    y, x = corner[0] - top, corner[1] - left
    return y / height, x / width, (y + crop) / height, (x + crop) / width
