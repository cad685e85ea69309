"""Compiling for GPUs on a CPU host, down to machine code, without a driver.

`jax-cuda12-pjrt` and `ptxas` (extra `aot-gpu`) compile for described GPUs without having one. This
proves lowering, memory, registers and spills, not results or speed.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from efficient_vlm.errors import UserError, first_line
from efficient_vlm.kernels.aot import compile_for

__all__ = ["GPUS", "compile_for_gpu", "environment", "gpu_devices", "installed"]

# Properties of a GPU generation that XLA needs, from the CUDA programming guide (table 21).
_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
  shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_HOPPER = dict(
    **dict(optin=232448, shared=233472, cores=132, fpus=128, l2=52428800, clock=1.98),
    **dict(major=9, minor=0),
)
_AMPERE = dict(
    **dict(optin=166912, shared=167936, cores=108, fpus=64, l2=41943040, clock=1.41),
    **dict(major=8, minor=0),
)
# Of these, cores, cache, clock and memory are what `nvidia-smi` and `deviceQuery` print.
_BLACKWELL = dict(optin=232448, shared=233472, cores=148, fpus=128, l2=132644864, major=10)
# SXM, from NVIDIA's data sheets.
GPUS = {
    "a100": dict(name="NVIDIA A100-SXM4-80GB", memory=85094825984, bandwidth=2039 * 10**9)
    | _AMPERE,
    "h100": dict(name="NVIDIA H100 80GB HBM3", memory=84929347584, bandwidth=3352 * 10**9)
    | _HOPPER,
    "h200": dict(name="NVIDIA H200", memory=150109880320, bandwidth=4800 * 10**9) | _HOPPER,
    "b200": dict(name="NVIDIA B200", memory=191502483456, bandwidth=8000 * 10**9)
    | dict(clock=1.965, minor=0)
    | _BLACKWELL,
    "b300": dict(name="NVIDIA B300 SXM6 AC", memory=288400343040, bandwidth=8000 * 10**9)
    | dict(clock=2.032, minor=3)
    | _BLACKWELL,
}


def environment() -> dict[str, str]:
    """Environment variables of a process that compiles for a GPU and prints the output of ptxas.

    Raises:
      UserError: the wheels are not installed.
    """
    nvidia = importlib.util.find_spec("nvidia")
    folders = [
        Path(at) / "cuda_nvcc" for at in (nvidia and nvidia.submodule_search_locations) or ()
    ]
    toolkits = [folder for folder in folders if (folder / "bin" / "ptxas").is_file()]
    if not toolkits or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError(
            "compiling for a GPU needs jax-cuda12-pjrt, jax-cuda12-plugin, nvidia-cuda-nvcc-cu12",
            fix="pip install 'efficient_vlm[aot-gpu]'",
        )
    flags, path = os.environ.get("XLA_FLAGS", "").split(), os.environ.get("PATH", "")
    folder, tools = f"--xla_gpu_cuda_data_dir={toolkits[0]}", str(toolkits[0] / "bin")
    return {
        "JAX_PLATFORMS": "cpu",
        "PATH": path if tools in path.split(os.pathsep) else f"{tools}{os.pathsep}{path}",
        "XLA_FLAGS": " ".join([flag for flag in flags if flag != folder] + [folder]),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def installed() -> bool:
    """Whether the wheels that `environment` needs are installed."""
    try:
        environment()
    except UserError:
        return False
    return True


@functools.cache
def gpu_devices(name: str, count: int) -> tuple[Any, ...]:
    """Descriptions of the devices of one host with `count` GPUs of the type `name` of `GPUS`.

    Sets the variables of `environment` for this process, except the one for the output of ptxas.

    Raises:
      UserError: the wheels are not installed, or JAX has looked for a GPU before.
    """
    from jax.experimental import topologies

    needed = environment()
    del needed["MOSAIC_GPU_DUMP_PTXAS"]
    os.environ.update(needed)
    # Otherwise JAX looks for a driver.
    jax.config.update("jax_platforms", "cpu")
    try:
        described = topologies.get_topology_desc(
            name, "cuda", target_config=_DESCRIPTION.format(**GPUS[name]), topology=f"1x1x{count}"
        )
    except Exception as error:
        raise UserError(
            f"compiling for {name}:{count}: {first_line(error)}",
            fix="use a new process with JAX_PLATFORMS=cpu",
        ) from error
    return tuple(described.devices)


def compile_for_gpu(function: Callable, *shapes: Any, gpu: str = "h100"):
    """`compile_for` one GPU of `GPUS`; `environment` must have been set before."""
    return compile_for(gpu_devices(gpu, 1)[0], function, *shapes)
