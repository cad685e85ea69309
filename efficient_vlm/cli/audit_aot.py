"""`efficient-vlm audit aot`: whether a plan fits a machine that is not here, and what bounds it."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli.methods import make_entry, read_method, read_methods
from efficient_vlm.cli.subject import Subject, read_subject
from efficient_vlm.costs.compiled.chips import chip_of, devices_of, has_compiler
from efficient_vlm.costs.compiled.compiled import Answer, compile_plan
from efficient_vlm.costs.compiled.options import batches_of, parse_mesh
from efficient_vlm.costs.compiled.programs import TASKS, Work
from efficient_vlm.costs.compiled.search import Tried, best, search
from efficient_vlm.costs.match import Target, parse_target
from efficient_vlm.errors import UserError, unknown

__all__ = ["audit_aot", "make_work"]

_NEW = 64
_SHARES = (1, 4, 9)  # A search without a budget tries one in so many tokens.


def audit_aot(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm audit aot`: 0 whatever the answer is.

    Args:
      args: preset or config; task, topology, mesh, batch, remat, search; compressor and its
        options, match, text, new, images, json.
      overrides: "section.field=value" of the config.
    """
    if args.task not in TASKS:
        raise unknown("--task", str(args.task), TASKS)
    if args.topology is None:
        raise UserError("--topology: missing", fix="--topology=v5e:16x16")
    if args.search and args.mesh:
        raise UserError("--mesh: --search tries meshes", fix="leave out one of the two")
    chip_of(args.topology)
    args.new = _NEW if args.new is None else args.new
    subject = read_subject(args, overrides)
    devices = len(devices_of(args.topology))
    batches = batches_of(args.batch, devices)
    if args.search:
        return _search(args, subject, batches, devices)
    if len(batches) > 1:
        raise UserError(f"--batch={args.batch}: several, without --search", fix="one number")
    method = read_method(subject, args)
    work = make_work(subject, method, args.task, batches[0], args.remat or "full")
    usual = "fsdp" if args.task == "train" else "data"
    sizes = parse_mesh(args.mesh or f"{usual}:{devices}")
    answer = compile_plan(work, args.topology, sizes)
    head = _head(args, subject, method, work)
    if args.json:
        print(json.dumps(head | answer.to_json(), indent=1))
    else:
        _show(head, answer)
    return 0


def make_work(
    subject: Subject, method: dict[str, Any], task: str, batch: int, remat: str = "full"
) -> Work:
    """What a subject is to do with a compressor, see `programs.Work`."""
    counts = (subject.images, subject.text_tokens, subject.new_tokens)
    return Work(subject.model(method), task, batch, *counts, subject.pooled, remat)


def _search(args, subject: Subject, batches: Sequence[int], devices: int) -> int:
    if args.remat:
        raise UserError("--remat: --search tries all", fix="leave it out")
    works = []
    for chosen in read_methods(subject, args.compressor, args.options):
        if args.match:
            targets = [parse_target(args.match)]
        elif "budget" in chosen.fields or chosen.fields["name"] == "none" or chosen.typed:
            targets = [None]
        else:
            tokens = subject.baseline.entering
            targets = [Target("mean_processed", tokens / share) for share in _SHARES]
        for target in targets:
            entry = make_entry(subject, chosen, target)
            method, tokens = entry.ledger.compressor, round(entry.ledger.entering)
            label = f"{method['name']} {tokens}"
            works.append((label, make_work(subject, method, args.task, batches[0])))
    tried = []
    for one in search(
        works, batches, devices, lambda work, sizes: compile_plan(work, args.topology, sizes)
    ):
        tried.append(one)
        if not args.json:
            print(_line(one), flush=True)
    chosen = best(tried)
    if args.json:
        rows = [_row(one, chosen) for one in tried]
        head = {subject.kind: subject.name, "task": args.task, "topology": args.topology}
        print(json.dumps({**head, "tried": rows}, indent=1))
        return 0
    print()
    for label in dict.fromkeys(one.label for one in tried):
        found = chosen.get(label)
        print(f"best of {label}: " + (_line(found) if found else "nothing fits"))
    print(_bound(args.topology))
    return 0


def _bound(topology: str) -> str:
    text = "Times are bounds at the full published speed of the chip, not measured. "
    if has_compiler(chip_of(topology)):
        return text + "Each was compiled on this host by the chip's own compiler."
    return text + (
        "Each was compiled for CPUs in the place of GPUs, an estimate in memory, too: "
        "pip install 'efficient_vlm[aot-gpu]' for the GPU's own compiler."
    )


def _mesh_text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "one device"


def _row(one: Tried, chosen: dict[str, Tried]) -> dict[str, Any]:
    failed = {"mesh": one.sizes, "fits": False, "error": str(one.error)}
    found = failed if one.error else one.answer.to_json()
    return {
        "compressor": one.label,
        "batch": one.work.batch,
        "remat": one.work.remat,
        "pictures_per_second": one.rate,
        "best": chosen.get(one.label) is one,
        **found,
    }


def _line(one: Tried) -> str:
    remat = f", remat {one.work.remat}" if one.work.task == "train" else ""
    text = f"{one.label}, {_mesh_text(one.sizes)}, batch {one.work.batch}{remat}: "
    if one.error:
        return text + str(one.error).splitlines()[0]
    memory = one.answer.fullest.hbm_bytes
    text += f"{_gib(memory.total)} of {_gib(memory.limit)}"
    if not one.fits:
        return f"{text}, does not fit"
    return f"{text}, {1e3 * one.answer.estimated_seconds:.3g} ms, {one.rate:.4g} pictures/s"


def _head(args, subject: Subject, method: dict[str, Any], work: Work) -> dict[str, Any]:
    head = {subject.kind: subject.name, "task": args.task, "compressor": method}
    head |= {"batch": work.batch, "images": work.images, "text": work.text, "new": work.new}
    return head | ({"remat": work.remat} if args.task == "train" else {})


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _show(head: dict[str, Any], answer: Answer) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    name = head.get("preset") or head.get("config")
    console.print(
        f"{name}, {head['task']}, {head['compressor']['name']}, batch {head['batch']} on "
        f"{answer.topology} ({answer.devices} devices), {_mesh_text(answer.mesh)}"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("program")
    for column in (
        *("fits", "arguments", "temporaries", "outputs", "code", "of", "TFLOPs", "HBM", "links"),
        "at least",
    ):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for stage in answer.stages:
        memory = stage.hbm_bytes
        parts = (memory.arguments, memory.temporaries, memory.outputs, memory.program, memory.limit)
        cells = [stage.name, "yes" if stage.fits else "NO", *map(_gib, parts)]
        if stage.seconds is not None:
            sent = sum(stage.collective_bytes.values())
            bound = max(stage.seconds, key=stage.seconds.get)
            cells += [f"{stage.flops / 1e12:.3g}", _gib(stage.hbm_bytes_moved), _gib(sent)]
            cells += [f"{1e3 * stage.estimated_seconds:.3g} ms", bound]
        table.add_row(*cells)
    console.print(table)
    found = answer.to_json()
    if answer.fits:
        kernels = ", ".join(f"{n} {k}" for n, k in found["kernels"].items()) or "none"
        sent = (
            ", ".join(f"{n} {_gib(b)}" for n, b in found["collective_bytes"].items()) or "nothing"
        )
        console.print(f"Kernels called: {kernels}. Sent by each device: {sent}.")
    else:
        console.print(
            f"Does not fit: {answer.fullest.name} needs {_gib(answer.fullest.hbm_bytes.total)} of "
            f"{_gib(answer.chip.hbm_limit)}. More devices, a smaller batch, fewer visual tokens, "
            "or another mesh (--search)."
        )
    if loops := sum(stage.unknown_loops or 0 for stage in answer.stages):
        console.print(f"Loops of unknown length: {loops}; they count once, so the times are low.")
    console.print(_bound(answer.topology) + " All numbers are of one device.", markup=False)
