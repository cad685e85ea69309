"""pool, downsample, pixel_shuffle, m3, mqt, molmo_pool, position_pool, minicpm_merger: loops."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pooling_loops as loops
import pytest

from efficient_vlm.audit.traced import traced_flops
from efficient_vlm.compressors import VisualTokens, build, reachable
from efficient_vlm.errors import UserError

WIDTH = 8
FIELDS = ("embed", "position", "size", "mask", "source")


def batches(num_tokens, rows=4):
    """Float32 embed and bool mask; padding is NaN. Random, two values only, all tokens equal."""
    share = np.array([[1.1], [0.7], [0.25], [-1.0]])[:rows]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        embed = rng.normal(size=(rows, num_tokens, WIDTH)).astype(np.float32)
        if seed == 1:
            embed = rng.integers(0, 2, embed.shape).astype(np.float32)
        if seed == 2:
            embed[:] = embed[:, :1]
        mask = rng.random((rows, num_tokens)) < share
        yield np.where(mask[..., None], embed, np.nan), mask


@functools.cache
def compiled(name, budget, grid, options):
    """Jitted (params, embed, mask) -> tokens, and parameters of its shapes."""
    module = build(name, budget=budget, grid=grid, **dict(options))

    def forward(params, embed, mask):
        return module.apply({"params": params}, VisualTokens.from_grid(embed, grid, mask=mask))

    tokens = VisualTokens.from_grid(jnp.ones((1, grid[0] * grid[1], WIDTH)), grid)
    return jax.jit(forward), parameters(module, tokens)


def parameters(module, tokens):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens))
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * x.shape[0] ** -0.5).astype(np.float32),
        shapes.get("params", {}),
    )


def doubles(params):
    return jax.tree.map(np.float64, params)


def check(name, budget, grid, loop, **options):
    """Every row of every batch against loop(embed, mask, params)."""
    function, params = compiled(name, budget, grid, tuple(options.items()))
    for embed, mask in batches(grid[0] * grid[1]):
        out = jax.tree.map(np.asarray, function(params, embed, mask))
        for row in range(len(mask)):
            assert_row(out, row, loop(np.nan_to_num(embed[row]), mask[row], doubles(params)))


def assert_row(out, row, expected):
    for field in FIELDS:
        np.testing.assert_allclose(
            getattr(out, field)[row],
            expected[field],
            rtol=5e-5,
            atol=5e-5,
            err_msg=f"{field}, row {row}",
        )


def error(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


def trace(name, num_tokens=64, width=WIDTH, **settings):
    module = build(name, **settings)
    tokens = VisualTokens.from_grid(jnp.ones((1, num_tokens, width)), (1, num_tokens))
    return jax.eval_shape(module.init, jax.random.key(0), tokens)


# --- pool, downsample -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "budget"),
    [((4, 4), 1), ((4, 4), 4), ((4, 4), 7), ((4, 4), 15), ((5, 5), 6), ((3, 5), 11), ((2, 6), 4)],
)
def test_pool(grid, budget):
    check("pool", budget, grid, lambda e, m, _: loops.pool(e, m, grid, budget))


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (4, 6), (3, 20), (7, 1)])
def test_pool_cells_have_equal_areas_at_every_budget(grid):
    from efficient_vlm.compressors import grids

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


# --- pixel_shuffle --------------------------------------------------------------------------------


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
    from efficient_vlm.compressors.pooling import space_to_depth

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


# --- m3, mqt --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("keys", ["position", "content"])
@pytest.mark.parametrize(("grid", "budget"), [((4, 4), 5), ((2, 6), 1), ((2, 3), 6)])
def test_mqt(keys, grid, budget):
    def loop(embed, mask, params):
        settings = {"num_queries": 7, "heads": 2, "content": keys == "content"}
        return loops.mqt(embed, mask, grid, budget, params, **settings)

    check("mqt", budget, grid, loop, num_queries=7, num_heads=2, keys=keys, features=5)


def test_mqt_looks_where_the_image_cannot_tell_it():
    """With keys of positions alone the attention is the same for every image."""
    first, second, _ = [e[:1] for e, _ in batches(16)]
    every = np.ones((1, 16), bool)
    outs = {}
    for keys in ("position", "content"):
        options = tuple({"num_queries": 7, "num_heads": 2, "keys": keys}.items())
        function, params = compiled("mqt", 5, (4, 4), options)
        outs[keys] = [function(params, x, every) for x in (first, second)]
    places = {k: [np.asarray(o.position) for o in pair] for k, pair in outs.items()}
    np.testing.assert_allclose(*places["position"], atol=1e-6)
    assert np.abs(np.subtract(*places["content"])).max() > 1e-3


def test_mqt_queries_are_nested():
    embed, mask = next(batches(16))
    long, params = compiled("mqt", 7, (4, 4), (("num_queries", 7), ("num_heads", 2)))
    short, _ = compiled("mqt", 3, (4, 4), (("num_queries", 7), ("num_heads", 2)))
    a, b = short(params, embed, mask).embed, long(params, embed, mask).embed
    np.testing.assert_allclose(a, np.asarray(b)[:, :3], atol=1e-5)


# --- molmo_pool, position_pool --------------------------------------------------------------------


@pytest.mark.parametrize("query", ["mean", "first"])
@pytest.mark.parametrize(
    ("grid", "side", "options"),
    [
        ((4, 4), 2, {}),
        ((3, 5), 2, {"head_dim": 3, "hidden_dim": 6, "features": 5}),
        ((5, 5), 3, {"features": 4}),
        ((2, 3), 1, {}),
        ((2, 3), 3, {"hidden_dim": 4}),
    ],
)
def test_molmo_pool(query, grid, side, options):
    budget = math.ceil(grid[0] / side) * math.ceil(grid[1] / side)

    def loop(embed, mask, params):
        return loops.molmo(embed, mask, grid, side, params, heads=2, query=query)

    check("molmo_pool", budget, grid, loop, num_heads=2, query=query, **options)


def test_molmo_published_counts():
    assert 144 in reachable("molmo_pool", (24, 24))
    assert reachable("molmo_pool", (27, 27))[:3] == (729, 196, 81)
    assert build("molmo_pool", budget=196, num_heads=16).flops(729, 64) > 0


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
    from efficient_vlm.compressors.gather_pool import position_cells

    far = jnp.asarray([[[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [4.5, 7.0]]])
    cells = np.asarray(jax.jit(position_cells, static_argnums=(2, 3))(far, far[..., 0] >= 0, 1, 2))
    assert cells.min() >= 0
    assert cells.max() < 2


# --- minicpm_merger -------------------------------------------------------------------------------


@pytest.mark.parametrize("quarter", ["window", "final"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_minicpm_one_merger(quarter, grid):
    def loop(embed, mask, params):
        own = params[quarter]
        if quarter == "window":
            return loops.window_merger(embed, mask, grid, own, heads=2)
        return loops.final_merger(embed, mask, grid, own)

    options = {"num_heads": 2, "hidden_dim": 6, "quarter": quarter}
    check("minicpm_merger", grid[0] * grid[1] // 4, grid, loop, **options)


def test_minicpm_both_mergers():
    grid = (4, 8)

    def loop(embed, mask, params):
        first = loops.window_merger(embed, mask, grid, params["window"], heads=2)
        second = loops.final_merger(first["embed"], first["mask"], (2, 4), params["final"])
        return loops.chained(first, second)

    check("minicpm_merger", 2, grid, loop, num_heads=2, hidden_dim=6)


def test_minicpm_stages():
    module = build("minicpm_merger", budget=64, parent=None)  # 448 pixels: 32 x 32 to 64
    stages = module.stages(27, 1024)
    assert [(s.layer, s.module.budget, s.inside) for s in stages] == [
        (7, 256, False),
        (27, 64, False),
    ]
    assert stages[1].module.grid == (16, 16)
    four = build("minicpm_merger", budget=256, layer=3, parent=None)
    assert [s.layer for s in four.stages(27, 1024)] == [3]
    assert [s.layer for s in four.clone(quarter="final").stages(27, 1024)] == [27]
    assert build("minicpm_merger", budget=1024, parent=None).stages(27, 1024) == ()
    assert "compressor.layer" in error(module.stages, 6, 1024)
    assert "64, 256, 1024" in error(module.clone(budget=100).stages, 27, 1024)


def test_minicpm_stages_are_the_method():
    """The modules of the stages, one behind the other, with their own parameters."""
    grid = (4, 4)
    embed, mask = next(batches(16))
    tokens = VisualTokens.from_grid(jnp.asarray(embed), grid, mask=jnp.asarray(mask))
    function, params = compiled("minicpm_merger", 1, grid, (("num_heads", 2), ("hidden_dim", 6)))
    module = build("minicpm_merger", budget=1, grid=grid, num_heads=2, hidden_dim=6, parent=None)
    out = tokens
    for stage, name in zip(module.stages(9, 16), ("window", "final"), strict=True):
        out = jax.jit(stage.module.apply)({"params": params[name]}, out)
    whole = function(params, embed, mask)
    for field in FIELDS:
        np.testing.assert_allclose(getattr(out, field), getattr(whole, field), atol=1e-5)


# --- all ------------------------------------------------------------------------------------------

METHODS = [
    ("pool", 7, {}),
    ("pool", 6, {}),
    ("downsample", 11, {}),
    ("pixel_shuffle", 4, {"order": "feature_row_column"}),
    ("m3", 4, {}),
    ("mqt", 5, {"num_heads": 2, "features": 12}),
    ("mqt", 5, {"num_heads": 2, "keys": "content"}),
    ("molmo_pool", 4, {"num_heads": 2, "features": 12}),
    ("molmo_pool", 9, {"num_heads": 4, "hidden_dim": 6}),
    ("position_pool", 5, {}),
    ("minicpm_merger", 4, {"num_heads": 2}),
    ("minicpm_merger", 1, {"num_heads": 2, "hidden_dim": 6}),
]


@pytest.mark.parametrize(("name", "budget", "options"), METHODS)
def test_flops_are_those_of_the_program(name, budget, options):
    grid = (6, 6) if name == "molmo_pool" and budget == 9 else (4, 4)
    module = build(name, budget=budget, grid=grid, **options)
    tokens = VisualTokens.from_grid(jnp.ones((1, grid[0] * grid[1], WIDTH)), grid)
    params = {"params": parameters(module, tokens)}
    assert module.flops(grid[0] * grid[1], WIDTH) == traced_flops(module.apply, params, tokens)


@pytest.mark.parametrize(("name", "budget", "options"), METHODS[6::2])
def test_gradients_and_bfloat16(name, budget, options):
    """Finite gradients, none into padding; bfloat16 stays bfloat16."""
    if name == "molmo_pool" and budget == 9:
        budget = 4
    function, params = compiled(name, budget, (4, 4), tuple(options.items()))
    embed, mask = next(batches(16))

    def loss(params, embed):
        out = function(params, embed, mask)
        return jnp.sum(jnp.sin(out.embed.astype(jnp.float32)) * out.mask[..., None]), out

    embed = jnp.asarray(embed, jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), gradients = both(params, embed)
    assert out.embed.dtype == jnp.bfloat16
    assert out.size.dtype == jnp.float32
    for leaf in jax.tree.leaves((out, gradients)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    assert not np.asarray(gradients[1], np.float32)[~mask].any()


@pytest.mark.parametrize("name", ["pool", "downsample", "m3", "position_pool", "minicpm_merger"])
def test_full_budget_is_the_identity(name):
    embed, mask = next(batches(16))
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (4, 4), mask=jnp.asarray(mask))
    module = build(name, budget=16, **({"num_heads": 2} if name == "minicpm_merger" else {}))
    jax.tree.map(np.testing.assert_array_equal, module.apply({}, tokens), tokens)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("pixel_shuffle", {"order": "row_column_featur"}, "did you mean 'row_column_feature'"),
        ("m3", {"scales": "16"}, "compressor.scales"),
        ("m3", {"scales": (16, 0)}, "compressor.scales"),
        ("mqt", {"keys": "positions"}, "did you mean 'position'"),
        ("mqt", {"num_queries": 0}, "compressor.num_queries"),
        ("mqt", {"features": -1}, "compressor.features"),
        ("molmo_pool", {"query": "men"}, "did you mean 'mean'"),
        ("molmo_pool", {"head_dim": 0}, "compressor.head_dim"),
        ("molmo_pool", {"hidden_dim": "x"}, "compressor.hidden_dim"),
        ("position_pool", {"cell": 0}, "compressor.cell"),
        ("position_pool", {"scaled": "yes"}, "compressor.scaled"),
        ("minicpm_merger", {"layer": -1}, "compressor.layer"),
        ("minicpm_merger", {"quarter": "windw"}, "did you mean 'window'"),
        ("minicpm_merger", {"hidden_dim": 0}, "compressor.hidden_dim"),
    ],
)
def test_bad_options(name, settings, said):
    assert said in error(build, name, budget=16, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("pool", {"budget": 65}, "1 to 64"),
        ("downsample", {"budget": 65}, "1 to 64"),
        ("m3", {"budget": 32}, "1, 4, 16, 64"),
        ("m3", {"budget": 16, "scales": (16, 5)}, "5 is not an average pool"),
        ("m3", {"budget": 144, "scales": (144, 64), "grid": (24, 24)}, "not whole cells"),
        ("mqt", {"budget": 9, "num_queries": 8, "num_heads": 2}, "1 to 8"),
        ("mqt", {"budget": 9, "num_heads": 3}, "does not divide the width 8"),
        ("molmo_pool", {"budget": 10, "num_heads": 2}, "1, 4, 9, 16, 64"),
        ("molmo_pool", {"budget": 16, "num_heads": 3}, "does not divide the width 8"),
        ("position_pool", {"budget": 65}, "1 to 64"),
        ("minicpm_merger", {"budget": 8, "num_heads": 2}, "4, 16, 64"),
        ("minicpm_merger", {"budget": 16, "num_heads": 3}, "does not divide the width 8"),
    ],
)
def test_settings_that_do_not_fit(name, settings, said):
    num_tokens = math.prod(settings.get("grid", (8, 8)))
    assert said in error(trace, name, num_tokens, **settings)
