"""`flops` against what XLA counts in the program it is given."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build

WIDTH, TEXT_WIDTH = 128, 96

# XLA also counts norms, softmax, the sorts and the book-keeping of positions and sizes; at this
# width they are a small part of the matrix products.
TOLERANCE = 0.10
# The two small matrices of `downsample` are not much dearer than the weighting by size beside them.
TOLERANCE_DOWNSAMPLE = 0.20


def counted(module, grid):
    """FLOPs that XLA's cost analysis finds in the lowered program for one image."""
    tokens = VisualTokens.from_grid(jnp.zeros((1, grid[0] * grid[1], WIDTH)), grid)
    signals = Signals(text=jnp.zeros((1, TEXT_WIDTH)))
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, signals)
    lowered = jax.jit(module.apply).lower(nn.unbox(params), tokens, signals)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("name", "budget", "options"),
    [
        ("pixel_shuffle", 16, {}),
        ("pixel_shuffle", 4, {"features": 256}),
        ("resampler", 16, {}),
        ("resampler", 4, {"num_heads": 8}),
        ("visionselector", 16, {"dim": 64}),
        ("text_topk", 16, {}),
        ("text_topk", 64, {"dim": 64, "num_heads": 4}),
        ("downsample", 25, {}),
    ],
)
def test_agrees_with_xla(name, budget, options):
    module = build(name, budget=budget, **options)
    tolerance = TOLERANCE_DOWNSAMPLE if name == "downsample" else TOLERANCE
    expected = pytest.approx(counted(module, (8, 8)), rel=tolerance)
    assert module.flops(64, WIDTH, TEXT_WIDTH) == expected


@pytest.mark.parametrize("name", ["none", "average_pool", "random", "stride", "downsample"])
def test_methods_without_matrices_cost_nothing(name):
    budget = 64 if name == "none" else 16
    assert build(name, budget=budget).flops(64, WIDTH, TEXT_WIDTH) == 0


@pytest.mark.parametrize("name", ["pixel_shuffle", "resampler", "downsample"])
def test_the_identity_costs_nothing(name):
    assert build(name, budget=64).flops(64, WIDTH, TEXT_WIDTH) == 0


def test_text_topk_scores_at_the_full_budget_unless_nothing_reads_them():
    assert build("text_topk", budget=64).flops(64, 8, 4) == 2 * 4 * 8 + 2 * 64 * 8 * 8 + 2 * 64 * 8
    assert build("text_topk", budget=64, bias="none").flops(64, 8, 4) == 0
