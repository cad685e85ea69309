"""Accelerator types of Cloud TPU against rows of its own tables."""

import math

import pytest

from efficient_vlm.costs.compiled import chips
from efficient_vlm.errors import UserError
from efficient_vlm.kernels.topologies import topology_of

# cloud.google.com/tpu/docs: pages v5e and v6e (chips), v5p and v4 (TensorCores), default shapes.
TABLE = {
    **{"v5e-1": "v5e:1x1", "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4"},
    **{"v5litepod-8": "v5e:2x4", "v5litepod-32": "v5e:4x8", "v5litepod-256": "v5e:16x16"},
    **{"v6e-1": "v6e:1x1", "v6e-8": "v6e:2x4", "v6e-64": "v6e:8x8", "v6e-128": "v6e:8x16"},
    **{"v4-8": "v4:2x2x1", "v4-16": "v4:2x2x2", "v4-32": "v4:2x2x4", "v4-64": "v4:2x4x4"},
    **{"v4-512": "v4:4x8x8", "v4-1536": "v4:8x8x12", "v4-4096": "v4:8x16x16"},
    **{"v5p-8": "v5p:2x2x1", "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8"},
    **{"v5p-512": "v5p:4x8x8", "v5p-768": "v5p:4x8x12", "v5p-1152": "v5p:4x12x12"},
    **{"v5p-1280": "v5p:4x8x20", "v5p-3072": "v5p:8x12x16", "v5p-3840": "v5p:8x12x20"},
    **{"v5p-6912": "v5p:12x12x24", "v5p-12288": "v5p:16x16x24", "v5p-17920": "v5p:16x20x28"},
}


@pytest.mark.parametrize(("name", "topology"), TABLE.items())
def test_accelerator_types(name, topology):
    assert topology_of(name) == topology
    generation, _, shape = topology.partition(":")
    cores = 2 if generation in ("v4", "v5p") else 1
    assert int(name.partition("-")[2]) == cores * math.prod(map(int, shape.split("x")))


def test_shapes_stay_as_they_are():
    for name in ("v5e:2x4", "v5p:8x8x4", "h100:8", "all", "h100", ""):
        assert topology_of(name) == name


def test_gpus_too():
    assert chips.topology_of("h100-8") == "h100:8" and chips.chip_of("h100-8").gpu
    assert chips.topology_of("v5e-8") == "v5e:2x4"
    assert chips.chip_of("v5litepod-8") is chips.CHIPS["v5e"]
    assert chips.chip_of("v4-8").hbm_limit == 30.75 * 2**30  # What libtpu says is available.


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
