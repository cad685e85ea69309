"""`build` and the mistakes a user can make with it."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build, names, needs, options, reachable
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError


def call(module, num_tokens=64, text=True, width=8):
    """Traces the module on a batch of two, without compiling."""

    def forward(embed):
        tokens = VisualTokens.from_grid(embed, (1, num_tokens))
        signals = Signals(text=jnp.ones((2, 4))) if text else Signals()
        return module.init_with_output(jax.random.key(0), tokens, signals)[0]

    return jax.eval_shape(forward, jax.ShapeDtypeStruct((2, num_tokens, width), jnp.float32))


def error(function, *args, **kwargs):
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


def test_table():
    assert set(names()) == {
        "none", "random", "stride", "average_pool", "pool", "downsample", "text_topk",
        "visionselector",
        "pixel_shuffle", "mlp", "deco", "c_abstractor", "ldp", "ldpv2", "tokenpacker", "perceiver",
        "qformer", "resampler", "molmo_pool", "position_pool", "minicpm_merger", "m3", "mqt",
        "tome", "encoder_cut", "prumerge", "prumerge_plus", "visionzip", "fastervlm", "vispruner",
        "divprune", "cdpruner", "hiprune", "scope", "fastv", "pyramiddrop", "sparsevlm", "feather",
        "v2drop", "dart", "fitprune", "vtw", "pixelprune",
        "tofu", "ipcv", "encoder_exit",
    }  # fmt: skip
    assert options("resampler") == ("grid", "position_policy", "num_queries", "num_heads")
    assert "class_token" not in options("tome") and "entering" not in options("sparsevlm")
    assert needs("text_topk") == {"text"} == build("text_topk", budget=1).needs
    assert needs("random") == set()


@pytest.mark.parametrize("name", names())
def test_settings_from_a_config_file(name):
    """Lists, NumPy-like ints and an explicit parent, as configs and modules pass them."""
    budget = METHODS[name].min_budget and 64
    module = build(name, budget=budget, grid=[8, 8], parent=None)
    assert module.grid == (8, 8)
    assert hash(module) == hash(build(name, budget=budget, grid=(8, 8), parent=None))
    for policy in ("retain", "reindex", None):
        build(name, budget=budget, position_policy=policy)
    message = error(build, name, budget=budget, position_policy="keep")
    assert "retain" in message


@pytest.mark.parametrize(
    ("name", "grid", "expected"),
    [
        ("none", (8, 8), (64,)),
        ("average_pool", (8, 8), (64, 16, 4, 1)),
        ("average_pool", (24, 24), (576, 144, 64, 36, 16, 9, 4, 1)),
        ("average_pool", (4, 6), (24, 12, 8, 6, 4, 3, 2, 1)),
        ("average_pool", (7, 7), (49, 1)),
        ("pixel_shuffle", (8, 8), (64, 16, 4, 1)),
        ("pixel_shuffle", (4, 6), (24, 6)),
        ("pixel_shuffle", (3, 4), (12,)),
        ("downsample", (4, 4), tuple(range(16, 0, -1))),
        ("pool", (2, 3), (6, 5, 4, 3, 2, 1)),
        ("random", (2, 3), (6, 5, 4, 3, 2, 1)),
        ("text_topk", (1, 2), (2, 1)),
    ],
)
def test_reachable(name, grid, expected):
    assert reachable(name, grid, budget=3) == expected
    for budget in expected:
        out = call(build(name, budget=budget, grid=grid), grid[0] * grid[1])
        assert out.embed.shape[1] == budget


def test_reachable_of_resampler_depends_on_its_queries():
    assert reachable("resampler", (8, 8), num_queries=3) == (64, 3, 2, 1)
    assert reachable("resampler", (2, 2), num_queries=9) == (4, 3, 2, 1)


def test_downsample_asks_for_a_smaller_image():
    assert build("downsample", budget=9).image_grid((8, 8)) == (3, 3)
    assert build("downsample", budget=64).image_grid((8, 8)) == (8, 8)
    assert build("downsample", budget=6).image_grid((4, 6)) == (2, 3)
    assert build("average_pool", budget=16).image_grid((8, 8)) == (8, 8)
    assert build("downsample", budget=17).image_grid((8, 8)) == (4, 4)  # the rest is padding
    message = error(build("downsample", budget=65).image_grid, (8, 8))
    assert "compressor.budget" in message
    assert "64" in message


@pytest.mark.parametrize("budget", [0, -3, 2.5, "16", True, None])
@pytest.mark.parametrize("name", ["random", "average_pool"])
def test_budget_must_be_a_positive_integer(name, budget):
    message = error(build, name, budget=budget)
    assert "compressor.budget" in message
    assert ("missing" if budget is None else repr(budget)) in message


@pytest.mark.parametrize("name", names())
def test_budget_above_the_number_of_patches(name):
    message = error(call, build(name, budget=65, grid=(8, 8)))
    assert "compressor.budget" in message
    assert "65" in message
    assert ("0" if name == "vtw" else "64") in message.splitlines()[1]


@pytest.mark.parametrize(
    ("name", "budget", "allowed"),
    [
        ("average_pool", 32, "1, 4, 16, 64"),
        ("pixel_shuffle", 5, "1, 4, 16, 64"),
        ("m3", 50, "1, 4, 16, 64"),
        ("none", 16, "64"),
    ],
)
def test_unreachable_budget_names_the_reachable_ones(name, budget, allowed):
    lines = error(call, build(name, budget=budget)).splitlines()
    assert f"cannot give {budget}" in lines[0]
    assert lines[1].strip() == f"allowed: {allowed}"
    call(build(name, budget=int(lines[2].rpartition("=")[2])))  # the advice works


def test_unreachable_budget_of_resampler():
    assert "1 to 8, 64" in error(call, build("resampler", budget=9, num_queries=8))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("text_topkk", {}, "did you mean 'text_topk'"),
        ("Random", {}, "did you mean 'random'"),
        (None, {}, "compressor.name"),
        ("random", {"sead": 3}, "did you mean 'seed'"),
        ("stride", {"seed": 3}, "unknown name 'seed'"),
        ("random", {"seed": "a"}, "compressor.seed"),
        ("average_pool", {"grid": 8}, "compressor.grid"),
        ("average_pool", {"grid": (0, 8)}, "compressor.grid"),
        ("text_topk", {"bias": "ad"}, "did you mean 'add'"),
        ("text_topk", {"dim": 9, "num_heads": 2}, "compressor.dim=10"),
        ("resampler", {"num_queries": 0}, "compressor.num_queries"),
        ("resampler", {"num_heads": 1.5}, "compressor.num_heads"),
        ("pixel_shuffle", {"features": 0}, "compressor.features"),
        ("pixel_shuffle", {"budgets": (64, 4)}, "not in compressor.budgets"),
        ("pixel_shuffle", {"budgets": "16"}, "compressor.budgets"),
        ("pixel_shuffle", {"budgets": 3.5}, "compressor.budgets: 3.5"),
        ("pixel_shuffle", {"order": ["row"]}, "compressor.order"),
        ("m3", {"scales": 7.5}, "compressor.scales: 7.5"),
        ("fastervlm", {"attention": ["cls"]}, "compressor.attention"),
        ("tome", {"class_token": True}, "unknown name 'class_token'"),
    ],
)
def test_wrong_settings(name, settings, said):
    assert said in error(build, name, budget=16, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "num_tokens", "said"),
    [
        ("average_pool", {}, 60, "not a square"),
        ("average_pool", {"grid": (4, 4)}, 64, "has 16 cells"),
        ("resampler", {"num_heads": 3}, 64, "does not divide the width 8"),
        ("text_topk", {"num_heads": 3}, 64, "compressor.num_heads"),
        ("pixel_shuffle", {"budgets": (16, 5)}, 64, "5 is not a budget"),
    ],
)
def test_settings_that_do_not_fit_the_input(name, settings, num_tokens, said):
    assert said in error(call, build(name, budget=16, **settings), num_tokens)


def test_missing_signal():
    message = error(call, build("text_topk", budget=4), text=False)
    assert "signals.text" in message
    assert "text_topk" in message


def test_pixel_shuffle_without_the_matrix_of_a_budget():
    tokens = VisualTokens.from_grid(jnp.ones((1, 16, 4)), (4, 4))
    params = build("pixel_shuffle", budget=4).init(jax.random.key(0), tokens)
    message = error(build("pixel_shuffle", budget=1).apply, params, tokens)
    assert "kernel_4x4" in message
    assert "compressor.budgets" in message


def test_files_stay_short():
    here = pathlib.Path(__file__).parents[2] / "efficient_vlm" / "compressors"
    assert all(len(f.read_text().splitlines()) <= 300 for f in here.glob("*.py"))


def test_import_is_light():
    """Compressors pull in JAX, Flax and the rooms below them, no other one and no plotting."""
    code = (
        "import sys, efficient_vlm.compressors; "
        "print(*(m for m in sys.modules if m.startswith('efficient_vlm.')), "
        "*({'matplotlib', 'tensorflow', 'grain', 'optax', 'tokenizers'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = ("compressors", "nn", "kernels", "checks", "errors", "shapes", "sharding")
    allowed = tuple(f"efficient_vlm.{room}" for room in rooms)
    assert [m for m in done.stdout.split() if not m.startswith(allowed)] == []
