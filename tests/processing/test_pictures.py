"""Pictures of published families: token counts, where tiles lie, every kind of input, bad settings.

Pixels are compared with the published processors in tests/parity/test_pictures_parity.py.
"""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures import base
from efficient_vlm.processing.pictures.internvl import InternVLPictures
from efficient_vlm.processing.pictures.molmo2 import Molmo2
from efficient_vlm.processing.pictures.native import Qwen2VLPictures, Qwen3VLPictures
from efficient_vlm.processing.pictures.resized import LlavaPictures, MobileVLMPictures
from efficient_vlm.processing.pictures.siglip import SiglipPictures
from efficient_vlm.processing.pictures.smolvlm import SmolVLMPictures
from efficient_vlm.processing.pictures.stretched import Gemma3Pictures, PaliGemmaPictures

SMOL_2B = {"scale_factor": 3, "vision_config": {"image_size": 384, "patch_size": 14}}
FAMILIES = {
    "llava": (LlavaPictures, {}),
    "llava pad": (LlavaPictures, {"image_aspect_ratio": "pad"}),
    "mobilevlm": (MobileVLMPictures, {}),
    "paligemma": (PaliGemmaPictures, {}),
    "gemma3": (Gemma3Pictures, {"vision_config": {"image_size": 224}, "mm_tokens_per_image": 16}),
    "smolvlm": (SmolVLMPictures, {}),
    "internvl": (InternVLPictures, {}),
    "qwen2-vl": (Qwen2VLPictures, {}),
    "qwen3-vl": (Qwen3VLPictures, {}),
}
SLOT = {
    **dict.fromkeys(FAMILIES, "<image>"),
    "gemma3": "<image_soft_token>",
    "internvl": "<IMG_CONTEXT>",
    "qwen2-vl": "<|image_pad|>",
    "qwen3-vl": "<|image_pad|>",
}


def processor(name, **preprocessor):
    family, config = FAMILIES[name]
    return family.from_hf(preprocessor, config)


def noise(height, width, channels=3):
    random = np.random.default_rng(height * 1000 + width)
    return random.integers(0, 256, (height, width, channels), np.uint8)


def test_llava_with_the_token_of_the_class():
    full = LlavaPictures.from_hf({}, {"vision_feature_select_strategy": "full"})
    found = full(noise(40, 60))
    assert full.count(40, 60) == 577 == found.text.count("<image>")
    assert found.grids.tolist() == [[1, 577]]


# ---- counts --------------------------------------------------------------------------------------

# Rows: height, width, then SmolVLM 256M, 2.2B, Qwen2-VL class default, Qwen3-VL.
PUBLISHED = [
    (336, 336, 1088, 1377, 144, 100),
    (480, 640, 832, 1053, 391, 300),
    (768, 1024, 832, 1053, 999, 768),
    (1024, 1024, 1088, 1377, 1225, 1024),
    (1080, 1920, 832, 1053, 1222, 2040),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_counts_of_published_sizes(row):
    height, width, *expected = row
    readers = (
        SmolVLMPictures.from_hf({}, {}),
        SmolVLMPictures.from_hf({}, SMOL_2B),
        Qwen2VLPictures.from_hf({}, {}),
        Qwen3VLPictures.from_hf({}, {}),
    )
    assert [reader.count(height, width) for reader in readers] == expected


@pytest.mark.parametrize(
    ("reader", "tokens"),
    [
        (LlavaPictures.from_hf({}, {}), 576),
        (PaliGemmaPictures.from_hf({}, {}), 256),
        (PaliGemmaPictures.from_hf({}, {"vision_config": {"image_size": 448}}), 1024),
        (PaliGemmaPictures.from_hf({"size": {"height": 896, "width": 896}}, {}), 4096),
        (Gemma3Pictures.from_hf({}, {}), 256),
        (MobileVLMPictures.from_hf({}, {}), 144),
        (InternVLPictures.from_hf({}, {}, max_tiles=1), 256),
        (SmolVLMPictures.from_hf({}, {}, split=False), 64),
        (SmolVLMPictures.from_hf({"do_image_splitting": False}, SMOL_2B), 81),
        (
            SmolVLMPictures.from_hf(
                {"size": {"longest_edge": 364}},
                {"scale_factor": 2, "vision_config": {"image_size": 364, "patch_size": 14}},
            ),
            169,
        ),
    ],
)
def test_fixed_counts(reader, tokens):
    for size in ((1, 1), (3, 3000), (480, 640)):
        if not isinstance(reader, SmolVLMPictures) or reader.split is False or size[0] == size[1]:
            assert reader.count(*size) == tokens


def test_internvl_has_at_most_twelve_tiles_and_the_whole():
    reader = InternVLPictures.from_hf({}, {})
    assert reader.count(400, 300 * 100) == 13 * 256
    assert reader.count(448, 448) == 256
    assert reader.arrangement(1344, 1792) == (3, 4)
    # 1 x 1, 2 x 2 and 3 x 3 have one ratio: the area decides.
    assert [reader.arrangement(n, n) for n in (600, 700, 1000)] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (97, 61), (480, 640)])
def test_the_parts_agree(name, size):
    reader = processor(name)
    result = reader(noise(*size))
    count = len(result.images)
    assert result.images.dtype == np.float32 and result.images.shape[3] == 3
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.valid.dtype == result.grids.dtype == np.int32
    assert result.valid.shape == result.grids.shape == (count, 2)
    assert result.boxes.dtype == np.float32 and result.boxes.shape == (count, 4)
    tokens = reader.count(*size)
    assert tokens == result.grids.prod(1).sum() == result.text.count(SLOT[name])
    assert result.slots is result.pool_index is result.padding_share is None
    patch = reader.patch
    np.testing.assert_array_equal(
        result.valid, [[edge // patch for edge in result.images.shape[1:3]]] * count
    )


# ---- where the images lie ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader", [*(processor(name) for name in FAMILIES), Gemma3Pictures(pan_and_scan=True)]
)
@pytest.mark.parametrize("size", [(600, 600), (640, 1600), (1700, 600)])
def test_boxes_say_what_each_image_shows(reader, size):
    """In a picture whose red is the row and green the column, the values give the place back."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([(rows + 0.5) / height, (columns + 0.5) / width, rows * 0], -1)
    result = reader(np.rint(ramp * 255).astype(np.uint8))
    for image, (top, left, bottom, right) in zip(result.images, result.boxes, strict=True):
        high, wide = image.shape[:2]
        for y in (0.3, 0.5, 0.75):
            for x in (0.3, 0.5, 0.75):
                place = (top + y * (bottom - top), left + x * (right - left))
                seen = image[int(y * high), int(x * wide)]
                if all(0.01 < p < 0.99 for p in place):
                    np.testing.assert_allclose(seen[:2], place, atol=0.01)
                elif not all(-0.01 < p < 1.01 for p in place):
                    np.testing.assert_allclose(seen, np.array(reader.mean), atol=0.01)


def test_padding_sticks_out_and_a_crop_stays_inside():
    padded = processor("llava pad")(noise(100, 200)).boxes[0]
    np.testing.assert_allclose(padded, [-0.5, 0, 1.5, 1], atol=1e-6)
    cropped = processor("llava")(noise(100, 200)).boxes[0]
    np.testing.assert_allclose(cropped, [0, 0.25, 1, 0.75], atol=1e-6)


def test_smolvlm_text_has_a_line_per_row_of_tiles():
    reader = SmolVLMPictures(longest=64, tile=32, patch=8, shuffle=2)
    text = reader(noise(30, 64)).text
    slots = "<image>" * 4
    assert text == (
        f"<fake_token_around_image><row_1_col_1>{slots}<fake_token_around_image><row_1_col_2>{slots}"
        f"\n\n<fake_token_around_image><global-img>{slots}<fake_token_around_image>"
    )


def test_qwen_limits_can_be_set():
    reader = Qwen2VLPictures.from_hf({"max_pixels": 12845056}, {}, max_pixels=28 * 28 * 64)
    assert reader.count(3000, 3000) == 64
    newer = Qwen2VLPictures.from_hf(
        {"size": {"shortest_edge": 112**2, "longest_edge": 28 * 28 * 30}}, {}
    )
    assert newer.count(1, 1) == 16
    assert newer.count(3000, 3000) <= 30


# ---- kinds of input ------------------------------------------------------------------------------


def test_orientation_alpha_and_depth(tmp_path):
    pixels = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees.
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(pixels, -1)
    for picture in (tmp_path / "turned.png", str(tmp_path / "turned.png")):
        np.testing.assert_array_equal(np.asarray(base.load_picture(picture)), upright)
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(np.asarray(base.load_picture(opened)), upright)

    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    loaded = np.asarray(base.load_picture(clear))
    assert loaded[0, 0].tolist() == [10, 20, 30] and (loaded[1] == 255).all()

    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for picture in (deep, Image.fromarray(deep), tmp_path / "deep.png"):
        np.testing.assert_array_equal(
            np.asarray(base.load_picture(picture))[0, :, 1], [0, 100, 255]
        )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_is_understood(mode):
    image = Image.fromarray(np.full((5, 6), 255, np.uint8)).convert("L")
    image = Image.new("I;16", (6, 5), 65535) if mode == "I;16" else image.convert(mode)
    loaded = base.load_picture(image)
    assert loaded.mode == "RGB" and loaded.size == (6, 5)
    assert (np.asarray(loaded) == 255).all()


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(base.load_picture(tmp_path / "two.gif"))[0, 0].tolist() == [255, 0, 0]


def bad_pictures(folder):
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    whole = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(whole, "PNG")
    (folder / "cut.png").write_bytes(whole.getvalue()[:2000])
    return [
        folder / "absent.png",
        folder,
        folder / "text.png",
        folder / "empty.png",
        folder / "cut.png",
        "a\0b.png",
        Image.open(io.BytesIO(whole.getvalue()[:2000])),
        Image.new("RGB", (0, 5)),
        Image.new("F", (3, 3)),
        Image.new("1", (20000, 20000)),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 4), np.uint16),
        np.zeros((2, 4, 4, 3), np.uint8),
        None,
        b"bytes",
    ]


def test_a_bad_picture_is_a_user_error(tmp_path):
    for picture in bad_pictures(tmp_path):
        with pytest.raises(UserError) as caught:
            base.load_picture(picture)
        assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (100_000, 100_000)])
def test_a_bad_size_is_a_user_error(name, size):
    with pytest.raises(UserError):
        processor(name).count(*size)


def test_extreme_aspects():
    """A thread of a picture is refused where it would become a giant, and read elsewhere."""
    thread = noise(1, 20_000)
    for name in ("llava", "llava pad", "mobilevlm", "qwen2-vl", "qwen3-vl"):
        with pytest.raises(UserError):
            processor(name)(thread)
    for name in ("paligemma", "gemma3", "smolvlm", "internvl"):
        reader = processor(name)
        assert reader(thread).grids.prod(1).sum() == reader.count(1, 20_000)


# ---- settings ------------------------------------------------------------------------------------


def test_a_null_switches_a_step_off():
    """As in transformers 5.24; of other settings it is their absence."""
    size = {"size": {"height": 56, "width": 56}, "resample": None}
    assert PaliGemmaPictures.from_hf({**size, "do_normalize": None}, {}).std == (1.0, 1.0, 1.0)
    for step in ("do_resize", "do_rescale"):
        with pytest.raises(UserError, match=f"{step} None"):
            PaliGemmaPictures.from_hf({**size, step: None}, {})
    with pytest.raises(UserError, match="do_center_crop None"):
        LlavaPictures.from_hf({"size": {"shortest_edge": 56}, "do_center_crop": None}, {})
    qwen = Qwen2VLPictures.from_hf({"min_pixels": 3136, "max_pixels": 1e6}, {})
    assert qwen.max_pixels == 1_000_000


def test_nested_settings_and_nulls():
    plain = {"size": {"height": 448, "width": 448}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    nested = {"image_processor": {**plain, "do_pad": None, "image_std": None}, "image_seq_len": 9}
    for preprocessor in (plain, nested):
        reader = PaliGemmaPictures.from_hf(preprocessor, {})
        assert reader == PaliGemmaPictures(size=448, resample=2, mean=(0.1, 0.2, 0.3))
    off = PaliGemmaPictures.from_hf({"do_normalize": False}, {})
    assert (off.mean, off.std) == ((0, 0, 0), (1, 1, 1))


BAD_SETTINGS = [
    ("resample", 17),
    ("resample", "bicubic"),
    ("resample", [3]),
    ("image_mean", [0.5, 0.5]),
    ("image_mean", ["a", "b", "c"]),
    ("image_mean", [float("nan")] * 3),
    ("image_std", [0.5, 0.0, 0.5]),
    ("size", {}),
    ("size", {"shortest": 336}),
    ("size", {"max_height": 336, "max_width": 336}),
    ("size", {"height": 336, "width": 336, "shortest_edge": 336}),
    ("size", {"shortest_edge": 10**9}),
    ("size", {"height": [1], "width": {}}),
    ("size", -5),
    ("size", 10**9),
    ("size", True),
    ("size", "large"),
    ("rescale_factor", 1.0),
    ("rescale_factor", "x"),
    ("do_rescale", False),
    ("do_resize", False),
    ("do_resize", 0),
    ("pad_size", {"height": 400, "width": 400}),
    ("image_mean", True),
]


@pytest.mark.parametrize(
    "name", ["llava", "mobilevlm", "paligemma", "gemma3", "smolvlm", "internvl"]
)
@pytest.mark.parametrize(("field", "value"), BAD_SETTINGS)
def test_bad_settings_are_user_errors(name, field, value):
    with pytest.raises(UserError):
        processor(name, **{field: value})


@pytest.mark.parametrize(
    ("family", "preprocessor", "config"),
    [
        (LlavaPictures, {"do_center_crop": False}, {}),
        (LlavaPictures, {"size": {"longest_edge": 336}}, {}),
        (LlavaPictures, {"size": {"height": 336, "width": 224}}, {}),
        (LlavaPictures, {"size": {"shortest_edge": 336}, "do_center_crop": False}, {}),
        (LlavaPictures, {"crop_size": {"shortest_edge": 336}}, {}),
        (LlavaPictures, {"crop_size": {"height": 336, "width": 224}}, {}),
        (SiglipPictures, {"size": 384}, {}),
        (SiglipPictures, {"size": {"shortest_edge": 384}}, {}),
        (SiglipPictures, {"do_center_crop": True, "crop_size": 224}, {}),
        (PaliGemmaPictures, {"size": {"shortest_edge": 224}}, {}),
        (PaliGemmaPictures, {"size": {"height": 224, "width": 448}}, {}),
        (PaliGemmaPictures, {"do_center_crop": True, "crop_size": 112}, {}),
        (Gemma3Pictures, {"size": {"longest_edge": 896}}, {}),
        (InternVLPictures, {"size": {"shortest_edge": 448}}, {}),
        (InternVLPictures, {"size": {"height": 448, "width": 224}}, {}),
        (SmolVLMPictures, {"size": {"shortest_edge": 2048}}, {}),
        (SmolVLMPictures, {"max_image_size": {"height": 512, "width": 512}}, {}),
        (Qwen2VLPictures, {"size": {"height": 400, "width": 400}}, {}),
        (Qwen2VLPictures, {"size": {"longest_edge": 10**6}}, {}),
        (Molmo2, {"size": {"shortest_edge": 378}}, {}),
        (LlavaPictures, {}, {"vision_feature_select_strategy": "cls"}),
        (LlavaPictures, {}, {"vision_config": {"patch_size": 0}}),
        (LlavaPictures, {}, {"vision_config": {"image_size": 10}}),
        (PaliGemmaPictures, {"size": 8}, {}),
        (PaliGemmaPictures, [], {}),
        (PaliGemmaPictures, {}, {"vision_config": {"patch_size": "x"}}),
        (Gemma3Pictures, {}, {"mm_tokens_per_image": 200}),
        (Gemma3Pictures, {}, {"mm_tokens_per_image": 25}),
        (MobileVLMPictures, {"size": 350}, {}),
        (SmolVLMPictures, {"size": 9000}, {}),
        (SmolVLMPictures, {}, {"scale_factor": 5}),
        (InternVLPictures, {"max_patches": 0}, {}),
        (InternVLPictures, {"min_patches": 13}, {}),
        (InternVLPictures, {"size": 10}, {}),
        (InternVLPictures, {}, {"downsample_ratio": 0.4}),
        (InternVLPictures, {}, {"downsample_ratio": "half"}),
        (Qwen2VLPictures, {"min_pixels": 10, "max_pixels": 5}, {}),
        (Qwen2VLPictures, {"size": 336}, {}),
        (Qwen2VLPictures, {"max_pixels": 10**12}, {}),
        (Qwen3VLPictures, {"merge_size": 0}, {}),
    ],
)
def test_settings_of_one_family(family, preprocessor, config):
    with pytest.raises(UserError):
        family.from_hf(preprocessor, config)


# A row of pixels, 96 x 24: white, black in the middle quarter.
ROW = np.full((24, 96, 3), 255, np.uint8)
ROW[:, 36:60] = 0
WIDE = {"vision_config": {"image_size": 24, "patch_size": 4}}
# What the CLIP processor of transformers makes of it when it stretches.
STRETCHED = [1] * 8 + [0.9, 0.1, 0, 0, 0, 0, 0.1, 0.9] + [1] * 8


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({"size": {"height": 24, "width": 24}, "crop_size": 24}, STRETCHED),
        ({"size": [24, 24], "do_center_crop": False, "crop_size": 24}, STRETCHED),
        ({"size": {"height": 24, "width": 24, "shortest_edge": None}}, STRETCHED),
        ({"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}, [0] * 24),
        ({"size": 24}, [0] * 24),
        # 6 x 24 in the middle of black.
        ({"size": {"shortest_edge": 24, "longest_edge": 24}, "crop_size": 24}, STRETCHED),
        # 24 x 96 stretched to 24 x 48, of which the middle is shown.
        ({"size": {"height": 24, "width": 48}, "crop_size": 24}, None),
    ],
)
def test_a_size_is_read_by_its_keys(settings, row):
    reader = LlavaPictures.from_hf({"resample": 3, **settings}, WIDE)
    image = reader(Image.fromarray(ROW)).images[0, :, :, 0]
    if row is None:  # Black is a quarter of 48 pixels, in the middle of 24.
        assert image[12, :5].min() > 0.9 and image[12, 8:16].max() < 0.1
        return
    np.testing.assert_allclose(image[12], row, atol=0.06)
    if settings["size"] == {"shortest_edge": 24, "longest_edge": 24}:
        assert not image[:9].any() and not image[15:].any()


def test_sizes_of_other_families():
    """Stretched where the published processor stretches; an integer as its class takes it."""
    smol = SmolVLMPictures.from_hf({"size": {"height": 512, "width": 1024}}, {})
    assert smol.views(300, 300) == smol.views(30, 3000) == (3, 512, 512)
    assert SmolVLMPictures.from_hf({"size": 1024}, {}).views(30, 3000)[0] == 5
    longest = {"shortest_edge": 7, "longest_edge": 1024}
    assert SmolVLMPictures.from_hf({"size": longest}, {}) == SmolVLMPictures(longest=1024)
    assert InternVLPictures.from_hf({"size": 448}, {}) == InternVLPictures()
    assert Gemma3Pictures.from_hf({"size": 896}, {}) == Gemma3Pictures()
    areas = {"min_pixels": 100**2, "max_pixels": 200**2}
    wanted = Qwen2VLPictures(min_pixels=100**2, max_pixels=200**2)
    assert wanted == Qwen2VLPictures.from_hf({"size": areas}, {})
    assert wanted == Qwen2VLPictures.from_hf({"size": {"shortest_edge": 1}, **areas}, {})
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    assert PaliGemmaPictures.from_hf(crop, {}) == PaliGemmaPictures()


def test_what_padding_to_a_square_looks_like():
    """The mean colour, also where nothing is normalised; CLIP's do_pad is another padding."""
    settings = {"do_pad": True, "do_normalize": False, "image_mean": [0.2, 0.4, 0.6]}
    reader = LlavaPictures.from_hf(settings, {})
    assert reader.mean == (0, 0, 0)
    corner = reader(Image.fromarray(ROW)).images[0, 0, 0]
    np.testing.assert_array_equal(corner * 255, [51, 102, 153])
    clip = {"do_pad": True, "image_processor_type": "CLIPImageProcessor"}
    assert not LlavaPictures.from_hf(clip, {}).pad
    assert MobileVLMPictures.from_hf(clip | {"do_pad": False}, {}).pad


def test_gemma3_scans_only_for_a_caller_who_asks():
    """transformers' processor puts its class's values in place of those of the file."""
    saved = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=32, pan_and_scan_max_num_crops=9)
    reader = Gemma3Pictures.from_hf(saved, {})
    assert reader.views(300, 900)[0] == len(reader(noise(300, 900)).images) == 1
    assert Gemma3Pictures.from_hf(saved, {}, pan_and_scan=True).views(300, 900)[0] == 4
    with pytest.raises(UserError, match="pan_and_scan"):
        Gemma3Pictures.from_hf({}, {}, pan_and_scan=1)


# ---- resizing ------------------------------------------------------------------------------------


def page(height, width):
    """An upright page of text: lines of letters made of strokes, in two colours."""
    rows, columns = np.mgrid[:height, :width]
    letter = (rows // 14 * 131 + columns // 7 * 71) % 97
    stroke = (letter * (rows % 14 // 2 * 5 + columns % 7 + 1) * 37 % 101) < 45
    ink = stroke & (rows % 14 < 10) & (columns % 7 < 6) & (rows > 20) & (columns > 20)
    return np.where(ink[..., None], (0, 20, 60), (255, 250, 240)).astype(np.uint8)


def test_pixels_do_not_depend_on_pillow():
    """The digest is of Pillow's own resize, 11.0.0 and 12.3.0; that of 13 differs by 29 levels."""
    digest = hashlib.sha256()
    for height, width, rows, columns, resample in (
        *((640, 480, 448, 448, 3), (1400, 333, 224, 224, 2), (900, 700, 96, 640, 1)),
        *((50, 40, 448, 448, 3), (480, 640, 448, 448, 3)),
    ):
        image = Image.fromarray(page(height, width))
        digest.update(np.asarray(base.resize(image, rows, columns, resample)).tobytes())
    expected = "1da87f296250c9eb4e955fa76cbf126f745f21af1066f1dc75d267061c65d1ab"
    assert digest.hexdigest() == expected


def test_a_strip_is_made_shorter_first(monkeypatch):
    """Where the rows in between would not fit into memory."""
    monkeypatch.setattr(base, "MAX_WORK_PIXELS", 2000)
    image = Image.fromarray(noise(400, 3))
    found = np.asarray(base.resize(image, 20, 20, Image.Resampling.BICUBIC))
    down = image.resize((3, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, down.resize((20, 20), Image.Resampling.BICUBIC))


def test_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "import efficient_vlm.processing.pictures.native, efficient_vlm.processing.pictures.tiles\n"
        "import efficient_vlm.processing.pictures.resized\n"
        "print([m for m in ('jax', 'torch', 'transformers', 'grain') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
