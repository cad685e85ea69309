"""Pictures for Molmo2: one view of the whole and up to 8 overlapping crops.

`overlap` has the geometry of the crops. Source: the behaviour of the released preprocessors
(December 2025).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.pictures import base, overlap
from efficient_vlm.processing.pictures import settings as reading


@dataclasses.dataclass(frozen=True)
class Molmo2(overlap.Overlapping):
    """Molmo2 4B, 8B and O-7B, pictures (not video).

    The picture is stretched to the canvas, bilinear without antialiasing, on 8-bit values. A side
    of 27 patches is odd, so pooling windows are lists of patches, which may lie in two or four
    crops and hold -1 at the right and bottom. `grids` counts a window for the crop that holds its
    top left patch.

    Attributes:
      column_tokens: <im_col> after each row of the crops.
      whole_column_tokens: <im_col> after each row of the whole view.
      whole_start_token: the whole view starts with <low_res_im_start>.
    """

    crop: int = 378
    patch: int = 14
    pool: int = 2
    max_crops: int = 8
    margins: tuple[int, int] = (4, 4)
    mean: base.Triple = base.HALF
    std: base.Triple = base.HALF
    column_tokens: bool = True
    whole_column_tokens: bool = False
    whole_start_token: bool = True

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads `preprocessor_config.json` with the keys of `processor_config.json` added.

        The defaults are those of the released models. A null `use_single_crop_col_tokens` takes the
        value of `image_use_col_tokens`.

        Args:
          preprocessor, config: contents of those files.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: an unknown value of a setting.
        """
        settings = reading.image_settings(preprocessor)
        if settings.get("resample", 2) != 2:
            raise UserError(f"preprocessor: resample {short(settings['resample'])}", allowed="2")
        mean, std = reading.mean_std(settings, cls.mean, cls.std)
        columns = bool(preprocessor.get("image_use_col_tokens", True))
        whole = preprocessor.get("use_single_crop_col_tokens", cls.whole_column_tokens)
        return cls(
            crop=reading.edge("size", settings.get("size", cls.crop)),
            patch=reading.whole("patch_size", settings.get("patch_size", cls.patch)),
            pool=overlap.square("pooling_size", settings, cls.pool),
            max_crops=reading.whole("max_crops", settings.get("max_crops", cls.max_crops), 1, 256),
            margins=overlap.margins_of(settings),
            mean=mean,
            std=std,
            max_visual_tokens=max_visual_tokens,
            column_tokens=columns,
            whole_column_tokens=columns if whole is None else bool(whole),
            whole_start_token=bool(preprocessor.get("use_single_crop_start_token", True)),
        )

    def sequence(self, height: int, width: int) -> int:
        """Tokens that a picture of this size takes in the prompt, <im_start> and others included.

        Raises:
          UserError: the size is not one of a picture.
        """
        rows, columns = self.grid(height, width)
        side = math.ceil(self.side / self.pool)
        whole = 2 + side * (side + self.whole_column_tokens)
        return whole + 2 + rows * (columns + self.column_tokens)

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        side = math.ceil(self.side / self.pool)
        start = overlap.LOW_RES_START if self.whole_start_token else overlap.START
        whole = overlap.layout(side, side, start=start, column_token=self.whole_column_tokens)
        grid = self.grid(height, width)
        return whole + overlap.layout(*grid, column_token=self.column_tokens)

    def __call__(self, picture: Any) -> base.Pictured:
        """One picture; see `base.load_picture` for what it can be, `base.Pictured` for the result.

        Raises:
          UserError: the picture cannot be used.
        """
        image = np.asarray(base.load_picture(picture))
        tiling = self.tiling(*image.shape[:2])
        height, width = self.canvas(tiling)
        crops = self.crops(stretch(image, height, width), tiling)
        whole = stretch(image, self.crop, self.crop)

        side = self.side
        order = overlap.raster(tiling, side, *self.margins)
        windows = overlap.pooling_windows(order + side**2, self.pool)
        whole_windows = overlap.pooling_windows(np.arange(side**2).reshape(side, side), self.pool)
        firsts = order[:: self.pool, :: self.pool] // side**2
        grids = [whole_windows.shape[:2]]
        for number in range(len(crops)):
            held = firsts == number
            grids.append((held.any(1).sum(), held.any(0).sum()))
        size = (height, width, height, width)
        boxes = [base.WHOLE_PICTURE] + [
            np.divide((top, left, top + self.crop, left + self.crop), size)
            for top, left in self.corners(tiling)
        ]
        flat = (-1, self.pool**2)
        return base.Pictured(
            images=np.concatenate([whole[None], crops]),
            valid=np.full((1 + len(crops), 2), side, np.int32),
            text=self.text(*image.shape[:2]),
            grids=np.array(grids, np.int32),
            boxes=np.float32(boxes),
            pool_index=np.concatenate([whole_windows.reshape(flat), windows.reshape(flat)]),
        )


def stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize without antialiasing, rounded to 8 bit.

    Args:
      image: uint8 [h, w, 3].
      height, width: of the result.

    Returns:
      float32 [height, width, 3] in [0, 1].
    """

    def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Pixel centres, in float32 like the released code, so that ties round to the same 8 bits.
        scale = np.float32(old) / np.float32(new)
        centre = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * scale - 0.5, 0)
        low = np.minimum(centre.astype(np.int64), old - 1)
        return low, np.minimum(low + 1, old - 1), centre - low.astype(np.float32)

    top, bottom, down = taps(image.shape[0], height)
    left, right, across = taps(image.shape[1], width)
    down, across = down[:, None, None], across[:, None]

    def rows(which: np.ndarray) -> np.ndarray:
        lines = image[which]
        return lines[:, left] * (1 - across) + lines[:, right] * across

    mixed = rows(top) * (1 - down) + rows(bottom) * down
    return np.clip(np.rint(mixed), 0, 255) / np.float32(255)
