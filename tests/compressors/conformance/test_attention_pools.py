"""mqt, molmo_pool, minicpm_merger against loops; options, FLOPs and gradients of all pools."""

import math

import attention_pool_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pooling_cases import (
    FIELDS,
    WIDTH,
    assert_row,
    batches,
    check,
    compiled,
    doubles,
    error,
    parameters,
    trace,
)

from efficient_vlm.compressors import VisualTokens, build, reachable
from efficient_vlm.costs.traced import traced_flops


def pairs(params, label):
    """(matrix or scale, bias or None) of every layer of a method, by its name there."""
    names = [name for name in params if name.endswith(("_kernel", "_scale"))]
    biases = {name: params.get(f"{name.rsplit('_', 1)[0]}_bias") for name in names}
    layer = {name: name.removeprefix(f"{label}_").rsplit("_", 1)[0] for name in names}
    return {layer[name]: (params[name], biases[name]) for name in names}


def mqt_arrays(params):
    layers = pairs(params, "mqt")
    products = [*(layers[n] for n in ("query", "key", "value", "out")), layers["projection"][0]]
    norms = [layers[f"{name}_norm"] for name in ("query", "key", "value")]
    return params["mqt_queries"], products, norms


def molmo_arrays(params):
    layers = pairs(params, "molmo_pool")
    products = dict(W_q="query", W_k="key", W_v="value", W_o="out")
    swiglu = [layers[name][0] for name in ("gate", "up", "down") if name in layers] or None
    return dict(swiglu=swiglu, **{symbol: layers[name] for symbol, name in products.items()})


def window_arrays(params):
    layers = pairs(params["window"], "minicpm_window")
    attention = ("norm", "query", "key", "value", "out")
    return [[layers[n] for n in names] for names in (attention, ("merge_norm", "up", "down"))]


def final_arrays(params):
    layers = pairs(params["final"], "minicpm_final")
    return [layers[name] for name in ("norm", "up", "down")]


@pytest.mark.parametrize("keys", ["position", "content"])
@pytest.mark.parametrize(("grid", "budget"), [((4, 4), 5), ((2, 6), 1), ((2, 3), 6)])
def test_mqt(keys, grid, budget):
    def loop(embed, mask, params):
        settings = {"budget": budget, "heads": 2, "content": keys == "content"}
        return loops.mqt(embed, mask, grid, *mqt_arrays(params), **settings)

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
        return loops.molmo(embed, mask, grid, side, **molmo_arrays(params), heads=2, query=query)

    check("molmo_pool", budget, grid, loop, num_heads=2, query=query, **options)


def test_molmo_published_counts():
    assert 144 in reachable("molmo_pool", (24, 24))
    assert reachable("molmo_pool", (27, 27))[:3] == (729, 196, 81)
    assert build("molmo_pool", budget=196, num_heads=16).flops(729, 64) > 0


@pytest.mark.parametrize("quarter", ["window", "final"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_minicpm_one_merger(quarter, grid):
    def loop(embed, mask, params):
        if quarter == "window":
            return loops.window_merger(embed, mask, grid, *window_arrays(params), heads=2)
        return loops.final_merger(embed, mask, grid, final_arrays(params))

    options = {"num_heads": 2, "hidden_dim": 6, "quarter": quarter}
    check("minicpm_merger", grid[0] * grid[1] // 4, grid, loop, **options)


def test_minicpm_both_mergers():
    grid = (4, 8)

    def loop(embed, mask, params):
        first = loops.window_merger(embed, mask, grid, *window_arrays(params), heads=2)
        second = loops.final_merger(first["embed"], first["mask"], (2, 4), final_arrays(params))
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


@pytest.mark.parametrize("name", ["molmo_pool", "minicpm_merger"])
def test_a_bias_of_the_tokens_is_added_to_the_logits(name):
    """A NaN bias of padding has no effect; after the attention the bias is discarded."""
    grid, options = (4, 4), {"num_heads": 2, "hidden_dim": 6}
    module = build(name, budget=4, grid=grid, **options)
    _, params = compiled(name, 4, grid, tuple(options.items()))
    embed, mask = next(batches(16))
    bias = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32) * 3

    @jax.jit
    def forward(embed, mask, bias):
        tokens = VisualTokens.from_grid(embed, grid, mask=mask).replace(bias=bias)
        return module.apply({"params": params}, tokens)

    out = forward(embed, mask, np.where(mask, bias, np.nan))
    assert out.bias is None
    for row in range(len(mask)):
        shown = np.nan_to_num(embed[row]), mask[row], grid
        settings, arrays = dict(heads=2, bias=bias[row]), doubles(params)
        if name == "molmo_pool":
            given = molmo_arrays(arrays)
            expected = loops.molmo(*shown, 2, **given, query="mean", **settings)
        else:
            expected = loops.window_merger(*shown, *window_arrays(arrays), **settings)
        assert_row(out, row, expected)


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
