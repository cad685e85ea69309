"""`efficient-vlm presets`: the published models by name, from the table, in a moment."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.families import presets


def presets_command(as_json: bool) -> int:
    """Prints the published models: a table for people, or with `as_json` a list of objects."""
    rows = presets.table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(presets_table(rows))
    console.print(
        "visual tokens: of a picture of 768 x 1024 pixels and its tiles or crops (images)\n"
        "active: parameters that one token uses; vision: those of the encoder, with Qwen's merger\n"
        "costs and methods: efficient-vlm audit --preset=NAME"
    )
    return 0


def presets_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of `presets.table` as a rich table; models that see pictures first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for title in ("parameters", "active", "vision", "visual tokens", "images", "context"):
        table.add_column(title, justify="right", no_wrap=True)
    ordered = sorted(rows, key=lambda row: row["visual_tokens"] is None)
    for i, row in enumerate(ordered):
        if i and row["visual_tokens"] is None and ordered[i - 1]["visual_tokens"] is not None:
            table.add_section()
        table.add_row(row["name"], row["family"], *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        _millions(row["params"]),
        _millions(row["params_active"]),
        _millions(row["params_vision"]),
        *("-" if row[k] is None else f"{row[k]:,}" for k in ("visual_tokens", "images", "context")),
    ]


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} M"
