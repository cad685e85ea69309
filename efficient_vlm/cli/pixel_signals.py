"""Statistics of pixels in place of encoder features, for a look at a method without any weights.

They tell flat from busy and one colour from another, nothing more: what a trained encoder would
keep of the same picture can differ in every patch. Deterministic, NumPy alone.
"""

import numpy as np

from efficient_vlm.compressors import Signals
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.processing import decode_image as images

PATCH = 14  # Pixels, as in CLIP ViT-L/14: a 24 x 24 grid is a 336 x 336 image.
NOTE = "pixel statistics, no trained encoder"
GIVEN = frozenset({"attention_row", "middle_row", "keys", "pixels"})
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_FREQUENCIES = 3


def describe(image: np.ndarray, grid: Grid) -> np.ndarray:
    """What stands in for the features of every patch.

    Of a patch of the image stretched to 14 px a patch: mean (3) and standard deviation (3) of red,
    green and blue; the DCT-II coefficients of its luminance below frequency 3 in both directions
    without the constant one (8); its mean absolute slope across and down (2). Each number is then
    moved and scaled to mean 0 and deviation 1 over the patches, so that cosines compare all alike;
    one that is the same everywhere is 0.

    Args:
      image: uint8 [H, W, 3].
      grid: (rows, columns) of patches.

    Returns:
      float32 [rows * columns, 16].
    """
    patches = patches_of(image, grid)
    luma = patches @ _LUMA
    place = np.arange(PATCH) + 0.5
    waves = np.cos(np.pi * place * np.arange(_FREQUENCIES)[:, None] / PATCH)
    dct = np.einsum("ux,vy,nxy->nuv", waves, waves, luma) / PATCH**2
    found = np.concatenate(
        [
            patches.mean(axis=(1, 2)),
            patches.std(axis=(1, 2)),
            dct.reshape(len(dct), -1)[:, 1:],
            np.abs(np.diff(luma, axis=2)).mean(axis=(1, 2))[:, None],
            np.abs(np.diff(luma, axis=1)).mean(axis=(1, 2))[:, None],
        ],
        axis=1,
    )
    centred = found - found.mean(axis=0)
    deviation = centred.std(axis=0)
    flat = deviation < 1e-6  # Rounding, not a difference between patches.
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, deviation)).astype(np.float32)


def patches_of(image: np.ndarray, grid: Grid) -> np.ndarray:
    """[rows * columns, 14, 14, 3] in [0, 1], of the image stretched to 14 px a patch."""
    rows, columns = grid
    pixels = images.resize(image, (rows * PATCH, columns * PATCH)) / 255.0
    patches = pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
    return patches.reshape(-1, PATCH, PATCH, 3)


def signals(descriptors: np.ndarray, grid: Grid) -> Signals:
    """What stands in for an encoder's attention and keys, from `describe`.

    * attention_row: softmax over the patches of how far each is from the mean patch (root mean
      square of its descriptor): what is unlike the rest is attended to;
    * middle_row: the same of how far it is from the mean of its four neighbours;
    * keys: the descriptors, one head.

    Args:
      descriptors: float32 [N, D].
      grid: (rows, columns).

    Returns:
      Signals of a batch of one.
    """
    field = np.pad(descriptors.reshape(*grid, -1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = (field[:-2, 1:-1] + field[2:, 1:-1] + field[1:-1, :-2] + field[1:-1, 2:]) / 4
    local = descriptors - around.reshape(descriptors.shape)
    return Signals(
        attention_row=_softmax(_length(descriptors))[None],
        middle_row=_softmax(_length(local))[None],
        keys=descriptors[None, :, None],
    )


def _length(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x, dtype=np.float64).mean(axis=1))


def _softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max())
    return (weight / weight.sum()).astype(np.float32)
