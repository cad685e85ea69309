"""`efficient-vlm audit kernels`: every kernel through the real TPU compiler, without a TPU."""

import dataclasses
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli import audit_kernels_gpu
from efficient_vlm.cli.kernel_programs import ALL, Program, Row, programs
from efficient_vlm.costs.compiled import hlo
from efficient_vlm.errors import first_line, unknown
from efficient_vlm.kernels import aot
from efficient_vlm.kernels.aot_gpu import GPUS
from efficient_vlm.kernels.topologies import TOPOLOGIES, topology_of
from efficient_vlm.terminal import Compiling

# What the compiled text calls a kernel of ours.
_MARK = "tpu_custom_call"


def audit_kernels(
    topology: str, *, quick: bool = False, quiet: bool = False, as_json: bool = False
) -> int:
    """`efficient-vlm audit kernels`: 0 if everything compiled.

    Args:
      topology: "v5e:2x2", "v5p-8", ..., "all", or a GPU of `aot_gpu.GPUS`.
      quick: at one size only.
      quiet: say nothing of what is being compiled.
      as_json: print as JSON.

    Raises:
      UserError: no such topology.
    """
    if topology in GPUS:
        listed = audit_kernels_gpu.programs_of(topology, quick)
        say = Compiling(len(listed), quiet=quiet)
        rows = audit_kernels_gpu.compiled(topology, quick, say)
    else:
        topologies = ALL if topology == "all" else (topology_of(topology),)
        for name in topologies:
            if name.partition(":")[0] not in TOPOLOGIES:
                raise unknown("--topology", name, (*ALL, "all", *GPUS))
            aot.tpu_devices(name)  # A mistake is said before anything is compiled.
        listed = [(name, program) for name in topologies for program in programs(quick)]
        say = Compiling(len(listed), quiet=quiet)
        rows = []
        for name, program in listed:
            say(f"{program.describe()} for {name}")
            rows.append(compiled(program, name))
    say.done()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        _show(rows)
    return 0 if all(row.compiled for row in rows) else 1


def compiled(program: Program, topology: str) -> Row:
    """Compiles one program and looks for the kernels in it."""
    try:
        text = aot.compile_for_tpu(program.function, *program.given, topology=topology).as_text()
        kernels = text.count(f'custom_call_target="{_MARK}"')
        error = program.problem(kernels, hlo.costs(text).flops if program.flops else 0)
    except Exception as problem:  # Whatever the compiler says is the answer.
        error = first_line(problem)
    facts = (program.kernel, program.shape, program.dtype, program.direction)
    return Row(topology, *facts, error is None, program.vmem_bytes, error)


def _show(rows: list[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    gpu = any(row.topology in GPUS for row in rows)
    fits = ("registers", "spills") if gpu else ("VMEM",)
    for name in ("topology", "kernel", "shape", "dtype", "direction", "compiled", *fits, "error"):
        table.add_column(name, justify="right" if name in fits else "left")
    for row in rows:
        fit = ("" if row.vmem_bytes is None else f"{row.vmem_bytes / 2**20:.1f} MiB",)
        if gpu:
            found = ((row.registers, ""), (row.spill_bytes, " B"))
            fit = ("" if number is None else f"{number}{unit}" for number, unit in found)
        facts = (row.topology, row.kernel, row.shape, row.dtype, row.direction)
        table.add_row(*facts, "yes" if row.compiled else "NO", *fit, row.error or "")
    console.print(table)
    console.print(
        f"{sum(row.compiled for row in rows)} of {len(rows)} compiled, ahead of time on this host: "
        "lowering, layouts and what fits are checked; nothing was run on an accelerator."
    )
