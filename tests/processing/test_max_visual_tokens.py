"""`max_visual_tokens`: never exceeded, announced exactly, the most that a family's rule gives."""

import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.errors import UserError
from efficient_vlm.families import published
from efficient_vlm.families.table import family_of
from efficient_vlm.processing.pictures.internvl import InternVLPictures
from efficient_vlm.processing.pictures.molmo import Molmo
from efficient_vlm.processing.pictures.molmo2 import Molmo2
from efficient_vlm.processing.pictures.native import Qwen2VLPictures, Qwen3VLPictures, most_within
from efficient_vlm.processing.pictures.resized import LlavaPictures, MobileVLMPictures
from efficient_vlm.processing.pictures.siglip import SiglipPictures
from efficient_vlm.processing.pictures.smolvlm import SmolVLMPictures
from efficient_vlm.processing.pictures.stretched import Gemma3Pictures, PaliGemmaPictures

TESTS = Path(__file__).resolve().parents[1]
# Family -> class, fields of a tiny one, text of a visual slot, fewest tokens of a tiny picture.
TILES = dict(tile=32, patch=8, shuffle=2)
TINY = {
    "smolvlm": (SmolVLMPictures, dict(TILES, longest=128), "<image>", 4),
    "smolvlm uneven": (SmolVLMPictures, dict(TILES, longest=150), "<image>", 4),
    "smolvlm stretched": (SmolVLMPictures, dict(TILES, stretch=(96, 160)), "<image>", 4),
    "smolvlm odd": (SmolVLMPictures, dict(tile=33, patch=8, shuffle=2, longest=99), "<image>", 4),
    "internvl": (InternVLPictures, TILES, "<IMG_CONTEXT>", 4),
    "internvl, 3 at least": (InternVLPictures, dict(TILES, min_tiles=3), "<IMG_CONTEXT>", 16),
    "qwen2-vl": (Qwen2VLPictures, dict(patch=4, min_pixels=256), "<|image_pad|>", 4),
    "qwen3-vl": (Qwen3VLPictures, dict(patch=4, min_pixels=300), "<|image_pad|>", 5),
    "molmo": (Molmo, dict(crop=48, patch=8, max_crops=5, margins=(2, 2)), "<im_patch>", 18),
    "molmo2": (Molmo2, dict(crop=12, patch=4, max_crops=4, margins=(1, 1)), "<im_patch>", 8),
    "gemma3": (
        Gemma3Pictures,
        dict(size=32, patch=8, grid=2, pan_and_scan=True, min_crop=16),
        "<image_soft_token>",
        4,
    ),
    "llava": (LlavaPictures, dict(grid=3), "<image>", 9),
    "llava, CLS": (LlavaPictures, dict(grid=3, class_feature=True), "<image>", 10),
    "mobilevlm": (MobileVLMPictures, dict(grid=2), "<image>", 4),
    "paligemma": (PaliGemmaPictures, dict(size=42), "<image>", 9),
    "tinyllava": (SiglipPictures, dict(size=30), "<image>", 4),
}
# Of every shape, from a pixel to strips.
SIZES = [(1, 1), (2, 300), (390, 2), (3, 11), (97, 61), (256, 256)]
SIZES += [tuple(map(int, size)) for size in np.random.default_rng(0).integers(1, 400, (60, 2))]


def noise(height, width):
    random = np.random.default_rng(height * 1000 + width)
    return random.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", TINY)
def test_never_more_and_as_announced(name):
    family, fields, slot, least = TINY[name]
    unlimited = family(**fields)
    for limit in (least, least + 1, 2 * least, 37, 60):
        limit = max(limit, least)
        reader = family(**fields, max_visual_tokens=limit)
        for number, size in enumerate(SIZES):
            tokens = reader.count(*size)
            assert 1 <= tokens <= limit and tokens <= unlimited.count(*size)
            assert reader.text(*size).count(slot) == tokens
            if unlimited.count(*size) <= limit:
                assert reader.views(*size) == unlimited.views(*size)
                assert tokens == unlimited.count(*size)
            if number < 9:
                made = reader(noise(*size))
                assert made.text == reader.text(*size)
                assert made.images.shape[:3] == reader.views(*size)
                places = made.slots if made.slots is not None else made.pool_index
                assert tokens == (made.grids.prod(1).sum() if places is None else len(places))


@pytest.mark.parametrize("name", TINY)
def test_the_least_is_named_in_three_lines(name):
    family, fields, _, least = TINY[name]
    assert family(**fields, max_visual_tokens=least).least == least
    for value in (least - 1, 0, -5, True, 2.5, "64"):
        with pytest.raises(UserError) as error:
            family(**fields, max_visual_tokens=value)
        lines = str(error.value).splitlines()
        assert len(lines) <= 3 and "max_visual_tokens" in lines[0]
        if value == least - 1 > 0:
            assert f"allowed: {least} or more" in lines[1]


# ---- the most that fits --------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4, 11, 20, 28, 40, 52, 68])
def test_smolvlm_keeps_the_most_tiles_along_the_longer_edge(limit):
    """What its published processor makes of another `size.longest_edge`, down to the pixels."""
    reader = SmolVLMPictures(**TILES, longest=128, max_visual_tokens=limit)
    others = [SmolVLMPictures(**TILES, longest=32 * along) for along in (1, 2, 3, 4)]
    for number, size in enumerate(SIZES):
        fitting = [other for other in others if other.count(*size) <= limit]
        assert reader.count(*size) == max(other.count(*size) for other in fitting)
        if number < 9:
            found, expected = reader(noise(*size)), fitting[-1](noise(*size))
            np.testing.assert_array_equal(found.images, expected.images)
            assert found.text == expected.text


def test_a_square_of_an_odd_tile_stays_a_picture():
    """The published rounding to even edges makes it 34 x 33, more than one tile of 33."""
    reader = SmolVLMPictures(tile=33, patch=8, shuffle=2, longest=99, max_visual_tokens=4)
    made = reader(np.kron(np.eye(8, dtype=np.uint8)[..., None] * 255, np.ones((8, 8, 3), np.uint8)))
    assert made.images.shape[:3] == (1, 33, 33) and made.images.std() > 0.25


@pytest.mark.parametrize("limit", [4, 7, 12, 27, 28, 52, 1000])
def test_internvl_chooses_among_as_many_tiles_as_fit(limit):
    reader = InternVLPictures(**TILES, max_visual_tokens=limit)
    affordable = max(n for n in range(1, 13) if 4 * (n + (n > 1)) <= max(limit, 4))
    other = InternVLPictures(**TILES, max_tiles=affordable)
    assert [reader.arrangement(*s) for s in SIZES] == [other.arrangement(*s) for s in SIZES]


@pytest.mark.parametrize("family", [Molmo, Molmo2])
@pytest.mark.parametrize("limit", [392, 500, 700, 900])
def test_molmo_enlarges_least_among_the_crops_that_fit(family, limit):
    reader = family(max_visual_tokens=limit)
    margin, window, most = 8 * 14, reader.crop - 8 * 14, reader.max_crops

    def tokens(tiling):
        edges = (
            [count * window + margin for count in (1, 1)]
            if tiling is None
            else [count * window + margin for count in tiling]
        )
        return int(np.prod([-(-edge // 28) for edge in edges]))

    every = itertools.product(range(1, most + 1), repeat=2)
    every = [t for t in every if t[0] * t[1] <= most and tokens(None) + tokens(t) <= limit]
    every.sort(key=lambda t: (t[0] * t[1], t[0]))
    for height, width in np.random.default_rng(1).integers(120, 3000, (100, 2)):
        height, width = int(height), int(width)
        inner = height - margin, width - margin
        scale = {t: min(Fraction(t[i] * window, inner[i]) for i in (0, 1)) for t in every}
        enough = [t for t in every if scale[t] >= 1]
        best = min(enough, key=scale.get) if enough else max(every, key=scale.get)
        assert reader.tiling(height, width) == best
        assert reader.count(height, width) == tokens(None) + tokens(best)


def test_the_largest_grid_of_one_scale():
    """Against every grid whose two edges some scale rounds down to."""
    for height, width in SIZES:
        for limit in (1, 2, 5, 12, 30):
            grids = [
                (rows, columns)
                for rows in range(1, limit + 1)
                for columns in range(1, limit // rows + 1)
                # Edges per cell: above the next count's, at most this count's.
                if max(Fraction(height, rows + 1), Fraction(width, columns + 1))
                < min(Fraction(height, rows), Fraction(width, columns))
            ]
            strip = (1, limit) if height <= width else (limit, 1)
            best = max(grids, key=lambda grid: grid[0] * grid[1], default=strip)
            assert most_within(height, width, limit) == best


def test_qwen_has_at_least_what_as_many_pixels_give():
    for limit in (4, 10, 100, 777):
        reader = Qwen2VLPictures(max_visual_tokens=limit)
        other = Qwen2VLPictures(max_pixels=limit * 28 * 28)
        for height, width in np.random.default_rng(2).integers(20, 3000, (200, 2)):
            assert reader.count(height, width) >= min(other.count(height, width), limit)
            assert reader.count(height, width) <= limit
    # 200 : 1, which the published rule leaves a row of 44; and too small, which it rounds up to 8.
    assert Qwen2VLPictures(max_pixels=10 * 784).count(28, 5600) == 44
    assert Qwen2VLPictures(max_visual_tokens=10).size(28, 5600) == (28, 280)
    assert Qwen2VLPictures().count(10, 30) == 8
    assert Qwen2VLPictures(max_visual_tokens=4).count(10, 30) == 4


def test_gemma_has_as_many_cuts_as_fit():
    fields = dict(pan_and_scan=True)
    size = (700, 2800)
    assert Gemma3Pictures(**fields).count(*size) == 5 * 256
    counts = [Gemma3Pictures(**fields, max_visual_tokens=256 * n).count(*size) for n in range(1, 7)]
    assert counts == [256 * n for n in (1, 1, 3, 4, 5, 5)]


# ---- where it is set -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.names())
def test_every_family_with_pictures_has_it(name):
    entry = published.get(name)
    family = family_of(entry["config"])
    if entry["image_processor"] is None:
        assert "max_visual_tokens" not in family.picture_options
        return
    assert "max_visual_tokens" in family.picture_options
    make = lambda **options: family.processor(entry["image_processor"], entry["config"], **options)  # noqa: E731
    least = make().least
    assert make(max_visual_tokens=least).count(768, 1024) <= least
    with pytest.raises(UserError, match=f"{least} or more"):
        make(max_visual_tokens=least - 1)


@pytest.mark.parametrize("name", ["smolvlm", "llava", "qwen2_vl"])
def test_a_model_refuses_before_it_reads_weights(name, tmp_path):
    for path in (TESTS / "golden" / name).iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="max_visual_tokens: 1\n"):
        evlm.from_pretrained(tmp_path, max_visual_tokens=1)


def test_the_table_of_the_page_is_what_the_code_counts():
    page = (TESTS.parent / "docs" / "pictures.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| (\d+) x (\d+) \|(.*)\|$", page, re.MULTILINE)
    head = re.search(r"^\| model \| picture \| unset \|(.*)\|$", page, re.MULTILINE)
    limits = [None, *json.loads(f"[{head[1].replace('|', ',')}]")]
    assert len(rows) >= 12
    for name, height, width, cells in rows:
        entry = published.get(name)
        family = family_of(entry["config"])
        for limit, cell in zip(limits, cells.split("|"), strict=True):
            try:
                reader = family.processor(
                    entry["image_processor"], entry["config"], max_visual_tokens=limit
                )
                found = f"{reader.count(int(height), int(width)):,}"
            except UserError:
                found = "error"
            assert cell.strip() == found, (name, limit)
