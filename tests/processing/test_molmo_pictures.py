"""Molmo and Molmo2 pictures: published counts, raster order, padding, the off-by-one of masks."""

import math

import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures.molmo import Molmo
from efficient_vlm.processing.pictures.molmo2 import Molmo2
from efficient_vlm.processing.pictures.overlap import raster, select_tiling

# (height, width): tokens in the prompt and images, counted from the released preprocessors.
MOLMO = {
    (336, 336): (316, 2),
    (480, 640): (740, 7),
    (768, 1024): (1196, 13),
    (1024, 1024): (972, 10),
    (1080, 1920): (1196, 13),
}
MOLMO2 = {
    (336, 336): (410, 2),
    (480, 640): (752, 5),
    (768, 1024): (982, 7),
    (1024, 1024): (752, 5),
    (1080, 1920): (1189, 9),
}
CASES = [(Molmo(), *case) for case in MOLMO.items()] + [(Molmo2(), *c) for c in MOLMO2.items()]


def ramp(height, width):
    """Red grows to the right, green downward, both linear from 0 to 255."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.rint(np.linspace(0, 255, width))
    picture[..., 1] = np.rint(np.linspace(0, 255, height))[:, None]
    return picture


def slot_colours(processor, result):
    """Mean colour of the patches behind every visual slot of the text, float [P, 3]."""
    count, edge = len(result.images), processor.patch
    side = processor.crop // edge
    patches = result.images.reshape(count, side, edge, side, edge, 3).mean((2, 4))
    if result.pool_index is not None:
        flat = patches.reshape(-1, 3)
        real = result.pool_index >= 0
        return (flat[result.pool_index] * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    tokens = patches.reshape(count, side // 2, 2, side // 2, 2, 3).mean((2, 4))
    return tokens.reshape(-1, 3)[result.slots]


def rows_of(text):
    """Visual tokens per row of the high-resolution part, and the number of rows."""
    rows = text.split("<im_end>")[1].removeprefix("<im_start>").split("<im_col>")[:-1]
    return {row.count("<im_patch>") for row in rows}, len(rows)


@pytest.mark.parametrize(("processor", "size", "expected"), CASES)
def test_counts_are_those_of_the_released_preprocessors(processor, size, expected):
    tokens, images = expected
    result = processor(ramp(*size))
    assert processor.sequence(*size) == result.text.count("<") == tokens
    assert processor.count(*size) == result.text.count("<im_patch>")
    assert result.images.shape == (images, processor.crop, processor.crop, 3)
    assert result.images.dtype == np.float32
    slots = result.slots if result.slots is not None else result.pool_index
    assert result.text.count("<im_patch>") == len(slots)
    if result.pool_index is not None:
        assert result.grids.prod(1).sum() == len(slots)


def test_longest_pictures():
    # 12 x 1 crops are 100 rows of 12 tokens, each with its <im_col>; 1 x 12 have 12 <im_col>.
    assert Molmo().sequence(5000, 360) == 1460
    assert Molmo().sequence(360, 5000) == 1460 - 88


@pytest.mark.parametrize(("processor", "size", "expected"), CASES)
def test_slots_follow_the_picture_in_raster_order(processor, size, expected):
    result = processor(ramp(*size))
    whole = (processor.crop // processor.patch + 1) // 2
    columns, rows = rows_of(result.text)
    assert len(columns) == 1
    colours = slot_colours(processor, result)
    for part, shape in (
        (colours[: whole**2], (whole, whole)),
        (colours[whole**2 :], (rows, columns.pop())),
    ):
        grid = part.reshape(*shape, 3)
        # Rows and columns that padding reaches are left out.
        inner = grid[2:-2, 2:-2]
        middle = inner[shape[0] // 2 - 2], inner[:, shape[1] // 2 - 2]
        shown = [line[line.max(1) > 0][1:-1] for line in middle]
        assert (np.diff(shown[0][:, 0]) > 0).all()
        assert (np.diff(shown[1][:, 1]) > 0).all()


@pytest.mark.parametrize("processor", [Molmo(), Molmo2()])
@pytest.mark.parametrize("size", [(480, 640), (700, 300)])
def test_boxes_say_what_an_image_shows(processor, size):
    result = processor(ramp(*size))
    for image, (top, left, bottom, right) in zip(result.images, result.boxes, strict=True):
        places = (np.arange(processor.crop) + 0.5) / processor.crop
        across, down = left + places * (right - left), top + places * (bottom - top)
        inside = np.ix_((down > 0.02) & (down < 0.98), (across > 0.02) & (across < 0.98))
        expected = np.broadcast_to(across, (processor.crop,) * 2)
        np.testing.assert_allclose(image[..., 0][inside], expected[inside], atol=0.012)
        expected = np.broadcast_to(down[:, None], (processor.crop,) * 2)
        np.testing.assert_allclose(image[..., 1][inside], expected[inside], atol=0.012)


def test_padding_is_black_and_masks_are_off_by_one_crop():
    # 1 x 2 crops on a canvas of 336 x 560: 200 x 1400 white pixels become 80 x 560, rows 128..207.
    result = Molmo(max_crops=2)(np.full((200, 1400, 3), 255, np.uint8))
    assert len(result.images) == 3
    canvas_rows = np.arange(336)
    white = (canvas_rows >= 128) & (canvas_rows < 208)
    for crop in result.images[1:]:
        np.testing.assert_array_equal(crop[:, 100, 0], white.astype(np.float32))
    share = white.reshape(24, 14).mean(1)
    assert set(np.round(share * 14)) == {0, 12, 14}  # Partly real patches exist.
    for row in result.padding_share[:2]:  # Rows of the whole view and of crop 0: masks 0 and 1.
        np.testing.assert_allclose(row.reshape(24, 24), np.repeat(share[:, None], 24, 1))
    assert (result.padding_share[2] == -1).all()
    # The whole view, 336 x 48, has quite another padding than its mask says.
    assert result.images[0][:, 100, 0].sum() == 48


def test_tiling_against_exhaustive_search_in_exact_numbers():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (200, 2)):
        every = [(i, j) for i in range(1, 13) for j in range(1, 13) if i * j <= 12]
        every.sort(key=lambda t: (t[0] * t[1], t[0]))
        scale = {
            t: min(Fraction(t[0] * 224, int(height)), Fraction(t[1] * 224, int(width)))
            for t in every
        }
        enough = [t for t in every if scale[t] >= 1]
        best = min(enough, key=scale.get) if enough else max(every, key=scale.get)
        assert select_tiling(int(height), int(width), 224, 12) == best


def test_raster_covers_the_canvas_once_and_never_uses_an_inner_margin():
    cells = raster((2, 3), 27, 4, 4)
    assert cells.shape == (2 * 19 + 8, 3 * 19 + 8)
    assert len(np.unique(cells)) == cells.size
    crop, row, column = cells // 27**2, cells // 27 % 27, cells % 27
    # A place is crop offset plus place in the crop.
    assert (crop // 3 * 19 + row == np.arange(46)[:, None]).all()
    assert (crop % 3 * 19 + column == np.arange(65)).all()
    assert row[crop // 3 == 1].min() == 4 and row[crop // 3 == 0].max() == 22


@pytest.mark.parametrize("processor", [Molmo(), Molmo2()])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (112, 112), (113, 50), (2000, 1)])
def test_pictures_smaller_than_the_margins(processor, size):
    result = processor(np.full((*size, 3), 255, np.uint8))
    assert processor.sequence(*size) == result.text.count("<")
    assert result.images.max() == 1 and np.isfinite(result.boxes).all()


def test_grids_and_windows_of_molmo2():
    result = Molmo2()(ramp(768, 1024))
    side = math.ceil(27 / 2)
    assert result.pool_index[: side**2].max() == 27**2 - 1
    # 27 is odd: the last column and the last row pool two patches, the corner one.
    missing = (result.pool_index[: side**2] < 0).sum(1).reshape(side, side)
    assert (missing[:-1, :-1] == 0).all() and missing[-1, -1] == 3
    assert (missing[:-1, -1] == 2).all() and (missing[-1, :-1] == 2).all()
    used = result.pool_index[result.pool_index >= 0]
    assert len(np.unique(used)) == len(used) and used.max() < len(result.images) * 27**2


def test_settings_of_released_files():
    preprocessor = {
        "base_image_input_size": [336, 336],
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_padding_mask": True,
        "image_patch_size": 14,
        "image_token_length_h": 12,
        "image_token_length_w": 12,
        "max_crops": 12,
        "overlap_margins": [4, 4],
        "do_normalize": True,
    }
    assert Molmo.from_hf(preprocessor, {}) == Molmo() == Molmo.from_hf({}, {})
    assert Molmo2.from_hf({"size": {"height": 378, "width": 378}}, {}) == Molmo2()
    assert Molmo.from_hf({"image_padding_mask": False}, {})(ramp(9, 9)).padding_share is None
    with_columns = Molmo2.from_hf({"use_single_crop_col_tokens": None}, {})
    assert with_columns.sequence(336, 336) == 410 + 14


@pytest.mark.parametrize(
    ("family", "preprocessor", "named"),
    [
        (Molmo, {"crop_mode": "resize"}, "crop_mode"),
        (Molmo, {"resize": "siglip"}, "resize"),
        (Molmo, {"image_token_length_w": 7}, "image_token_length"),
        (Molmo, {"overlap_margins": [3, 3]}, "margins"),
        (Molmo, {"overlap_margins": [12, 12]}, "margins"),
        (Molmo, {"max_crops": 0}, "max_crops"),
        (Molmo, {"base_image_input_size": [336, 378]}, "base_image_input_size"),
        (Molmo2, {"size": {"height": 378, "width": 364}}, "size"),
        (Molmo2, {"size": 380}, "380 px"),
        (Molmo2, {"overlap_margins": 4}, "overlap_margins"),
        (Molmo2, {"resample": 3}, "resample"),
    ],
)
def test_wrong_settings_are_named(family, preprocessor, named):
    with pytest.raises(UserError, match=named):
        family.from_hf(preprocessor, {})


def test_wrong_sizes_are_refused():
    for processor in (Molmo(), Molmo2()):
        with pytest.raises(UserError, match="0 x 5"):
            processor.count(5, 0)
