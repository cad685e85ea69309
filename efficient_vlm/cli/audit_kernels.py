"""`efficient-vlm audit kernels`: every kernel through the real TPU compiler, without a TPU."""

import argparse
import dataclasses
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli import audit_kernels_gpu
from efficient_vlm.cli.kernel_programs import ALL, Program, Row, programs
from efficient_vlm.costs.compiled import hlo
from efficient_vlm.errors import UserError, first_line, unknown
from efficient_vlm.kernels import aot
from efficient_vlm.kernels.topologies import TOPOLOGIES, topology_of

_TAKES = "--topology, --quick and --json"
# What the compiled text calls a kernel of ours.
_MARK = "tpu_custom_call"


def audit_kernels(args: argparse.Namespace) -> int:
    """`efficient-vlm audit kernels`: 0 if everything compiled.

    Args:
      args: topology or None, quick, json, and what `audit` alone takes.

    Raises:
      UserError: an option of `audit` alone, or no such topology.
    """
    for name in (
        "preset",
        "config",
        "compressor",
        "text",
        "new",
        "images",
        "match",
        "mesh",
        "task",
        "batch",
        "remat",
        "search",
        "options",
    ):
        if getattr(args, name):
            word = "compressor" if name == "options" else name
            raise UserError(f"--{word}: `audit kernels` does not take it", allowed=_TAKES)
    args.topology = args.topology or ALL[0]
    if args.topology == "h100":
        rows = audit_kernels_gpu.compiled(args.quick)
    else:
        topologies = ALL if args.topology == "all" else (topology_of(args.topology),)
        for topology in topologies:
            if topology.partition(":")[0] not in TOPOLOGIES:
                raise unknown("--topology", topology, (*ALL, "all", "h100"))
            aot.tpu_devices(topology)  # A mistake is said before anything is compiled.
        rows = [
            compiled(program, topology)
            for topology in topologies
            for program in programs(args.quick)
        ]
    if args.json:
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
    gpu = any(row.registers is not None for row in rows)
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
