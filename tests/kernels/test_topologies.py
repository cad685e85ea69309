"""Accelerator types of Cloud TPU against rows of its own tables."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from efficient_vlm.cli import audit_kernels_gpu
from efficient_vlm.costs.compiled import chips
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import aot, aot_gpu
from efficient_vlm.kernels.attention import attention
from efficient_vlm.kernels.attention.tpu import blocks
from efficient_vlm.kernels.topologies import topology_of

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)
# cloud.google.com/tpu/docs: pages v5e and v6e (chips), v5p, v4 and tpu7x (TensorCores), default
# shapes.
TABLE = {
    **{"v5e-1": "v5e:1x1", "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4"},
    **{"v5litepod-8": "v5e:2x4", "v5litepod-32": "v5e:4x8", "v5litepod-256": "v5e:16x16"},
    **{"v6e-1": "v6e:1x1", "v6e-8": "v6e:2x4", "v6e-64": "v6e:8x8", "v6e-128": "v6e:8x16"},
    **{"v4-8": "v4:2x2x1", "v4-16": "v4:2x2x2", "v4-32": "v4:2x2x4", "v4-64": "v4:2x4x4"},
    **{"v4-512": "v4:4x8x8", "v4-1536": "v4:8x8x12", "v4-4096": "v4:8x16x16"},
    **{"v5p-8": "v5p:2x2x1", "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8"},
    **{"v5p-512": "v5p:4x8x8", "v5p-768": "v5p:4x8x12", "v5p-1152": "v5p:4x12x12"},
    **{"v5p-1280": "v5p:4x8x20", "v5p-3072": "v5p:8x12x16", "v5p-3840": "v5p:8x12x20"},
    **{"tpu7x-8": "tpu7x:2x2x1", "tpu7x-16": "tpu7x:2x2x2", "tpu7x-64": "tpu7x:2x4x4"},
    **{"tpu7x-128": "tpu7x:4x4x4", "tpu7x-4096": "tpu7x:8x16x16"},
    **{"v5p-6912": "v5p:12x12x24", "v5p-12288": "v5p:16x16x24", "v5p-17920": "v5p:16x20x28"},
}


@pytest.mark.parametrize(("name", "topology"), TABLE.items())
def test_accelerator_types(name, topology):
    assert topology_of(name) == topology
    generation, _, shape = topology.partition(":")
    cores = 2 if generation in ("v4", "v5p", "tpu7x") else 1
    assert int(name.partition("-")[2]) == cores * math.prod(map(int, shape.split("x")))


def test_shapes_stay_as_they_are():
    for name in ("v5e:2x4", "v5p:8x8x4", "tpu7x:2x2x1", "h100:8", "all", "h100", ""):
        assert topology_of(name) == name


def test_gpus_too():
    assert chips.topology_of("h100-8") == "h100:8" and chips.chip_of("h100-8").gpu
    assert chips.topology_of("v5e-8") == "v5e:2x4"
    assert chips.chip_of("v5litepod-8") is chips.CHIPS["v5e"]
    assert chips.chip_of("v4-8").hbm_limit == 30.75 * 2**30  # What libtpu says is available.
    for name, minor in (("b200", 0), ("b300", 3)):
        assert chips.topology_of(f"{name}-8") == f"{name}:8" and chips.chip_of(f"{name}:8").gpu
        described = aot_gpu.GPUS[name]
        assert (described["major"], described["minor"]) == (10, minor)
        # What is sold is less than what the driver reports.
        assert 0.9 * described["memory"] < chips.chip_of(f"{name}-8").hbm_limit


@pytest.mark.parametrize("name", chips.CHIPS)
def test_figures_of_a_chip(name):
    """Products of a chip, over the page of its maker: a device of tpu7x has half."""
    published = {
        **{"v5e": (197, 819), "v6e": (918, 1640), "v5p": (459, 2765), "v4": (275, 1200)},
        **{"tpu7x": (2307, 7380), "a100": (312, 2039), "h100": (989, 3350), "h200": (989, 4800)},
        **{"b200": (2250, 8000), "b300": (2250, 8000)},
    }
    chip = chips.CHIPS[name]
    found = chip.devices * chip.flops / 1e12, chip.devices * chip.hbm_bytes_per_second / 1e9
    assert found == published[name] and chip.devices == (2 if name == "tpu7x" else 1)


@needs_libtpu
def test_devices_of_a_tpu7x():
    """Two at each place; what libtpu calls them, our tables of fast memory know."""
    devices = chips.devices_of("tpu7x-8")
    assert len(devices) == 8 == 2 * len({tuple(d.coords) for d in devices})
    assert len(chips.devices_of("tpu7x:1x1x1")) == 2
    mesh = Mesh(np.array(devices[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert blocks.chip() == "tpu7x"
    shape = jax.ShapeDtypeStruct((1, 12, 1024, 64), jnp.bfloat16)

    def call(q, k, v):
        return attention(q, k, v, causal=True).out

    program = aot.compile_for(devices[0], call, shape, shape, shape)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.skipif(not aot_gpu.installed(), reason="needs the extra aot-gpu")
@pytest.mark.parametrize("gpu", ["h100", "b200", "b300"])
def test_a_described_gpu_gets_its_path(gpu):
    """Hopper's kernels on Hopper; XLA's attention, and no kernel of ours, on Blackwell."""
    shape = jax.ShapeDtypeStruct((1, 12, 1024, 64), jnp.bfloat16)

    def call(q, k, v):
        return attention(q, k, v, key_bias=jnp.zeros(k.shape[::2])).out

    text = aot_gpu.compile_for_gpu(call, shape, shape, shape, gpu=gpu).as_text()
    assert ("mosaic_gpu" in text) == (gpu == "h100")


def test_kernels_of_a_described_gpu():
    """`audit kernels`: what is compiled for each, and that the rows say which path it is."""
    for gpu in aot_gpu.GPUS:
        listed = audit_kernels_gpu.programs_of(gpu, quick=True)
        hopper = gpu in ("h100", "h200")
        assert {p.kernel for p in listed if "attention" in p.kernel} == {
            "attention" if hopper else "attention (xla)"
        }
        assert any(program.calls for program in listed) == hopper


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-7", ["counts chips", "v5e-4, v5e-8"]),
        ("v5litepod-512", ["v5litepod-256"]),
        ("v5p-4", ["TensorCores, two a chip", "v5p-8"]),
        ("v5p-9", ["v5p-8, v5p-16"]),
        ("v5p-130", ["v5p-128, v5p-256"]),
        ("v5p-1300", ["v5p-1280, v5p-1536"]),  # 1408 has a side of 44, longer than a pod.
        ("v4-9000", ["v4-8192"]),
        ("tpu7x-4", ["TensorCores, two a chip", "tpu7x-8"]),
        ("v7x-8", ["v7x is not among", "fix: for example --topology=tpu7x-8"]),
        ("ironwood-8", ["fix: for example --topology=tpu7x-8"]),
        ("v3-8", ["v3 is not among", "v5e-8"]),
        ("v5litepd-8", ["fix: for example --topology=v5litepod-8"]),
    ],
)
def test_no_such_slice(name, words):
    with pytest.raises(UserError) as caught:
        topology_of(name)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert all(word in message for word in words), message
