"""The evaluation as one table for the terminal."""

import io
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.costs.stages import STAGES
from efficient_vlm.report import records


def summary_table(results: Mapping[str, Any]) -> Table:
    """Accuracy of every task and cost, one row per (compressor, budget).

    Args:
      results: the content of results.json; missing parts leave dashes.

    Returns:
      A rich table that fits 100 columns with up to seven tasks; accuracies in percent with the
      half-width of their 95 % interval.
    """
    tasks, evals = records.tasks_of(results), records.rows_of(results, "eval")
    costs = records.rows_of(results, "cost")
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Accuracy in % ± half-width of the 95 % interval, greedy exact match",
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("compressor", no_wrap=True)
    table.add_column("tokens", justify="right")
    digits = 1 if len(tasks) <= 4 else 0
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=len(tasks) <= 4)
    table.add_column("MFLOPs", justify="right")
    table.add_column("prefill ms", justify="right")
    settings = list(evals) + [s for s in costs if s not in evals]
    settings.sort(key=lambda s: -s[1])
    rows = [(costs.get(s) or [{}])[0] for s in settings]
    work = _column([records.stage(row, "flops", *STAGES) / 1e6 for row in rows])
    time = _column([records.stage(row, "ms", "prefill") for row in rows])
    for k, (name, budget) in enumerate(settings):
        if k and settings[k - 1][1] != budget:
            table.add_section()
        scores = records.by_task(evals.get((name, budget), []))
        table.add_row(
            name,
            str(rows[k].get("visual_tokens", budget)),
            *(_score(scores.get(task), digits) for task in tasks),
            work[k],
            time[k],
        )
    return table


def summary_text(results: Mapping[str, Any], width: int = 100) -> str:
    """The same as plain text, for logs and files."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, no_color=True, force_terminal=False)
    console.print(summary_table(results))
    return buffer.getvalue()


def _score(score: Mapping[str, float] | None, digits: int) -> str:
    if score is None or not math.isfinite(score["mean"]):
        return "-"
    half = 50 * (score["hi"] - score["lo"])
    mean = f"{100 * score['mean']:.{digits}f}"
    return f"{mean} ±{half:.{digits}f}" if math.isfinite(half) else mean


def _column(values: list[float]) -> list[str]:
    """All values with the decimals that the smallest needs for three digits, at most two."""
    positive = [v for v in values if math.isfinite(v) and v > 0]
    digits = 2 - math.floor(math.log10(min(positive))) if positive else 0
    digits = min(max(digits, 0), 2)
    return [f"{v:,.{digits}f}" if math.isfinite(v) else "-" for v in values]


def print_summary(results: Mapping[str, Any]) -> None:
    """Prints the table: as wide as a terminal, or as text where there is none."""
    if sys.stdout.isatty():
        Console().print(summary_table(results))
    else:
        print(summary_text(results))
