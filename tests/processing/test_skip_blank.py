"""`skip_blank`: what is left of a picture without its blank tiles."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efficient_vlm as evlm
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets, published
from efficient_vlm.families.table import family_of
from efficient_vlm.processing.pictures.internvl import InternVLPictures
from efficient_vlm.processing.pictures.smolvlm import SmolVLMPictures
from efficient_vlm.processing.pictures.tiles import is_blank

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TILE = 32
TILES = dict(tile=TILE, patch=8, shuffle=2)
READERS = {
    "smolvlm": SmolVLMPictures(**TILES, longest=4 * TILE),
    "internvl": InternVLPictures(**TILES),
}
# Tiles with something on them, row by row; the second row has nothing.
INKED = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)


def page(inked=INKED, level=0):
    """A white page with noise on some tiles; elsewhere channels are up to `level` darker."""
    random = np.random.default_rng(0)
    rows, columns = inked.shape
    picture = random.integers(255 - level, 256, (rows * TILE, columns * TILE, 3))
    for row, column in np.argwhere(inked):
        # The middle alone: resizing must not carry ink into the tiles beside it.
        area = np.s_[row * TILE + 8 : row * TILE + 24, column * TILE + 8 : column * TILE + 24]
        picture[area] = random.integers(0, 256, (16, 16, 3))
    return picture.astype(np.uint8)


def skipping(name, level):
    return dataclasses.replace(READERS[name], skip_blank=level)


@pytest.mark.parametrize("name", READERS)
def test_what_is_left_is_as_it_was(name):
    full, found = READERS[name](page()), skipping(name, 0)(page())
    kept = [*np.flatnonzero(INKED), 12]  # The whole picture is the last of 13.
    assert len(full.images) == 13 and len(found.images) == 4
    for field in ("images", "valid", "grids", "boxes"):
        np.testing.assert_array_equal(getattr(found, field), getattr(full, field)[kept])
    assert READERS[name].count(*page().shape[:2]) == skipping(name, 0).count(96, 128) == 52


def test_prompt_of_smolvlm():
    four, around = "<image>" * 4, "<fake_token_around_image>"
    whole = f"{around}<global-img>{four}{around}"
    first = f"{around}<row_1_col_1>{four}{around}<row_1_col_4>{four}"
    assert skipping("smolvlm", 0)(page()).text == (
        f"{first}\n{around}<row_3_col_2>{four}\n\n{whole}"
    )
    blank = skipping("smolvlm", 0)(np.full((90, 120, 3), 7, np.uint8))
    assert blank.text == whole and len(blank.images) == 1
    assert blank.text == SmolVLMPictures(**TILES, split=False).text(90, 120)


def test_prompt_of_internvl():
    reader = skipping("internvl", 0)
    assert reader(page()).text == f"<img>{'<IMG_CONTEXT>' * 16}</img>"
    blank = reader(np.full((96, 128, 3), 7, np.uint8))
    assert blank.text == f"<img>{'<IMG_CONTEXT>' * 4}</img>" and len(blank.images) == 1
    # A single tile is the whole picture itself.
    alone = InternVLPictures(**TILES, max_tiles=1, skip_blank=255)(page())
    assert len(alone.images) == 1


@pytest.mark.parametrize("name", READERS)
def test_nearly_blank(name):
    """Channels of 252 to 255: within 2 of their median, not within 1."""
    near = page(level=3)
    assert len(skipping(name, 1)(near).images) == 13
    assert len(skipping(name, 2)(near).images) == 4
    assert len(skipping(name, 255)(near).images) == 1


def test_the_median_is_of_each_channel():
    colour = np.full((8, 8, 3), (10, 200, 90), np.uint8)
    assert is_blank(Image.fromarray(colour), 0)
    colour[3, 3, 1] = 230  # One pixel of 64 does not move the median.
    assert not is_blank(Image.fromarray(colour), 29) and is_blank(Image.fromarray(colour), 30)
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4] = 5  # Half way, at 2.5.
    assert not is_blank(Image.fromarray(halves), 2) and is_blank(Image.fromarray(halves), 3)


@pytest.mark.parametrize("name", READERS)
def test_sizes_tell_the_most(name):
    reader, plain = skipping(name, 3), READERS[name]
    for size in ((96, 128), (40, 200), (31, 30)):
        assert reader.count(*size) == plain.count(*size) and reader.text(*size) == plain.text(*size)
        noise = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        np.testing.assert_array_equal(reader(noise).images, plain(noise).images)
        assert reader(noise).text == plain(noise).text
    notes = presets.get("internvl3-1b", options=dict(skip_blank=0))["notes"]
    assert any("at most" in note for note in notes)


@pytest.mark.parametrize("value", [-1, 256, True, 0.5, "0"])
def test_bad_levels(value):
    with pytest.raises(UserError, match="skip_blank") as error:
        InternVLPictures(skip_blank=value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["molmo-7b-d", "molmo2-4b"])
def test_crops_that_share_rows_cannot_be_left_out(name):
    entry = published.get(name)
    with pytest.raises(UserError, match="rows of visual tokens run across all crops") as error:
        family_of(entry["config"]).processor(
            entry["image_processor"], entry["config"], skip_blank=0
        )
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "internvl"])
def test_a_model_encodes_the_rest_as_before(name):
    """The encoder's tokens of the tiles that stay are what they are among all tiles."""
    picture = Image.fromarray(page()).resize((64, 48), Image.Resampling.NEAREST)
    tokens, kept = [], [*np.flatnonzero(INKED), 12]
    for options in ({}, {"skip_blank": 0}):
        vlm = evlm.from_pretrained(GOLDEN / name, **options)
        made = vlm.pictures(picture)
        slot = vlm.family.image_token(vlm.config)
        request = vlm.place([[1, *[slot] * int(made.grids.prod(1).sum()), 5]], [[made]])
        assert np.isfinite(vlm.logits(request)).all()
        pictures, params = request.inputs.pictures, {"params": vlm.params}
        tokens.append(request.model.apply(params, pictures, method="encode")[0])
    full, rest = (np.asarray(getattr(part, "embed", part)) for part in tokens)
    full = full.reshape(13, -1, full.shape[-1])[kept]
    np.testing.assert_allclose(rest.reshape(full.shape), full, atol=1e-5)
