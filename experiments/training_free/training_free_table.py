"""The Markdown table of results.json."""

from collections.abc import Mapping, Sequence
from typing import Any

# Options that say what the table says for all: no CLS token, one cut, T tokens.
COMMON = ("budget", "keep", "counts", "layer", "layers", "middle_layer", "attention")
COMMON += ("position_policy",)


def title(row: Mapping[str, Any]) -> str:
    """The method, and the options that tell its rows apart."""
    shown = [f"{k}={v}" for k, v in row["options"].items() if k not in COMMON]
    return row["method"] + (f" ({', '.join(shown)})" if shown else "")


def markdown(results: Mapping[str, Any]) -> str:
    """The table of docs/training_free.md, one block for each number of processed tokens."""
    tasks = results["tasks"]
    draws = max(row["seeds"] for row in results["rows"])
    full = [row for row in results["rows"] if row["role"] == "uncompressed"]
    lines = [
        "# Training-free methods on the quickstart model",
        "",
        "Written by `python experiments/training_free/run.py --workdir=runs/quickstart`; protocol "
        "and reading: [experiments/training_free](../experiments/training_free/README.md).",
        "",
        f"Exact match in % on {results['images']} unseen test images, 95 % intervals clustered by "
        f"image; `random` pools {draws} draws. Nothing was trained "
        "for any method; `text_topk`, the selector that the model was trained with, is included "
        "for reference. A block contains methods that *process* the same number of visual tokens, "
        "mean over decoder layers: a method inside this two-layer decoder can only cut after "
        "layer 1, so with T tokens left it processes (64 + T) / 2, and is compared with baselines "
        "that have as many before the decoder. The encoder has no CLS token: methods guided by "
        "encoder attention take the mean over queries (`attention=column_mean`). `positions` is "
        "the method's default. ▲ and ▼: the interval lies entirely above or below that of "
        "`random` (retain) in the same block.",
    ]
    for tokens in dict.fromkeys(row["mean_processed"] for row in results["rows"]):
        block = [row for row in results["rows"] if row["mean_processed"] == tokens]
        random = [r for r in block if r["method"] == "random" and r["position_policy"] == "retain"]
        lines += ["", f"## {tokens:g} visual tokens processed", ""]
        lines.append("| method | tokens | positions | " + " | ".join(tasks) + " | MFLOPs |")
        lines.append("|---|---|---|" + "---|" * (len(tasks) + 1))
        for row in block:
            path = f"{row['entering']}"
            if row["where"] == "decoder":
                path += f" → {row['leaving']}"
            cells = [score_cell(row, task, random) for task in tasks]
            cost = f"{_flops(row) / 1e6:.1f}"
            if full:
                cost += f" ({100 * _flops(row) / _flops(full[0]):.0f} %)"
            cells = [_name(row), path, row["position_policy"], *cells, cost]
            lines.append("| " + " | ".join(cells) + " |")
    if results["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- `{name}`: {why}." for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    method, _, options = title(row).partition(" ")
    mark = {"baseline": " *baseline*", "trained": " *trained*"}.get(row["role"], "")
    return f"`{method}`" + (f" {options}" if options else "") + mark


def _flops(row: Mapping[str, Any]) -> int:
    return sum(row["flops"].values())


def score_cell(row: Mapping[str, Any], task: str, random: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy with its interval, and a mark where it lies outside that of `random[0]`."""
    if task not in row["accuracy"]:
        return "–"
    score = row["accuracy"][task]
    low, high = score["ci95"]
    mark = ""
    if random and row is not random[0]:
        base_low, base_high = random[0]["accuracy"][task]["ci95"]
        mark = " ▲" if low > base_high else " ▼" if high < base_low else ""
    return f"{100 * score['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f}){mark}"
