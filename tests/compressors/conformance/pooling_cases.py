"""Batches and comparisons that the tests of pooling methods share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.compressors import VisualTokens, build
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
