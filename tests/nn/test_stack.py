"""Stretches of a stack of layers: the same numbers however they are taken out of it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from efficient_vlm.nn.stack import LayerStack, unstack

LAYERS, WIDTH = 8, 64


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, item=None):
        y = jnp.tanh(x @ self.param("kernel", nn.initializers.normal(), (WIDTH, WIDTH)))
        return y, y.sum() + (0 if item is None else item)


def layer(block, x, item):
    return block(x, item)


def run(params, x, start, stop, items=None, **options):
    return LayerStack(Block(), params, ("layers",)).run(layer, x, start, stop, items, **options)


@pytest.fixture
def stack():
    kernel = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    return {"kernel": kernel}, jax.random.normal(jax.random.key(1), (3, WIDTH))


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 8), (3, 4)])
def test_any_stretch_any_way(stack, start, stop):
    params, x = stack
    items = jnp.arange(float(stop - start))
    expected, outputs = x, []
    for i in range(start, stop):
        own = {"params": {"kernel": params["kernel"][i]}}
        expected, output = Block().apply(own, expected, items[i - start])
        outputs.append(output)
    for differentiated in (True, False):
        options = dict(differentiated=differentiated)
        y, found = run(params, x, start, stop, items, **options)
        assert jnp.allclose(y, expected, atol=1e-6)
        assert jnp.allclose(found, jnp.stack(outputs), atol=1e-4)
    split = unstack({"layers": params})["layers"]
    y, found = run(split, x, start, stop, list(items))
    assert jnp.allclose(y, expected, atol=1e-6)


def test_a_stretch_is_not_copied_for_inference(stack):
    """Half of seven billion parameters would be several gigabytes."""
    params, x = stack
    size = params["kernel"].nbytes

    def temporaries(differentiated):
        def stretch(params, x):
            return run(params, x, 1, 7, differentiated=differentiated)[0]

        return jax.jit(stretch).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(False) < size / 4 < size / 2 < temporaries(True)
