"""Compiling for accelerators without having one: the real TPU compiler on a CPU host.

It proves lowering, layouts and that fast memory suffices, but not results, the absence of races, or
speed. Needs libtpu (`pip install 'efficient_vlm[test]'` on Linux).
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.kernels.topologies import TOPOLOGIES, check_size, topology_of

__all__ = ["compile_for", "compile_for_tpu", "options_for", "tpu_devices"]


@functools.cache
def tpu_devices(topology: str) -> tuple[Any, ...]:
    """Descriptions of the devices of a topology such as "v5e:2x2" or "v5litepod-4".

    Raises:
      UserError: no libtpu, or no such topology.
    """
    topology = topology_of(topology)
    generation, _, shape = topology.partition(":")
    if generation not in TOPOLOGIES or ":" not in topology:
        raise unknown("topology", topology, [_smallest(name) for name in TOPOLOGIES])
    check_size(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs libtpu, which is not installed",
            fix="pip install 'efficient_vlm[test]' (Linux on x86-64), or pip install 'jax[tpu]'",
        )
    # Read when libtpu is loaded: no query to a metadata server, and several processes may compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", TOPOLOGIES[generation])
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if generation == "v4":  # Else every TensorCore is a device of its own, unlike on Cloud's VMs.
        options["chip_config_name"] = "megacore"
    if set(shape.split("x")) == {"1"}:  # Hosts have 2 x 2 chips unless said.
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options)
    except Exception as error:
        raise UserError(
            f"topology: {short(topology)}, unknown to libtpu: {str(error).splitlines()[0][:120]}",
            allowed="v5e:2x2, v5e:16x16, v6e:2x2, v5p:2x2x1, tpu7x:2x2x1, ...",
        ) from error
    return tuple(described.devices)


def _smallest(generation: str) -> str:
    return topology_of(TOPOLOGIES[generation])


def options_for(device: Any) -> dict[str, Any] | None:
    """Compiler options for a described device.

    Without a GPU, XLA cannot tune the tiles of its own products, and its first guess may not
    compile: products use cuBLAS, as large ones do on a GPU.
    """
    return {"xla_gpu_enable_triton_gemm": False} if device.platform == "gpu" else None


def compile_for(device: Any, function: Callable, *shapes: Any):
    """`jax.stages.Compiled` of `function` for one described device.

    Args:
      function: of arrays like `shapes`, pytrees of `jax.ShapeDtypeStruct`.
    """
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    # Says what is compiled for: Pallas asks for the kind of the device.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*given).compile(options_for(device))


def compile_for_tpu(function: Callable, *shapes: Any, topology: str = "v5e:2x2"):
    """`compile_for` one device of a topology of TPUs."""
    return compile_for(tpu_devices(topology)[0], function, *shapes)
