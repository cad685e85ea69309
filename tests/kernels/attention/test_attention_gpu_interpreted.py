"""The Hopper kernels in Pallas' GPU interpreter: numbers and barriers, without a GPU.

The interpreter of JAX 0.11 and newer has no product whose left side is in registers: that one is
replaced by the same product in plain JAX; everything else is what a GPU would run. Races are not
looked for: it reports one in any pipeline that reads fast memory into registers, such as JAX's own
with a body of one addition.
"""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_vlm.kernels.attention import attention, platforms

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("Pallas' GPU interpreter needs JAX 0.11", allow_module_level=True)

from jax._src import effects
from jax._src.pallas.mosaic_gpu import core

from efficient_vlm.kernels.attention import hopper as gpu
from efficient_vlm.kernels.attention.hopper import kernels as gpu_kernels

SHAPE = (2, 2, 1, 140, 200, 64, 64)
SETS = [
    ("plain",),
    ("bias", "softcap"),
    ("causal", "lengths"),
    ("segments", "window", "bias"),
    ("prefix", "positions", "importance"),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels are interpreted."""

    def added(total, a, b):
        return total + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

    plain = gpu.kernel_options

    def options():
        return plain() | {"interpret": plgpu.InterpretGPUParams()}

    monkeypatch.setattr(gpu_kernels, "_added", added)
    monkeypatch.setattr(gpu, "kernel_options", options)
    # Only lowering for a GPU knows this effect of wgmma; the interpreter has none.
    for kinds in (effects.lowerable_effects, effects.control_flow_allowed_effects):
        kinds.add_type(core._WGMMAPipelineEffect)
    with platforms.interpreted():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("features", SETS, ids=" + ".join)
def test_forward_backward_and_importance(features):
    compare(SHAPE, cases.options(features, SHAPE))


@pytest.mark.slow
def test_masks_of_models():
    compare(SHAPE, {"mask": cases.mask_of_models(140, 200)})


@pytest.mark.slow
def test_values_of_another_width():
    shape = (*SHAPE[:-1], 65)
    compare(shape, cases.options(("bias", "importance"), shape))


def compare(shape, given):
    """Outputs and gradients beside the reference."""
    q, k, v = (jnp.asarray(x, jnp.float16) for x in cases.arrays(shape))
    moved = [q, k, v]
    names = [name for name in ("key_bias", "importance_weights") if name in given]
    moved += [jnp.asarray(given.pop(name)) for name in names]
    rng = np.random.default_rng(0)
    sizes = ((*q.shape[:3], v.shape[-1]), q.shape[:3], (len(q), k.shape[2]))
    ways = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]

    def both(implementation, *moved):
        def outputs(q, k, v, *rest):
            more = dict(zip(names, rest, strict=True))
            found = attention(q, k, v, implementation=implementation, **more, **given)
            lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
            parts = (found.out.astype(jnp.float32), lse, found.importance)
            return tuple(x for x in parts if x is not None)

        found, pull = jax.vjp(outputs, *moved)
        return *found, *pull(tuple(ways[: len(found)]))

    exact = [x.astype(jnp.float32) for x in moved]
    for one, two in zip(both("gpu", *moved), both("reference", *exact), strict=True):
        scale = max(1.0, float(jnp.abs(two).max()))
        np.testing.assert_allclose(one.astype(jnp.float32) / scale, two / scale, atol=4e-3)
