"""Pixels, tiles, counts and text of the picture processors against those of transformers."""

from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import BatchFeature  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.gemma3.image_processing_pil_gemma3 import (  # noqa: E402
    Gemma3ImageProcessorPil,
)
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor  # noqa: E402
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (  # noqa: E402
    GotOcr2ImageProcessorPil,
)
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor  # noqa: E402
from transformers.models.internvl.processing_internvl import InternVLProcessor  # noqa: E402
from transformers.models.llava.image_processing_pil_llava import (  # noqa: E402
    LlavaImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: E402
    Qwen2VLImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import (  # noqa: E402
    SiglipImageProcessorPil,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import (  # noqa: E402
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string  # noqa: E402

from efficient_vlm.errors import UserError  # noqa: E402
from efficient_vlm.processing.pictures import base  # noqa: E402
from efficient_vlm.processing.pictures.internvl import InternVLPictures  # noqa: E402
from efficient_vlm.processing.pictures.native import Qwen2VLPictures, Qwen3VLPictures  # noqa: E402
from efficient_vlm.processing.pictures.resized import LlavaPictures  # noqa: E402
from efficient_vlm.processing.pictures.smolvlm import SmolVLMPictures  # noqa: E402
from efficient_vlm.processing.pictures.stretched import (  # noqa: E402
    Gemma3Pictures,
    PaliGemmaPictures,
)

pytestmark = pytest.mark.parity

SIZES = [(1, 1), (5, 7), (336, 336), (480, 640), (333, 501), (700, 201), (3, 1000), (1000, 3)]
USUAL = [size for size in SIZES if max(size) <= 200 * min(size)]  # What Qwen accepts.


@pytest.fixture(autouse=True)
def across_then_down(monkeypatch):
    """Their calls of Pillow in the order of passes of its versions up to 12, which 13 changes."""
    plain = Image.Image.resize

    def resize(self, size, resample=None, box=None, reducing_gap=None):
        assert box is None and reducing_gap is None
        return plain(plain(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize)


def picture(height, width):
    """Half gradient, half noise: smooth and sharp content in one."""
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1)
    noise = np.random.default_rng(height * 7919 + width).integers(0, 256, ramp.shape)
    left = (columns < width // 2)[..., None]
    return Image.fromarray(np.where(left, ramp, noise).astype(np.uint8))


def theirs(processor, image, **options):
    """The features with pixels in [0, 1] before normalisation."""
    return processor.preprocess(image, do_normalize=False, return_tensors="np", **options)


def same_pixels(ours, pixels):
    """`pixels`: [M, 3, H, W] of transformers."""
    assert ours.images.shape == np.moveaxis(pixels, 1, -1).shape
    assert ours.images.dtype == np.float32
    np.testing.assert_allclose(ours.images, np.moveaxis(pixels, 1, -1), rtol=0, atol=1e-6)


def same_statistics(ours, processor):
    assert ours.mean == pytest.approx(processor.image_mean)
    assert ours.std == pytest.approx(processor.image_std)


# ---- one square ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_clip_crop(size):
    settings = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = CLIPImageProcessorPil(**settings)
    ours = LlavaPictures.from_hf(processor.to_dict(), {})
    same_statistics(ours, processor)
    same_pixels(ours(picture(*size)), theirs(processor, picture(*size))["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_llava_pad(size):
    settings = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaImageProcessorPil(**settings, do_pad=True)
    ours = LlavaPictures.from_hf(processor.to_dict(), {})
    assert ours.pad
    same_pixels(ours(picture(*size)), theirs(processor, picture(*size))["pixel_values"])


CLIP_SIZES = [
    {"shortest_edge": 60},
    {"shortest_edge": 40, "longest_edge": 60},
    {"height": 60, "width": 60},
    {"height": 42, "width": 71},
    60,
    [60, 60],
]


@pytest.mark.parametrize("size", CLIP_SIZES, ids=str)
@pytest.mark.parametrize("crop", [{"height": 42, "width": 42}, 60])
@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_sizes_by_their_keys(size, crop, kind):
    """Larger and smaller than the crop, with and without a crop and padding."""
    if isinstance(size, list):
        size = dict(zip(("height", "width"), size, strict=True))
    for cut, pad in ((True, False), (True, True), (False, True), (False, False)):
        processor = kind(size=size, crop_size=crop, do_center_crop=cut, do_pad=pad)
        seen = {
            name: theirs(processor, picture(*s)) for name, s in (("a", (91, 120)), ("b", (70, 31)))
        }
        shapes = {features["pixel_values"].shape for features in seen.values()}
        try:
            ours = LlavaPictures.from_hf(processor.to_dict(), {})
        except UserError:
            # Refused only where the reference gives no square of one size.
            assert len(shapes) > 1 or len({*next(iter(shapes))[2:]}) > 1
            continue
        same_pixels(ours(picture(91, 120)), seen["a"]["pixel_values"])
        same_pixels(ours(picture(70, 31)), seen["b"]["pixel_values"])


def test_pixels_are_those_of_torch_within_one_level():
    """torch resizes 8-bit pictures across first as well, with weights rounded otherwise."""
    import torch

    image = picture(640, 480)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (448, 448), mode="bicubic", antialias=True)
    got = base.resize(image, 448, 448, Image.Resampling.BICUBIC)
    difference = np.asarray(got).astype(int) - expected[0].permute(1, 2, 0).numpy()
    assert abs(difference).max() <= 1


def test_a_crop_smaller_than_the_resized_picture():
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 61}, crop_size={"height": 42, "width": 42}
    )
    ours = LlavaPictures.from_hf(processor.to_dict(), {})
    same_pixels(ours(picture(91, 120)), theirs(processor, picture(91, 120))["pixel_values"])


@pytest.mark.parametrize("edge", [224, 448])
@pytest.mark.parametrize("size", SIZES)
def test_paligemma(size, edge):
    processor = SiglipImageProcessorPil(size={"height": edge, "width": edge})
    ours = PaliGemmaPictures.from_hf(processor.to_dict(), {})
    same_statistics(ours, processor)
    same_pixels(ours(picture(*size)), theirs(processor, picture(*size))["pixel_values"])


@pytest.mark.parametrize("size", [*SIZES, (900, 300), (300, 310), (500, 1900), (1100, 257)])
@pytest.mark.parametrize("scan", [False, True])
def test_gemma3(size, scan):
    processor = Gemma3ImageProcessorPil(
        size={"height": 224, "width": 224},
        do_pan_and_scan=scan,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    config = {"mm_tokens_per_image": 16}
    ours = Gemma3Pictures.from_hf(processor.to_dict(), config, pan_and_scan=scan)
    same_statistics(ours, processor)
    expected = theirs(processor, picture(*size))
    got = ours(picture(*size))
    same_pixels(got, expected["pixel_values"])
    one = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
    text = Gemma3Processor.replace_image_token(
        SimpleNamespace(full_image_sequence=one), expected, 0
    )
    assert got.text == text
    assert ours.count(*size) == text.count("<image_soft_token>")


def test_gemma3_ignores_what_its_image_processor_was_saved_with():
    """The settings that reach the image processor are those of the processor's class."""
    saved = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=3)
    given = Gemma3Processor.images_kwargs
    assert given["do_pan_and_scan"] is False
    ours = Gemma3Pictures.from_hf(saved, {}, pan_and_scan=True)
    assert ours.min_crop == given["pan_and_scan_min_crop_size"]
    assert ours.max_crops == given["pan_and_scan_max_num_crops"]
    assert ours.min_ratio == given["pan_and_scan_min_ratio_to_activate"]
    processor = Gemma3ImageProcessorPil(**saved, size={"height": 56, "width": 56})
    features = theirs(processor, picture(300, 900), **given)
    assert (
        len(features["pixel_values"]) == 1 == Gemma3Pictures.from_hf(saved, {}).views(300, 900)[0]
    )


# ---- tiles ---------------------------------------------------------------------------------------

SMOL = {
    "256M": dict(longest=2048, tile=512, patch=16, shuffle=4),
    "2.2B": dict(longest=1536, tile=384, patch=14, shuffle=3),
    "idefics3": dict(longest=4 * 364, tile=364, patch=14, shuffle=2),
    "huge": dict(longest=9000, tile=700, patch=14, shuffle=2),
}


def smol(longest, tile, patch, shuffle, **fields):
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, **fields
    )
    config = {
        "scale_factor": shuffle,
        "vision_config": {"image_size": tile, "patch_size": patch},
    }
    return processor, SmolVLMPictures.from_hf(processor.to_dict(), config)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("name", "size"),
    [*(("256M", size) for size in SIZES), ("2.2B", (480, 640)), ("2.2B", (640, 481)),
     ("idefics3", (333, 501)), ("huge", (64, 3000)), ("huge", (3000, 50))],
)  # fmt: skip
def test_smolvlm(name, size, split):
    processor, ours = smol(**SMOL[name], do_image_splitting=split)
    same_statistics(ours, processor)
    expected = theirs(processor, picture(*size), return_row_col_info=True)
    got = ours(picture(*size))
    same_pixels(got, expected["pixel_values"][0])
    assert (expected["pixel_attention_mask"] == 1).all()  # No tile has padding.
    patches = ours.tile // ours.patch
    np.testing.assert_array_equal(got.valid, np.full((len(got.images), 2), patches))
    rows, columns = np.ravel(expected["rows"]), np.ravel(expected["cols"])
    tokens = {"fake_token_around_image": "<fake_token_around_image>", "image_token": "<image>"}
    text = get_image_prompt_string(
        int(rows[0]), int(columns[0]), ours.grid**2, global_image_token="<global-img>", **tokens
    )
    assert got.text == text
    assert ours.count(*size) == text.count("<image>")
    me = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>",
        image_token="<image>",
        image_seq_len=ours.grid**2,
    )
    layout = {"rows": [[int(rows[0])]], "cols": [[int(columns[0])]]}
    assert got.text == Idefics3Processor.replace_image_token(me, layout, 0)


@pytest.mark.parametrize("size", [{"height": 64, "width": 96}, 64, {"height": 20, "width": 90}])
def test_smolvlm_stretched(size):
    """Height and width instead of the longest edge; an integer is both."""
    processor = SmolVLMImageProcessorPil(size=size, max_image_size={"longest_edge": 32})
    config = {"scale_factor": 2, "vision_config": {"image_size": 32, "patch_size": 8}}
    ours = SmolVLMPictures.from_hf(processor.to_dict(), config)
    for shape in SIZES:
        same_pixels(ours(picture(*shape)), theirs(processor, picture(*shape))["pixel_values"][0])


def test_smolvlm_tiny_tiles():
    """Where the picture fits one tile, there is no second view of it."""
    processor, ours = smol(longest=32, tile=32, patch=8, shuffle=2)
    for size in SIZES:
        expected = theirs(processor, picture(*size), return_row_col_info=True)
        got = ours(picture(*size))
        same_pixels(got, expected["pixel_values"][0])
        assert len(got.images) == 1


def test_smolvlm_counts_many_sizes():
    random = np.random.default_rng(0)
    processor, ours = smol(longest=80, tile=20, patch=5, shuffle=2)
    for height, width in random.integers(1, 200, (150, 2)).tolist():
        pixels = theirs(processor, picture(height, width))["pixel_values"][0]
        assert ours.count(height, width) == len(pixels) * 4, (height, width)


def internvl(**fields):
    """Smaller tiles: the arrangement depends on the aspect, and on the area only for ties."""
    size = {"height": 56, "width": 56}
    processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, **fields)
    return processor, InternVLPictures.from_hf(processor.to_dict(), {})


@pytest.mark.parametrize("fields", [{}, {"max_patches": 1}, {"min_patches": 2, "max_patches": 6}])
@pytest.mark.parametrize("size", [*SIZES, (100, 100), (80, 80), (60, 120), (112, 224)])
def test_internvl(size, fields):
    processor, ours = internvl(**fields)
    expected = theirs(processor, picture(*size))
    got = ours(picture(*size))
    same_pixels(got, expected["pixel_values"])
    me = SimpleNamespace(
        start_image_token="<img>",
        end_image_token="</img>",
        image_token="<IMG_CONTEXT>",
        image_seq_length=4,
    )
    assert got.text == InternVLProcessor.replace_image_token(me, expected, 0)
    assert ours.count(*size) == got.text.count("<IMG_CONTEXT>")


def test_internvl_at_the_published_size():
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    ours = InternVLPictures.from_hf(processor.to_dict(), {})
    got = ours(picture(768, 1024))
    same_pixels(got, theirs(processor, picture(768, 1024))["pixel_values"])
    assert got.grids.tolist() == [[16, 16]] * len(got.images)


def test_internvl_counts_many_sizes():
    random = np.random.default_rng(1)
    processor, ours = internvl()
    for height, width in random.integers(1, 400, (500, 2)).tolist():
        tiles = processor.get_number_of_image_patches(height, width)
        assert ours.count(height, width) == tiles * 4, (height, width)


# ---- native resolution ---------------------------------------------------------------------------

QWEN = [
    (Qwen2VLPictures, {}),
    (Qwen2VLPictures, {"min_pixels": 100 * 100, "max_pixels": 200 * 200}),
    (Qwen3VLPictures, dict(patch_size=16, size=dict(shortest_edge=256**2, longest_edge=4096**2))),
]


def unpatchified(features: BatchFeature, patch: int) -> np.ndarray:
    """[1, 3, H, W] of patches in 2 x 2 blocks, each (channel, time, row, column)."""
    _, rows, columns = features["image_grid_thw"][0]
    blocks = features["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)
    still = blocks[:, :, :, :, :, 0]
    np.testing.assert_array_equal(still, blocks[:, :, :, :, :, 1])
    image = np.einsum("rcijkpq->kripcjq", still)
    return image.reshape(1, 3, rows * patch, columns * patch)


@pytest.mark.parametrize(("family", "settings"), QWEN)
@pytest.mark.parametrize("size", [*USUAL, (768, 1024), (4, 800), (14, 42), (1300, 1100)])
def test_qwen(family, settings, size):
    processor = Qwen2VLImageProcessorPil(**settings)
    ours = family.from_hf({**processor.to_dict(), "image_mean": None, "image_std": None}, {})
    expected = theirs(processor, picture(*size))
    got = ours(picture(*size))
    same_pixels(got, unpatchified(expected, ours.patch))
    grid = expected["image_grid_thw"][0, 1:]
    np.testing.assert_array_equal(got.valid[0], grid)
    np.testing.assert_array_equal(got.grids[0], grid // 2)
    assert ours.count(*size) == grid.prod() // 4 == got.text.count("<|image_pad|>")


@pytest.mark.parametrize(("family", "settings"), QWEN)
def test_qwen_counts_many_sizes(family, settings):
    random = np.random.default_rng(2)
    processor = Qwen2VLImageProcessorPil(**settings)
    ours = family.from_hf(processor.to_dict(), {})
    for height, width in random.integers(20, 3000, (300, 2)).tolist():
        patches = processor.get_number_of_image_patches(height, width)
        assert ours.count(height, width) == patches // 4, (height, width)


def test_qwen2_statistics_are_those_of_the_class():
    same_statistics(Qwen2VLPictures(), Qwen2VLImageProcessorPil())
