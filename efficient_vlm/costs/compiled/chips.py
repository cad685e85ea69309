"""Published figures of accelerators, and their devices on a host that has none."""

import contextlib
import dataclasses
import re
from typing import Any

import jax

from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.kernels import aot, aot_gpu, topologies

__all__ = ["CHIPS", "Chip", "chip_of", "devices_of", "has_compiler", "topology_of"]

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of JAX: an accelerator as its maker describes it, or its share of one.

    Attributes:
      flops: dense bfloat16 FLOPs per second.
      hbm_bytes_per_second: of its memory.
      link_bytes_per_second: that it can send to others of its slice, or host, over all links.
      hbm_limit: bytes that a program may use; of TPUs what their compiler allows.
      gpu: whether it is a GPU, whose compiler is a package of its own.
      devices: that a chip is to JAX. The other figures are of one of them.
    """

    flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    hbm_limit: int
    gpu: bool = False
    devices: int = 1


# TPUs: cloud.google.com/tpu/docs, pages v5e, v6e, v5p and v4 ("Peak compute per chip (bf16)", "HBM
# bandwidth", "ICI bandwidth per chip" in bits), and tpu7x, whose chip is two devices with half of
# everything: 2307 TFLOPs, 7380 GB/s of HBM, links of 1200 GB/s both ways together. GPUs: NVIDIA's
# data sheets, SXM, without sparsity; NVLink one way. B200 and B300: those of HGX boards of eight
# (bfloat16 with sparsity 36 PFLOPs), 180 and 288 GB, 8 TB/s and NVLink of 1.8 TB/s both ways each.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 1600e9 / 8, int(15.75 * _GIB)),
    "v6e": Chip(918e12, 1640e9, 3584e9 / 8, int(31.24 * _GIB)),
    "v5p": Chip(459e12, 2765e9, 4800e9 / 8, int(95.73 * _GIB)),
    "v4": Chip(275e12, 1200e9, 2400e9 / 8, int(30.75 * _GIB)),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 1200e9 / 2 / 2, int(94.75 * _GIB), devices=2),
    "a100": Chip(312e12, 2039e9, 300e9, int(80e9), gpu=True),
    "h100": Chip(989e12, 3350e9, 450e9, int(80e9), gpu=True),
    "h200": Chip(989e12, 4800e9, 450e9, int(141e9), gpu=True),
    "b200": Chip(2250e12, 8000e9, 900e9, int(180e9), gpu=True),
    "b300": Chip(2250e12, 8000e9, 900e9, int(288e9), gpu=True),
}
_EXAMPLES = "v5e:4x4, v5e-16, v6e:16x16, v5p-128, tpu7x-8, tpu7x:4x4x4, h100:8, b200:8"


def topology_of(text: str) -> str:
    """Shapes as they are; "v5e-8" as "v5e:2x4" (`kernels.topologies`), "h100-8" as "h100:8"."""
    name, _, count = text.partition("-")
    if name in CHIPS and CHIPS[name].gpu and re.fullmatch(r"\d+", count):
        return f"{name}:{count}"
    return topologies.topology_of(text)


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:16x16", "v5e-256" or "h100:8"; raises UserError."""
    name, colon, _ = topology_of(topology).partition(":")
    if name not in CHIPS:
        raise unknown("--topology", topology, [f"{chip}:..." for chip in CHIPS])
    if not colon:
        raise UserError(f"--topology={topology}: no size", allowed=_EXAMPLES)
    return CHIPS[name]


def has_compiler(chip: Chip) -> bool:
    """Whether programs are compiled for the chip itself: that of GPUs is in the extra `aot-gpu`."""
    return not chip.gpu or aot_gpu.installed()


def devices_of(topology: str) -> tuple[Any, ...]:
    """Devices to compile for: described TPUs or GPUs; CPU devices in the place of GPUs where their
    compiler (extra `aot-gpu`) is not installed.

    Raises:
      UserError: no such topology, or fewer CPU devices than GPUs.
    """
    if not chip_of(topology).gpu:
        return aot.tpu_devices(topology)
    topology = topology_of(topology)
    name, _, count = topology.partition(":")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(
            f"--topology={topology}: {short(count)} is no number of GPUs", allowed=_EXAMPLES
        )
    if has_compiler(chip_of(topology)):
        return aot_gpu.gpu_devices(name, int(count))
    with contextlib.suppress(RuntimeError):  # JAX has asked for its devices before.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count))
    found = jax.devices("cpu")
    if len(found) < int(count):
        raise UserError(
            f"--topology={topology}: this process has {len(found)} CPU devices already",
            fix="a process of its own: efficient-vlm audit aot ...",
        )
    return tuple(found[: int(count)])
