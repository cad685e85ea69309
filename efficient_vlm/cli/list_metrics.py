"""`efficient-vlm metrics`: the metrics for benchmarks from files, and the options of one."""

import inspect
import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.benchmark_file import FIELDS


def list_metrics(name: str | None = None, *, as_json: bool = False) -> int:
    """Prints all metrics, or what one does and needs.

    Args:
      name: of a metric; None for all.
      as_json: print as JSON.

    Raises:
      UserError: no such metric.
    """
    if name is not None:
        facts = describe(name)
        print(json.dumps(facts, indent=1)) if as_json else _show_one(facts)
        return 0
    rows = [row(each) for each in metrics.METRICS]
    print(json.dumps(rows, indent=1)) if as_json else _show_all(rows)
    return 0


def row(name: str) -> dict[str, Any]:
    """A metric in one line: what it measures, columns that it needs, and where it comes from."""
    metric = metrics.find(name)
    return {
        "name": name,
        "sentence": metric.sentence,
        "needs": list(metric.needs),
        "source": metric.source,
    }


def describe(name: str) -> dict[str, Any]:
    """`row`, and its whole description, its options, and the columns that it also reads."""
    metric = metrics.find(name)
    parameters = inspect.signature(metric.measure).parameters
    options = {
        option: parameters[option].default
        for option in metric.options
        if option not in metrics.COLUMNS
    }
    return {
        **row(name),
        "description": inspect.cleandoc(metric.measure.__doc__ or ""),
        "reads": [option for option in metric.options if option in metrics.COLUMNS],
        "options": options,
        "summary": inspect.cleandoc(metric.summarise.__doc__ or "") if metric.summarise else None,
    }


def _show_all(rows: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what it measures")
    table.add_column("source")
    for each in rows:
        table.add_row(*(each[key].replace("[", r"\[") for key in ("name", "sentence", "source")))
    console.print(table)
    console.print(
        "one in full: efficient-vlm metrics NAME; where programs disagree each has its own, "
        "see docs/metrics.md",
        markup=False,
    )


def _show_one(facts: dict[str, Any]) -> None:
    print(f"{facts['name']}: {facts['sentence']}.\nSource: {facts['source']}")
    print(f"\n{facts['description']}")
    print(f"\nA file needs: {', '.join(facts['needs'])}; it also reads: {_joined(facts['reads'])}")
    fields = [one for each in (*facts["needs"], *facts["reads"]) for one in each.split(" or ")]
    for field in dict.fromkeys(fields):
        print(f"  {field}: columns {', '.join(FIELDS[field])}; or --columns={field}=NAME")
    for option, default in facts["options"].items():
        print(f"Option of metrics.score: {option} = {default!r}")


def _joined(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
