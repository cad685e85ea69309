"""pool, downsample, pixel_shuffle, m3, position_pool against loops from their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pooling_loops as loops
import pytest
from pooling_cases import WIDTH, assert_row, batches, check, error

from efficient_vlm.compressors import VisualTokens, build, grids, reachable
from efficient_vlm.compressors.between.pooling import space_to_depth
from efficient_vlm.compressors.projectors.gather_pool import position_cells


@pytest.mark.parametrize(
    ("grid", "budget"),
    [((4, 4), 1), ((4, 4), 4), ((4, 4), 7), ((4, 4), 15), ((5, 5), 6), ((3, 5), 11), ((2, 6), 4)],
)
def test_pool(grid, budget):
    check("pool", budget, grid, lambda e, m, _: loops.pool(e, m, grid, budget))


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (4, 6), (3, 20), (7, 1)])
def test_pool_cells_have_equal_areas_at_every_budget(grid):
    num_patches = grid[0] * grid[1]
    assert reachable("pool", grid) == tuple(range(num_patches, 0, -1))
    for budget in range(1, num_patches + 1, 1 if num_patches < 100 else 11):
        bands = grids.bands(grid, budget)
        assert list(bands) == loops.pool_bands(grid, budget), budget
        shares = grids.cover(grid, bands)
        np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-9)
        np.testing.assert_allclose(shares.sum(axis=1), num_patches / budget, atol=1e-9)


@pytest.mark.parametrize("grid", [(4, 4), (4, 6)])
def test_pool_is_average_pool_where_that_exists(grid):
    embed, mask = next(batches(grid[0] * grid[1]))
    tokens = VisualTokens.from_grid(jnp.asarray(embed), grid, mask=jnp.asarray(mask))
    budgets = reachable("average_pool", grid)

    def forward(tokens, name):
        return [build(name, budget=b, grid=grid).apply({}, tokens) for b in budgets]

    pair = jax.jit(lambda tokens: [forward(tokens, name) for name in ("pool", "average_pool")])
    jax.tree.map(np.testing.assert_array_equal, *pair(tokens))


@pytest.mark.parametrize(
    ("grid", "budget"), [((4, 4), 3), ((4, 4), 9), ((4, 4), 15), ((4, 6), 7), ((2, 6), 11)]
)
def test_downsample_of_features(grid, budget):
    check("downsample", budget, grid, lambda e, m, _: loops.downsample(e, m, grid, budget))


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (2, 6), (3, 20)])
def test_downsample_takes_the_largest_image_that_fits(grid):
    previous = 0
    for budget in range(1, grid[0] * grid[1] + 1):
        cells = build("downsample", budget=budget).image_grid(grid)
        assert cells == loops.fitted(grid, budget)
        assert previous <= cells[0] * cells[1] <= budget
        previous = cells[0] * cells[1]
    if grid == (8, 8):
        assert build("downsample", budget=17).image_grid(grid) == (4, 4)
    assert "64" in error(build("downsample", budget=65).image_grid, (8, 8))


def test_downsample_behind_a_resized_image_only_pads():
    grid, budget = (4, 6), 7
    module = build("downsample", budget=budget, grid=grid)
    cells = module.image_grid(grid)
    embed = np.random.default_rng(0).normal(size=(2, 6, WIDTH)).astype(np.float32)
    mask = np.array([[True] * 6, [True, False] * 3])
    given = VisualTokens.from_grid(jnp.asarray(embed), cells, grid, jnp.asarray(mask))
    out = jax.tree.map(np.asarray, jax.jit(module.apply)({}, given))
    given = jax.tree.map(np.asarray, given)
    assert out.embed.shape == (2, budget, WIDTH)
    for field in ("embed", "position", "size", "mask"):
        real = np.where(mask.reshape(mask.shape + (1,) * (getattr(given, field).ndim - 2)), 1, 0)
        np.testing.assert_array_equal(getattr(out, field)[:, :6], getattr(given, field) * real)
        assert not getattr(out, field)[:, 6:].any()
    np.testing.assert_array_equal(out.source, given.source)
    assert out.size.sum() == 24 + 12


@pytest.mark.parametrize(
    "order", ["row_column_feature", "column_row_feature", "feature_row_column"]
)
@pytest.mark.parametrize(("grid", "side"), [((4, 4), 2), ((2, 6), 2), ((3, 6), 3)])
def test_pixel_shuffle_orders(order, grid, side):
    def loop(embed, mask, params):
        row, _ = loops.whole_cells(embed, mask, grid, side)
        channels = loops.side_by_side(embed, mask, grid, side, order)
        return {**row, "embed": channels @ params[f"kernel_{side}x{side}"]}

    check("pixel_shuffle", grid[0] * grid[1] // side**2, grid, loop, order=order)


def test_published_orders():
    """The reshapes of InternVL v2, Swin and unfold, on a grid that is no square."""
    rows, columns, width = 4, 6, 3
    x = np.arange(rows * columns * width).reshape(1, rows, columns, width)

    def ours(order):
        flat = jnp.asarray(x.reshape(1, -1, width))
        return np.asarray(space_to_depth(flat, (rows, columns), (2, 3), order))

    # Columns into channels, swap, rows into channels, swap back.
    y = x.reshape(1, rows, columns // 2, 2 * width).transpose(0, 2, 1, 3)
    y = y.reshape(1, columns // 2, rows // 2, 4 * width).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(ours("row_column_feature"), y.reshape(1, 6, -1))
    corners = [x[:, dy::2, dx::2] for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
    swin = np.concatenate(corners, axis=-1).reshape(1, 6, -1)
    np.testing.assert_array_equal(ours("column_row_feature"), swin)
    image = x[0].transpose(2, 0, 1)  # channels first, as unfold reads it
    blocks = [image[:, r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2, 4)]
    np.testing.assert_array_equal(ours("feature_row_column")[0], np.stack(blocks))


def test_m3_scales():
    assert reachable("m3", (24, 24)) == (576, 144, 36, 9, 1)  # as published
    assert reachable("m3", (4, 6)) == (24, 6, 1)
    assert reachable("m3", (7, 7)) == (49, 1)
    assert reachable("m3", (24, 24), scales=(64, 16)) == (576, 64, 16)


@pytest.mark.parametrize(("grid", "budget"), [((4, 4), 4), ((4, 4), 1), ((6, 6), 9), ((4, 6), 6)])
def test_m3(grid, budget):
    def loop(embed, mask, _):
        bands = [1] if budget == 1 else loops.pool_bands(grid, budget)
        return loops.mean_of_shares(embed, mask, loops.raster(grid), loops.rectangles(grid, bands))

    check("m3", budget, grid, loop)


def test_m3_scales_are_nested():
    """Each scale is the mean of the one before, as long as no patch is padding."""
    embed = np.random.default_rng(0).normal(size=(1, 64, WIDTH)).astype(np.float32)
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (8, 8))
    function = jax.jit(lambda t: [build("m3", budget=b).apply({}, t) for b in (64, 16, 4, 1)])
    outs = [np.asarray(out.embed) for out in function(tokens)]
    for fine, coarse in zip(outs, outs[1:], strict=False):
        side = math.isqrt(coarse.shape[1])
        again = fine.reshape(1, side, 2, side, 2, WIDTH).mean(axis=(2, 4)).reshape(coarse.shape)
        np.testing.assert_allclose(again, coarse, atol=1e-6)


REGIONS = [(3, 4), (2, 6), (4, 2), (1, 12), (0, 0)]


def region_tokens(seed, shuffle):
    """Twelve slots per row, of which each row fills those of its own rectangle."""
    rng = np.random.default_rng(seed)
    positions = np.zeros((len(REGIONS), 12, 2), np.float32)
    mask = np.zeros((len(REGIONS), 12), bool)
    for row, (h, w) in enumerate(REGIONS):
        places = [(r, c) for r in range(h) for c in range(w)]
        if shuffle:
            places = [places[i] for i in rng.permutation(len(places))]
        for n, place in enumerate(places):
            positions[row, n], mask[row, n] = place, True
    embed = rng.normal(size=(len(REGIONS), 12, WIDTH)).astype(np.float32)
    embed = np.where(mask[..., None], embed, np.nan)
    source = np.where(mask, np.arange(12), -1).astype(np.int32)
    return VisualTokens(embed, positions, mask.astype(np.float32), mask, source)


@pytest.mark.parametrize(("budget", "cell"), [(3, None), (4, None), (1, None), (6, 2), (12, 3)])
def test_position_pool_of_images_of_many_shapes(budget, cell):
    module = build("position_pool", budget=budget, cell=cell)
    function = jax.jit(lambda tokens: module.apply({}, tokens))
    for seed in range(4):
        tokens = region_tokens(seed, shuffle=seed > 1)
        out = jax.tree.map(np.asarray, function(tokens))
        for row in range(len(REGIONS)):
            embed = np.nan_to_num(tokens.embed[row])
            expected = loops.position_pool(
                embed, tokens.mask[row], tokens.position[row], budget, cell
            )
            assert_row(out, row, expected)


@pytest.mark.parametrize(("grid", "budget"), [((4, 4), 4), ((4, 4), 5), ((2, 6), 3), ((3, 5), 14)])
def test_position_pool(grid, budget):
    def loop(embed, mask, _):
        return loops.position_pool(embed, mask, loops.raster(grid), budget)

    check("position_pool", budget, grid, loop)


def test_position_pool_as_published():
    """3 x 3 cells of an image, and the scale sqrt(width)."""
    embed = np.random.default_rng(0).normal(size=(1, 54, WIDTH)).astype(np.float32)
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (9, 6))
    module = build("position_pool", budget=6, scaled=True)
    out = jax.jit(module.apply)({}, tokens).embed
    mean = embed.reshape(3, 3, 2, 3, WIDTH).mean(axis=(1, 3)).reshape(1, 6, WIDTH)
    np.testing.assert_allclose(out, mean * math.sqrt(WIDTH), atol=1e-5)
    for budget, patches in ((70, 630), (280, 2520), (1120, 10080)):
        assert build("position_pool", budget=budget).side(patches) == 3


def test_position_pool_never_has_more_cells_than_the_budget():
    far = jnp.asarray([[[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [4.5, 7.0]]])
    cells = np.asarray(jax.jit(position_cells, static_argnums=(2, 3))(far, far[..., 0] >= 0, 1, 2))
    assert cells.min() >= 0
    assert cells.max() < 2
