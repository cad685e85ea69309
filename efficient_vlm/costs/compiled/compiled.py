"""A plan, compiled: whether it fits, what it needs, and a bound on its time."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from efficient_vlm import sharding
from efficient_vlm.costs.compiled import hlo
from efficient_vlm.costs.compiled.chips import Chip, chip_of, devices_of, has_compiler, topology_of
from efficient_vlm.costs.compiled.programs import PROGRAMS, Program, Work, lowered
from efficient_vlm.errors import UserError, first_line
from efficient_vlm.kernels import aot

__all__ = ["Answer", "Memory", "CompiledStage", "compile_plan"]

_REFUSED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass
class Memory:
    """Bytes of one device.

    Attributes:
      arguments: parameters, state, batch and cache that a program is given.
      temporaries: while it runs.
      outputs: that do not take the place of arguments.
      program: its code.
      limit: that a program may use.
    """

    arguments: int
    temporaries: int
    outputs: int
    program: int
    limit: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.program


@dataclasses.dataclass
class CompiledStage:
    """One program; of one that does not fit only the memory is known.

    Attributes:
      flops, hbm_bytes_moved, collective_bytes, kernels: of one device, see `hlo.Costs`.
      seconds: {"flops", "hbm", "collectives"}, each at the full published speed; an estimate.
      compile_seconds: that its compiler took here.
    """

    name: str
    fits: bool
    hbm_bytes: Memory
    flops: float | None
    hbm_bytes_moved: float | None
    collective_bytes: dict[str, float] | None
    kernels: dict[str, int] | None
    unknown_loops: int | None
    seconds: dict[str, float] | None
    compile_seconds: float

    @property
    def estimated_seconds(self) -> float | None:
        """The longest of the three: everything else would have to hide behind it."""
        return None if self.seconds is None else max(self.seconds.values())


@dataclasses.dataclass
class Answer:
    """All programs of a task; see `CompiledStage`."""

    topology: str
    mesh: dict[str, int]
    devices: int
    chip: Chip
    stages: list[CompiledStage]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def chips(self) -> int:
        """That the devices are."""
        return self.devices // self.chip.devices

    @property
    def estimated_seconds(self) -> float | None:
        each = [stage.estimated_seconds for stage in self.stages]
        return None if None in each else sum(each)

    @property
    def estimate(self) -> str:
        """What the times are."""
        return "roofline, not measured" if has_compiler(self.chip) else "GPU: compiled for CPUs"

    @property
    def fullest(self) -> CompiledStage:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.hbm_bytes.total)

    def to_json(self) -> dict[str, Any]:
        """What --json prints; numbers of several stages added up, memory of the fullest."""
        known = self.estimated_seconds is not None
        memory = self.fullest.hbm_bytes
        return {
            "topology": self.topology,
            "mesh": self.mesh,
            "devices": self.devices,
            "fits": self.fits,
            "hbm_bytes": {**dataclasses.asdict(memory), "total": memory.total},
            "flops": sum(stage.flops for stage in self.stages) if known else None,
            "collective_bytes": _sum(s.collective_bytes for s in self.stages) if known else None,
            "kernels": _sum(stage.kernels for stage in self.stages) if known else None,
            "estimated_seconds": self.estimated_seconds,
            "estimate": self.estimate,
            "compile_seconds": round(sum(stage.compile_seconds for stage in self.stages), 1),
            "stages": [
                dataclasses.asdict(stage) | {"estimated_seconds": stage.estimated_seconds}
                for stage in self.stages
            ],
        }


def compile_plan(
    work: Work,
    topology: str,
    sizes: Mapping[str, int],
    say: Callable[[str], None] = lambda name: None,
) -> Answer:
    """Compiles the programs of a task for a mesh of devices that need not be there.

    Args:
      work: what is to be done.
      topology: such as "v5e:16x16", "v5e-256" or "h100:8", see `chips.devices_of`.
      sizes: of the axes of the mesh, all of them.
      say: called with the name of each program before it is compiled.

    Raises:
      UserError: no such topology, a mesh of another size, what `programs.lowered` refuses, or a
        program that does not compile for another reason than memory.
    """
    topology = topology_of(topology)
    chip, devices = chip_of(topology), devices_of(topology)
    text = ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1"
    if (product := math.prod(sizes.values())) != len(devices):
        raise UserError(
            f"--mesh={text}: {product} devices, {topology} has {len(devices)}",
            fix=f"sizes whose product that is, for example --mesh=fsdp:{len(devices)}",
        )
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), devices)
    options = aot.options_for(devices[0])
    stages, programs = [], lowered(work, mesh)
    for name in PROGRAMS[work.task]:
        say(name)  # Before it is lowered, which may take as long as the compiler.
        stages.append(_compiled(next(programs), chip, topology, options))
    return Answer(topology, dict(sizes), len(devices), chip, stages)


def _compiled(program: Program, chip: Chip, topology: str, options: Any) -> CompiledStage:
    name, arguments, start = program.name, program.argument_bytes, time.monotonic()
    try:
        found = program.lowered.compile(options)
    except Exception as error:
        needed = _needed(str(error))
        if needed is None:
            raise UserError(
                f"{name} does not compile for {topology}: {first_line(error)}"
            ) from error
        memory = Memory(arguments, max(0, needed - arguments), 0, 0, chip.hbm_limit)
        seconds = time.monotonic() - start
        return CompiledStage(name, False, memory, *(None,) * 6, compile_seconds=seconds)
    seconds = time.monotonic() - start
    stats = found.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
        chip.hbm_limit,
    )
    costs = hlo.costs(_text(found))
    times = {
        "flops": costs.flops / chip.flops,
        "hbm": costs.hbm_bytes / chip.hbm_bytes_per_second,
        "collectives": sum(costs.collective_bytes.values()) / chip.link_bytes_per_second,
    }
    return CompiledStage(
        name,
        memory.total <= chip.hbm_limit,
        memory,
        costs.flops,
        costs.hbm_bytes,
        costs.collective_bytes,
        costs.kernels,
        costs.unknown_loops,
        times,
        seconds,
    )


def _text(found: Any) -> str:
    try:
        return found.as_text()
    except Exception as error:
        raise UserError(
            f"JAX {jax.__version__} cannot read what this libtpu compiled: {first_line(error)}",
            fix=f"the libtpu that belongs to it: pip install 'jax[tpu]=={jax.__version__}'",
        ) from error


def _needed(message: str) -> int | None:
    """Bytes that a refused program would have needed; None if it was not for memory."""
    found = _REFUSED.search(message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return round(float(number) * _UNITS[unit])


def _sum(parts: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total
