"""Ledgers as tables for the terminal: one method in full, several side by side."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli.methods import Entry
from efficient_vlm.cli.subject import Subject
from efficient_vlm.costs.ledger import Ledger
from efficient_vlm.costs.match import FAR

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(subject: Subject, entries: Sequence[Entry], console: Console | None = None) -> None:
    """Prints a comparison, or one method layer by layer.

    Args:
      subject: what is audited.
      entries: one for each method.
      console: None for standard output, 110 columns where that is no terminal.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    plural = "" if subject.images == 1 else "s"
    console.print(
        f"[bold]{subject.name}[/]: {subject.images} image{plural}, {subject.text_tokens} text "
        f"tokens, {subject.new_tokens} generated; batch 1, FLOPs 2 per multiply-add"
    )
    for fact in subject.facts:
        console.print(f"  {fact}", markup=False)
    if subject.projector is not None:
        rows, columns = subject.plain.slot_grid
        console.print(
            f"  its own projector: {describe(subject.projector)}; methods get what it makes of an "
            f"image, {rows} x {columns} tokens",
            markup=False,
        )
    for entry in entries:
        if entry.note is not None:
            console.print(f"  {entry.note}", markup=False)
    if len(entries) == 1:
        _one(subject, entries[0], console)
    else:
        _several(subject, entries, console)


def describe(compressor: Mapping[str, Any]) -> str:
    """`fastv(layer=2, keep=0.5)`."""
    options = ", ".join(
        f"{k}={_short(v)}" for k, v in compressor.items() if k != "name" and v is not None
    )
    return f"{compressor['name']}({options})" if options else str(compressor["name"])


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one(subject: Subject, entry: Entry, console: Console) -> None:
    ledger, base = entry.ledger, subject.baseline
    console.print(_layers(ledger, describe(ledger.compressor)))
    console.print(
        f"visual tokens: {ledger.entering:,} enter, {ledger.mean_processed:,.5g} processed a "
        f"layer, {ledger.mean_written:,.5g} written a layer "
        f"(means over {len(ledger.layers)} layers)"
    )
    attended = ledger.encoder_layers
    if attended and (min(attended) < max(attended) or ledger.encoder_out < attended[-1]):
        console.print(
            f"encoder: {attended[0]:,} tokens in, {ledger.encoder_out:,} out, of each image"
        )
    console.print(_costs(ledger, base))
    law = ledger.amdahl
    console.print(
        f"Amdahl, with FLOPs for time: without it {100 * law.share:.3g} % of the work is "
        f"in {_stages(law.touched)}, so at most {_times(law.bound)} faster end to "
        f"end; here {_times(law.speedup)}, the decoder's prefill {_times(law.prefill_speedup)}"
    )
    if entry.match is not None:
        console.print(_reached(entry))


def _layers(ledger: Ledger, title: str) -> Table:
    table = _table(title)
    for name in ("decoder layers", "visual in", "visual out", "text"):
        table.add_column(name, justify="left" if name.startswith("dec") else "right")
    for key, group in itertools.groupby(
        ledger.layers, key=lambda row: (row.segment, row.visual_in, row.visual_out, row.text_in)
    ):
        rows = list(group)
        first, last = rows[0].layer, rows[-1].layer
        where = str(first) if first == last else f"{first} to {last}"
        table.add_row(where, *(f"{n:,}" for n in key[1:]))
    return table


def _costs(ledger: Ledger, base: Ledger) -> Table:
    table = _table(None)
    table.add_column("")
    for title in ("with", "none", "share"):
        table.add_column(title, justify="right")

    def row(title: str, value: int, other: int, shown=lambda n: si(n)):
        share = f"{100 * value / other:.4g} %" if other else "-"
        table.add_row(title, shown(value), shown(other), share)

    for stage, value in ledger.full.items():
        row(f"FLOPs, {stage}", value, base.full[stage])
    row("FLOPs, to the first token", ledger.total, base.total)
    row("FLOPs, each further token", ledger.decode_flops, base.decode_flops)
    row("as papers count, k=2", ledger.k2, base.k2)
    row("as papers count, k=3", ledger.k3, base.k3)
    row("KV cache, MiB", ledger.kv_bytes, base.kv_bytes, lambda n: f"{n / 2**20:,.4g}")
    return table


def _several(subject: Subject, entries: Sequence[Entry], console: Console) -> None:
    matched = entries[0].match is not None
    table = _table(None)
    table.add_column("method", overflow="fold")
    titles = [
        "enter",
        "processed",
        "written",
        "FLOPs",
        "share",
        "k=3",
        "KV MiB",
        "speed-up",
        "bound",
    ]
    for title in titles + (["target"] if matched else []):
        table.add_column(title, justify="right")
    base = subject.baseline

    def row(title: str, ledger: Ledger, *more: str):
        table.add_row(
            title,
            f"{ledger.entering:,}",
            f"{ledger.mean_processed:,.5g}",
            f"{ledger.mean_written:,.5g}",
            si(ledger.total),
            f"{100 * ledger.total / base.total:.3g} %",
            si(ledger.k3),
            f"{ledger.kv_bytes / 2**20:,.4g}",
            _times(ledger.amdahl.speedup),
            _times(ledger.amdahl.bound),
            *more,
        )

    row("none", base, *[""] * matched)
    table.add_section()
    for entry in entries:
        more = [si(entry.match.goal) + (" !" if entry.match.far else "")] if matched else []
        row(describe(entry.ledger.compressor), entry.ledger, *more)
    console.print(table)
    console.print(
        "processed, written: visual tokens, means over decoder layers; FLOPs to the first token, "
        "2 per multiply-add; k=3: decoder layers as papers count; speed-up: FLOPs for time, end to "
        "end; bound: if the decoder, and what else the method makes cheaper, were free"
    )
    for entry in entries if matched else ():
        console.print(f"{describe(entry.ledger.compressor)}: {_reached(entry)}", markup=False)


def _reached(entry: Entry) -> str:
    goal, reached = entry.match.goal, entry.match.reached
    off = f"{100 * entry.match.off:+.2g} %"
    if entry.match.far:
        off += f"; ! more than {100 * FAR:g} % off, not at equal cost"
    return f"--match {entry.target.measure}: asked for {si(goal)}, reached {si(reached)} ({off})"


def _stages(names: Sequence[str]) -> str:
    """`the encoder, the compressor and the decoder`."""
    *first, last = (f"the {name}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _table(title: str | None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )


def si(value: float) -> str:
    """Three or four digits with a unit: 8.14 T."""
    for unit, letter in _UNITS:
        if value >= unit:
            return f"{value / unit:.4g} {letter}"
    return f"{value:.5g}"


def _times(value: float) -> str:
    return f"{value:.3g}x"
