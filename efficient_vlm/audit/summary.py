"""The evaluation as one table for the terminal."""

import io
import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.audit import records
STAGES = ("encoder", "compressor", "decoder", "head")


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
    )
    table.add_column("compressor", no_wrap=True)
    table.add_column("tokens", justify="right")
    digits = 1 if len(tasks) <= 4 else 0
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=len(tasks) <= 4)
    table.add_column("MFLOPs", justify="right")
    table.add_column("prefill ms", justify="right")
    previous = None
    settings = list(evals) + [s for s in costs if s not in evals]
    for setting in sorted(settings, key=lambda s: -s[1]):
        name, budget = setting
        if previous not in (None, budget):
            table.add_section()
        previous = budget
        scores = records.by_task(evals.get(setting, []))
        cost = (costs.get(setting) or [{}])[0]
        tokens = cost.get("visual_tokens", budget)
        table.add_row(
            name,
            str(tokens),
            *(_score(scores.get(task), digits) for task in tasks),
            _fixed(records.stage(cost, "flops", *STAGES) / 1e6),
            _fixed(records.stage(cost, "ms", "prefill")),
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


def _fixed(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 1
    return f"{value:,.{min(digits, 3)}f}"
