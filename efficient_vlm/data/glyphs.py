"""The digits and fonts of scenes: handwritten digits of UCI, fonts of matplotlib.

The digits lie beside this file with their licence; the fonts are read from the installed package
without importing it.
"""

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from efficient_vlm.errors import UserError

SOURCE_PIXELS = 8
TRAIN_GLYPHS = 1400  # Source glyphs 0..1399 are for training, the rest for testing.
DIGITS = Path(__file__).parent / "digits" / "digits.csv.gz"
FONTS = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf")


@functools.lru_cache(maxsize=8)
def glyph_table(px: int) -> tuple[np.ndarray, np.ndarray]:
    """Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998) at `px` x `px`.

    The test set, in the order in which UCI and scikit-learn give it.

    Returns:
      float32 [1797, px, px] in 0..1, and their labels, int64 [1797].
    """
    with gzip.open(DIGITS, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    labels = table[:, -1]
    pixels = (table[:, :-1].reshape(-1, SOURCE_PIXELS, SOURCE_PIXELS) / 16).astype(np.float32)
    if px != SOURCE_PIXELS:
        bicubic = Image.Resampling.BICUBIC
        pixels = np.stack(
            [np.asarray(Image.fromarray(p).resize((px, px), bicubic)) for p in pixels]
        )
        pixels = np.clip(pixels, 0, 1)
    pixels.setflags(write=False)
    return pixels, labels


def _package_file(module: str, package: str, path: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(
        f"{package} with {path} is needed to build token_bench", fix=f"pip install {package}"
    )


@functools.lru_cache(maxsize=64)
def font(name: str, px: int) -> ImageFont.FreeTypeFont:
    """A font of the matplotlib package; `px` is its nominal height in pixels."""
    path = _package_file("matplotlib", "matplotlib", f"mpl-data/fonts/ttf/{name}")
    # Every Pillow has the basic layout engine; Raqm is optional and renders other pixels.
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)
