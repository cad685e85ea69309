"""Compiling for a Hopper GPU on a CPU host, down to machine code, without a driver.

`jax-cuda12-pjrt` and `ptxas` (extra `aot-gpu`) do not need a GPU to compile for one that is
described here. It proves lowering, registers and spills, not numbers or speed.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.aot import compile_for

__all__ = ["compile_for_hopper", "environment"]

# What XLA asks of an H100 SXM, from its data sheet and the CUDA programming guide (table 21).
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}
runtime_version { major: 12 minor: 9 patch: 0 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def environment() -> dict[str, str]:
    """Variables that a process must start with to compile for a GPU and to print what ptxas says.

    Raises:
      UserError: the wheels are not installed.
    """
    nvidia = importlib.util.find_spec("nvidia")
    folders = [
        Path(at) / "cuda_nvcc" for at in (nvidia and nvidia.submodule_search_locations) or ()
    ]
    found = [folder for folder in folders if (folder / "bin" / "ptxas").is_file()]
    if not found or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError(
            "compiling for a GPU needs jax-cuda12-pjrt, jax-cuda12-plugin, nvidia-cuda-nvcc-cu12",
            fix="pip install 'efficient_vlm[aot-gpu]'",
        )
    return {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{found[0] / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={found[0]}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


@functools.cache
def _device() -> Any:
    from jax.experimental import topologies

    described = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology="1x1x1")
    return described.devices[0]


def compile_for_hopper(function: Callable, *shapes: Any):
    """`compile_for` one H100; `environment` must have been set before."""
    return compile_for(_device(), function, *shapes)
