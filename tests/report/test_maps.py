"""Token maps: which pixels are touched, colours, files."""

import io

import numpy as np
import pytest
from PIL import Image

from efficient_vlm.errors import UserError
from efficient_vlm.report import drawing, maps


def picture(height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def block(drawn, row, column, side=32, inset=4):
    """The inside of one patch of an 8 x 8 grid drawn at 256 px."""
    return drawn[
        row * side + inset : (row + 1) * side - inset,
        column * side + inset : (column + 1) * side - inset,
    ].astype(float)


def test_nothing_compressed_leaves_the_pixels():
    image = picture()
    drawn = maps.token_map(image, np.arange(64))
    np.testing.assert_array_equal(drawn, image.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(drawn, maps.token_map(image, np.arange(64)[::-1]))


def test_kept_clear_dropped_veiled():
    image = picture()
    enlarged = image.repeat(4, 0).repeat(4, 1)
    source = np.full(64, -1)
    source[10], source[37] = 0, 1
    drawn = maps.token_map(image, source)
    for patch in range(64):
        row, column = divmod(patch, 8)
        shown, original = block(drawn, row, column), block(enlarged, row, column)
        if patch in (10, 37):
            np.testing.assert_array_equal(shown, original)
            assert (drawn[row * 32, column * 32 + 5] == 255).all()  # White outline.
        else:
            assert shown.std() < 0.3 * original.std()
            assert np.ptp(shown, axis=-1).max() < 15  # Grey.


def test_merged_patches_share_one_colour_and_one_outline():
    image = np.full((64, 64, 3), 100, np.uint8)
    place = np.arange(8) // 2
    drawn = maps.token_map(image, (place[:, None] * 4 + place).reshape(-1))
    tints = {}
    for patch in range(64):
        row, column = divmod(patch, 8)
        inside = block(drawn, row, column)
        assert inside.std(axis=(0, 1)).max() == 0
        tints.setdefault((row // 2, column // 2), set()).add(tuple(inside[0, 0]))
    assert all(len(colours) == 1 for colours in tints.values())
    for (row, column), colours in tints.items():
        for neighbour in ((row, column + 1), (row + 1, column)):
            assert tints.get(neighbour) != colours
    # No line between patches of one token, a line between tokens.
    assert (drawn[16, 28:36] == drawn[16, 20]).all()
    assert (drawn[16, 60:68] != drawn[16, 20]).any()


def test_merged_tokens_have_colours_of_their_own():
    """20 pairs of patches that lie apart: the two of a pair look alike, others do not."""
    image = np.full((64, 64, 3), 100, np.uint8)
    pairs = np.full(64, -1)
    pairs[:20] = pairs[40:60] = np.arange(20)
    pairs[63] = 20  # Kept alone; it uses up no colour.
    drawn = maps.token_map(image, pairs)
    colours = [tuple(block(drawn, *divmod(patch, 8))[0, 0]) for patch in range(64)]
    assert colours[:20] == colours[40:60]
    assert len(set(colours[:20])) == 20


def test_few_high_scores_do_not_hide_the_others():
    scores = np.linspace(0, 1, 1000)
    assert drawing.score_range(scores) == (0.0, 1.0)
    sink = np.concatenate([scores, [50.0], [np.nan]])
    low, high = drawing.score_range(sink)
    assert (low, round(high, 1)) == (0.0, 1.0)
    assert drawing.score_range(np.array([0.0, 0, 0, 1])) == (0.0, 1.0)
    assert drawing.score_range(np.full(4, np.nan)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "grid"), [((64, 96), (4, 6)), ((50, 70), (5, 7)), ((33, 47), (3, 4))]
)
def test_any_grid_and_size(shape, grid):
    source = np.arange(grid[0] * grid[1]) // 2
    drawn = maps.token_map(picture(*shape), source, grid=grid)
    assert min(drawn.shape[:2]) >= 256
    assert drawn.shape[0] * shape[1] == drawn.shape[1] * shape[0]
    assert drawn.dtype == np.uint8


def test_scores_run_from_dark_to_bright():
    image = np.full((64, 64, 3), 128, np.uint8)
    scores = np.arange(64.0)
    scores[5] = np.nan
    drawn = maps.score_map(image, scores)
    luminance = [block(drawn, *divmod(p, 8)).mean() for p in range(64)]
    assert luminance[63] > luminance[0] + 60
    assert np.corrcoef(np.delete(luminance, 5), np.delete(scores, 5))[0, 1] > 0.95
    np.testing.assert_array_equal(block(drawn, 0, 5), 128)
    assert maps.score_map(image, np.zeros(64)).shape == (256, 256, 3)


def test_png_is_lossless_with_few_and_many_colours():
    few = maps.token_map(np.zeros((64, 64, 3), np.uint8), np.arange(64) // 16)
    many = picture(128, 128)
    for pixels in (few, many):
        np.testing.assert_array_equal(decoded(maps.png(pixels)), pixels)


def example(count=3):
    cells = [maps.Cell("none", 64, np.arange(64), "7")]
    cells += [maps.Cell("stride", 4, np.where(np.arange(64) % 16, -1, np.arange(64) // 16), "1")]
    cells += [maps.Cell("random", 4, np.full(64, -1), "", scores=np.arange(64.0))]
    return maps.Example(picture(), "which digit is red", "7", cells[:count], "needle", 5)


def test_figure_marks_right_and_wrong():
    drawn = decoded(maps.question_figure(example()))
    colours = {tuple(c) for c in drawn.reshape(-1, 3)}
    assert maps.RIGHT in colours
    assert maps.WRONG in colours
    assert drawn.shape[1] > 2 * 256
    only_right = decoded(maps.question_figure(example(1)))
    assert maps.WRONG not in {tuple(c) for c in only_right[300:].reshape(-1, 3)}


def test_tiles_are_the_drawn_arrays():
    """The image, every map with its answer, and a heat map behind the map of its method."""
    given = example()
    shown = list(maps.tiles(given))
    assert [(tile.name, tile.prediction, tile.right) for tile in shown] == [
        ("the image", "", None),
        ("none at 64", "7", True),
        ("stride at 4", "1", False),
        ("random at 4", "", False),
        ("random at 4: scores", "", None),
    ]
    pixels = [given.image.repeat(4, 0).repeat(4, 1)]
    pixels += [maps.token_map(given.image, cell.source) for cell in given.cells]
    pixels.append(maps.score_map(given.image, np.arange(64.0)))
    for tile, drawn in zip(shown, pixels, strict=True):
        np.testing.assert_array_equal(decoded(tile.png), drawn)


@pytest.mark.parametrize(
    "call",
    [
        lambda: maps.token_map(picture(), np.arange(63)),
        lambda: maps.token_map(picture(), np.arange(64), grid=(4, 4)),
        lambda: maps.token_map(picture()[..., 0], np.arange(64)),
        lambda: maps.token_map(picture().astype(np.float32), np.arange(64)),
        lambda: maps.score_map(picture(), np.zeros(10)),
    ],
)
def test_bad_input_is_a_clear_error(call):
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3
