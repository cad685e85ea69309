"""Molmo and Molmo2 pictures against torch's resize and transformers' Molmo2 image processor."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.23")
hf = pytest.importorskip("transformers.models.molmo2.image_processing_molmo2")

from efficient_vlm.processing.pictures.molmo import resize_and_pad  # noqa: E402
from efficient_vlm.processing.pictures.molmo2 import Molmo2  # noqa: E402

pytestmark = pytest.mark.parity


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


class Backend:
    """What the processor needs of torchvision, from torch itself; its own methods are untouched."""

    _build_overlapping_crops = hf.Molmo2ImageProcessor._build_overlapping_crops

    def resize(self, image, size, resample, antialias):
        return torch.nn.functional.interpolate(
            image, (size.height, size.width), mode="bilinear", antialias=antialias
        )

    def rescale_and_normalize(self, image, rescale, factor, normalize, mean, std):
        return image.float() * factor


@pytest.mark.parametrize("size", [(336, 336), (480, 640), (768, 1024), (31, 700), (1080, 300)])
def test_molmo2_against_transformers(size):
    picture = noise(*size)
    grid, patches, pooling = hf.Molmo2ImageProcessor._image_batch_to_patches_and_grids(
        Backend(),
        torch.from_numpy(picture).permute(2, 0, 1)[None],
        max_crops=8,
        overlap_margins=[4, 4],
        crop_size=378,
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=False,
        image_mean=None,
        image_std=None,
        image_patch_size=14,
        image_pooling_w=2,
        image_pooling_h=2,
    )
    processor = Molmo2(whole_column_tokens=True)
    result = processor(picture)
    np.testing.assert_array_equal(result.pool_index, pooling[0].numpy())
    count = len(result.images)
    ours = result.images.reshape(count, 27, 14, 27, 14, 3).swapaxes(2, 3)
    theirs = patches[0].numpy().reshape(ours.shape)
    difference = np.abs(ours - theirs) * 255
    # Rounding to 8 bit: a tie may fall the other way, by one step, in very few places.
    assert difference.max() < 1.001
    assert (difference > 0.5).mean() < 5e-4
    flags = types.SimpleNamespace(
        image_use_col_tokens=True, use_single_crop_col_tokens=None, use_single_crop_start_token=True
    )
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    text = Molmo2Processor.replace_image_token(flags, {"image_grids": grid}, 0)
    assert result.text == text


@pytest.mark.parametrize(
    ("size", "canvas"), [((300, 500), (336, 560)), ((1000, 700), (336, 336)), ((5, 90), (560, 336))]
)
def test_molmo_resize_against_torch(size, canvas):
    pixels = noise(*size).astype(np.float32) / 255
    ours, real, (top, left, height, width) = resize_and_pad(pixels, *canvas)
    theirs = torch.nn.functional.interpolate(
        # float64: torch's own float32 weights are off by up to 2e-5.
        torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None],
        (height, width),
        mode="bilinear",
        antialias=True,
    )[0].permute(1, 2, 0)
    inside = ours[top : top + height, left : left + width]
    np.testing.assert_allclose(inside, theirs.numpy(), atol=1e-6)
    assert real.sum() == height * width
    assert ours.sum() == pytest.approx(inside.sum(), rel=1e-4)
