"""LLaVA's layout with a SigLIP encoder: TinyLLaVA (arXiv 2402.14289)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from PIL import Image

from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures import settings as reading
from efficient_vlm.processing.pictures.base import Pictured, Triple
from efficient_vlm.processing.pictures.limits import Limited
from efficient_vlm.processing.pictures.resized import pad_square


@dataclasses.dataclass(frozen=True)
class SiglipPictures(Limited):
    """The whole picture stretched to a square, one token per patch: 384 pixels, 27 x 27 tokens.

    Pixels at the right and bottom that do not fill a patch (6 of 384) are cut off, as in the
    encoder's convolution.

    Attributes:
      size: edge in pixels of the square that the picture is stretched to.
      patch: edge of an encoder patch in pixels.
      pad: pad to a square before stretching.
      fill: per channel, the colour of that padding in [0, 1], which is the mean.
      resample: Pillow filter code.
      mean: per channel, subtracted by the encoder from pixels in [0, 1].
      std: per channel, what the encoder divides by.
    """

    size: int = 384
    patch: int = 14
    pad: bool = False
    resample: int = Image.Resampling.BICUBIC
    mean: Triple = base.HALF
    std: Triple = base.HALF
    fill: Triple = base.HALF

    @classmethod
    def from_hf(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        max_visual_tokens: int | None = None,
    ) -> Self:
        """Reads the files of a checkpoint; {} means the published 384 pixels.

        `pad` follows "image_aspect_ratio": "pad" of the model, which original checkpoints have.

        Args:
          preprocessor: content of `preprocessor_config.json`.
          config: content of `config.json`.
          max_visual_tokens: see `Limited`.

        Raises:
          UserError: a setting out of range.
        """
        settings = reading.image_settings(preprocessor)
        return cls(
            **reading.stretched(cls, preprocessor, config),
            pad=config.get("image_aspect_ratio") == "pad",
            fill=reading.mean_std({**settings, "do_normalize": True}, cls.mean, cls.std)[0],
            max_visual_tokens=max_visual_tokens,
        )

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
        edge = self.size // self.patch * self.patch
        return 1, edge, edge

    def text(self, height: int, width: int) -> str:
        """`Pictured.text` of a picture of this size; see `views` for errors."""
        return "<image>" * self.count(height, width)

    def __call__(self, picture: Any) -> Pictured:
        """One image of whole patches. For `picture` and errors see `base.load_picture`."""
        image = base.load_picture(picture)
        height, width = image.height, image.width
        above = left = 0  # Of padding, in pixels of the original.
        if self.pad:
            image, above, left = pad_square(image, self.fill)
        grid = self.size // self.patch
        edge = grid * self.patch
        resized = base.resize(image, self.size, self.size, self.resample)
        down, across = image.height * edge / self.size, image.width * edge / self.size
        return base.pictured(
            [resized.crop((0, 0, edge, edge))],
            patch=self.patch,
            grid=(grid, grid),
            text="<image>" * grid**2,
            boxes=[
                (-above / height, -left / width, (down - above) / height, (across - left) / width)
            ],
        )
