"""Plans as tables for the terminal: one in full, several methods beside each other, a search."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli.ledger_table import describe
from efficient_vlm.costs.compiled.chips import chip_of, has_compiler
from efficient_vlm.costs.compiled.compiled import Answer
from efficient_vlm.costs.compiled.search import Tried

# Task -> what its programs together are.
_WHOLE = {"train": "a step", "prefill": "first token", "decode": "a token"}
_OFTEN = {"train": "pictures", "prefill": "first tokens", "decode": "tokens"}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A method's plan, compiled.

    Attributes:
      method: name and options.
      tokens: visual tokens that enter the decoder.
      answer: of the compiler.
    """

    method: Mapping[str, Any]
    tokens: int
    answer: Answer

    def share(self, none: "Planned") -> float | None:
        """Its time over that of the plan without a method; None where one does not fit."""
        own, all_tokens = self.answer.estimated_seconds, none.answer.estimated_seconds
        fit = self.answer.fits and none.answer.fits
        return own / all_tokens if fit and own is not None and all_tokens else None

    def chips(self, none: "Planned") -> float | None:
        """Chips that serve as many requests a second as all devices do without a method."""
        share = self.share(none)
        return None if share is None else self.answer.chips * share

    def stage_chips(self, none: "Planned") -> dict[str, float] | None:
        """`chips`, divided over the stages by their time."""
        if self.share(none) is None:
            return None
        per_second = self.answer.chips / none.answer.estimated_seconds
        return {s.name: per_second * s.estimated_seconds for s in self.answer.stages}


def none_of(plans: Sequence[Planned]) -> Planned:
    """The plan without a method."""
    return next(plan for plan in plans if plan.method["name"] == "none")


def mesh_text(sizes: Mapping[str, int]) -> str:
    """ "fsdp:4,tensor:2": the axes that have more than one device."""
    return ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "one device"


def bound(topology: str) -> str:
    """What the times are."""
    text = "Times are bounds at the full published speed of the chip, not measured. "
    if has_compiler(chip_of(topology)):
        return text + "Each was compiled on this host by the chip's own compiler."
    return text + (
        "Each was compiled for CPUs in the place of GPUs, an estimate in memory, too: "
        "pip install 'efficient_vlm[aot-gpu]' for the GPU's own compiler."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def _title(head: Mapping[str, Any], method: str, answer: Answer) -> str:
    name = head.get("preset") or head.get("config")
    return (
        f"{name}, {head['task']}, {method}, batch {head['batch']} on {answer.topology} "
        f"({answer.devices} devices), {mesh_text(answer.mesh)}"
    )


# ---- one plan ------------------------------------------------------------------------------------


def show_one(head: Mapping[str, Any], plan: Planned) -> None:
    """Prints a plan program by program."""
    console, answer = _console(), plan.answer
    console.print(_title(head, plan.method["name"], answer))
    console.print(_programs(answer))
    figures = answer.to_json()
    if answer.fits:
        kernels = ", ".join(f"{n} {k}" for n, k in figures["kernels"].items()) or "none"
        parts = [f"{n} {_gib(b)}" for n, b in figures["collective_bytes"].items()]
        sent = ", ".join(parts) or "nothing"
        console.print(f"Kernels called: {kernels}. Sent by each device: {sent}.")
    else:
        console.print(
            f"Does not fit: {answer.fullest.name} needs {_gib(answer.fullest.hbm_bytes.total)} of "
            f"{_gib(answer.chip.hbm_limit)}. More devices, a smaller batch, fewer visual tokens, "
            "or another mesh (--search)."
        )
    if loops := sum(stage.unknown_loops or 0 for stage in answer.stages):
        console.print(f"Loops of unknown length: {loops}; they count once, so the times are low.")
    console.print(bound(answer.topology) + " All numbers are of one device.", markup=False)


def _programs(answer: Answer) -> Table:
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
            bound_by = max(stage.seconds, key=stage.seconds.get)
            cells += [f"{stage.flops / 1e12:.3g}", _gib(stage.hbm_bytes_moved), _gib(sent)]
            cells += [_ms(stage.estimated_seconds), bound_by]
        table.add_row(*cells)
    return table


# ---- several methods -----------------------------------------------------------------------------


def show_several(head: Mapping[str, Any], plans: Sequence[Planned]) -> None:
    """Prints what each method needs beside the others: time and chips of each stage and of all."""
    console, none, task = _console(), none_of(plans), head["task"]
    console.print(_title(head, f"{len(plans)} methods", none.answer))
    stages = [stage.name for stage in none.answer.stages]
    names = stages if len(stages) > 1 else []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("method", overflow="fold")
    for column in ("tokens", "memory", *names, _WHOLE[task], "of none"):
        table.add_column(column, justify="right")
    chips = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    chips.add_column("chips", overflow="fold")
    for column in (*names, _WHOLE[task]):
        chips.add_column(column, justify="right")
    for plan in plans:
        table.add_row(*_times(plan, none, names))
        chips.add_row(*_chips(plan, none, names))
    console.print(table)
    console.print(chips)
    console.print(
        f"chips: for as many {_OFTEN[task]} a second as {none.answer.chips} give without a "
        f"method, in all and of each stage. tokens: visual, that enter the decoder. "
        f"{bound(none.answer.topology)}",
        markup=False,
    )


def _times(plan: Planned, none: Planned, names: Sequence[str]) -> list[str]:
    answer = plan.answer
    memory, each = answer.fullest.hbm_bytes, {s.name: s.estimated_seconds for s in answer.stages}
    cells = [describe(plan.method), f"{plan.tokens:,}", f"{_gib(memory.total)}"]
    if not answer.fits:
        return [*cells[:2], f"{cells[2]}, does not fit"]
    share = plan.share(none)
    cells += [_ms(each[name]) for name in names]
    return [*cells, _ms(answer.estimated_seconds), "-" if share is None else f"{share:.3g}"]


def _chips(plan: Planned, none: Planned, names: Sequence[str]) -> list[str]:
    each, total = plan.stage_chips(none), plan.chips(none)
    if each is None:
        return [describe(plan.method)]
    return [describe(plan.method), *(f"{each[name]:.3g}" for name in names), f"{total:.3g}"]


# ---- a search ------------------------------------------------------------------------------------


def show_best(tried: Sequence[Tried], best_plans: Mapping[str, Tried], topology: str) -> None:
    """Prints the best plan of each method."""
    print()
    for label in dict.fromkeys(one.label for one in tried):
        chosen = best_plans.get(label)
        print(f"best of {label}: " + (line(chosen) if chosen else "nothing fits"))
    print(bound(topology))


def row_of(one: Tried, best_plans: Mapping[str, Tried]) -> dict[str, Any]:
    """A plan that was tried, as JSON."""
    failed = {"mesh": one.sizes, "fits": False, "error": str(one.error)}
    return {
        "compressor": one.label,
        "batch": one.work.batch,
        "remat": one.work.remat,
        "pictures_per_second": one.rate,
        "best": best_plans.get(one.label) is one,
        **(failed if one.error else one.answer.to_json()),
    }


def line(one: Tried) -> str:
    """A plan that was tried, in one line."""
    remat = f", remat {one.work.remat}" if one.work.task == "train" else ""
    text = f"{one.label}, {mesh_text(one.sizes)}, batch {one.work.batch}{remat}: "
    if one.error:
        return text + str(one.error).splitlines()[0]
    memory = one.answer.fullest.hbm_bytes
    text += f"{_gib(memory.total)} of {_gib(memory.limit)}"
    if not one.fits:
        return f"{text}, does not fit"
    return f"{text}, {_ms(one.answer.estimated_seconds)}, {one.rate:.4g} pictures/s"
