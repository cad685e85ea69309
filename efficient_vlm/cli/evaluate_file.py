"""`efficient-vlm eval MODEL --benchmark=FILE`: a published model on a benchmark from a file."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli.methods import method_fields
from efficient_vlm.cli.pictures import picture_options
from efficient_vlm.compressors.imports import import_methods
from efficient_vlm.compressors.methods import find
from efficient_vlm.data.skips import told as told_skips
from efficient_vlm.errors import UserError, short, short_path
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.benchmark_file import (
    FIELDS,
    Benchmark,
    check_metric,
    read_benchmark,
    told,
)
from efficient_vlm.evaluation.on_file import evaluate_file
from efficient_vlm.families.imported import is_tuned
from efficient_vlm.inference.load import from_pretrained
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.report.report import write_report
from efficient_vlm.runtime import enable_compilation_cache

# What --budget alone evaluates in a model that has no method of its own.
_DEFAULT = ("divprune", "downsample")


def open_model(path: str, *, dtype: str, pictures: Sequence[str]) -> Pretrained:
    """The model that a folder holds: a published one, what `efficient-vlm import` wrote, or that of
    a fine-tuned run."""
    folder = Path(path)
    ours = (folder / "checkpoints").is_dir() and not (folder / "dtypes.json").is_file()
    if ours and not is_tuned(folder):
        raise UserError(
            f"{short_path(folder)}: a run of efficient-vlm train, evaluated on its own test data",
            allowed="with --benchmark, a published model, or a run that started from one",
            fix=f"efficient-vlm eval --workdir={path}",
        )
    return from_pretrained(path, dtype=dtype, **picture_options(pictures))


def evaluate_on_file(
    model: str,
    *,
    benchmark: str,
    metric: str | None,
    imports: Sequence[str] = (),
    method: str | None = None,
    options: Sequence[str] = (),
    budgets: str | None = None,
    columns: Sequence[str] = (),
    image_folder: str | None = None,
    question: str | None = None,
    suffix: str = "",
    limit: int | None = None,
    control: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    dtype: str = "float32",
    pictures: Sequence[str] = (),
    out: str | None = None,
    as_json: bool = False,
) -> int:
    """`efficient-vlm eval MODEL --benchmark=FILE --metric=NAME`.

    Args:
      model: folder of a published model.
      benchmark, metric: file and name; see `read_benchmark` and `metrics.METRICS`.
      imports: files and modules that register methods of one's own.
      method, options, budgets: --compressor (names with commas), "option=value" of them, and visual
        tokens with commas.
      columns: "field=column", each also several with commas.
      image_folder, question, limit: see `read_benchmark`.
      suffix, control, max_new_tokens, batch_size: see `evaluate_file`.
      dtype, pictures: of the model, see `from_pretrained`.
      out: folder for results.json, predictions and report.html.
      as_json: print results as JSON, and lines for the user on stderr.

    Returns:
      The exit code, 0.
    """
    if metric is None:
        raise UserError(
            "--metric: missing", allowed=", ".join(metrics.METRICS), fix="efficient-vlm metrics"
        )
    metrics.find(metric)
    import_methods(imports)
    methods = _read_methods(method, options, budgets)
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value}", allowed="1, 2, 3, ...")
    stream = sys.stderr if as_json else sys.stdout
    read = read_benchmark(
        benchmark,
        columns=read_columns(columns),
        image_folder=image_folder,
        question=question,
        limit=limit,
    )
    print(_what(read), file=stream)
    check_metric(metric, read)
    enable_compilation_cache()
    vlm = open_model(model, dtype=dtype, pictures=pictures)
    if methods is None:
        methods = _default_methods(vlm, budgets, stream)
    results = evaluate_file(
        vlm,
        read,
        metric,
        methods=methods,
        control=control,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt_suffix=suffix,
        workdir=out,
        say=lambda line: print(line, file=stream, flush=True),
    )
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        _show(results)
    if out is not None and control is None:
        command = "efficient-vlm " + shlex.join(sys.argv[1:])
        print(write_report(out, command=command), file=stream)
    return 0


def read_columns(texts: Sequence[str]) -> dict[str, str]:
    """--columns question=query,references=label as field -> column.

    A word without "=" belongs to the one in front of it: image=image_1,image_2.
    """
    found: dict[str, str] = {}
    field = None
    for word in (word for text in texts for word in text.split(",") if word):
        name, equals, column = word.partition("=")
        if equals:
            field = name.strip()
            found[field] = column.strip()
        elif field is not None:
            found[field] += f",{name.strip()}"
        if not field or not found[field]:
            raise UserError(
                f"--columns: {short(word)}",
                allowed=f"FIELD=COLUMN; fields: {', '.join(FIELDS)}",
                fix="for example --columns=question=query,references=label",
            )
    return found


def _what(read: Benchmark) -> str:
    skipped = told_skips(read.skipped, read.total, "rows skipped") if read.skipped else ""
    lines = [f"{len(read.rows)} questions; columns: {told(read.columns)}", skipped]
    return "\n".join(line for line in lines if line)


def _counts(budgets: str | None) -> list[int]:
    words = [word.strip() for word in (budgets or "").split(",") if word.strip()]
    for word in words:
        if not (word.isascii() and word.isdecimal() and 0 < int(word) < 10**9):
            raise UserError(
                f"--budget: {short(word)} is not a positive number", allowed="1, 2, 3, ..."
            )
    return list(dict.fromkeys(map(int, words)))


def _read_methods(
    names: str | None, options: Sequence[str], budgets: str | None
) -> list[dict[str, Any]] | None:
    """--compressor, --compressor.OPTION and --budget as `EvalConfig.methods`; None for no name."""
    counts = _counts(budgets)
    if names is None:
        if options:
            raise UserError(
                f"--compressor.{options[0].partition('=')[0]}: goes with --compressor",
                fix="add --compressor=NAME",
            )
        return None
    methods = []
    for fields in method_fields([names], options):
        own = fields.pop("budget", None)
        given = counts or ([] if own is None else [own])
        optional = find(fields["name"]).optional_budget
        if not given and not optional:
            raise UserError("--budget: missing", fix="give visual tokens: --budget=64,16")
        methods.append({**fields, "budgets": given or None})
    return methods


def _default_methods(vlm: Pretrained, budgets: str | None, stream: Any) -> list[dict[str, Any]]:
    """What --budget means without --compressor: the model's own method, or the default ones."""
    counts = _counts(budgets)
    if not counts:
        return []
    own = dict(vlm.model.compressor)
    own.pop("budget", None)
    if own["name"] != "none":
        return [{**own, "budgets": counts}]
    found = []
    for name in _DEFAULT:
        try:
            for count in counts:
                vlm.with_compressor(name, count)
        except UserError as error:
            if name == _DEFAULT[0]:
                raise
            print(f"{name} is left out: {error}", file=stream)
            continue
        found.append({"name": name, "budgets": counts})
    return found


def _show(results: Mapping[str, Any]) -> None:
    """A table: score of every method, its difference to all tokens, and what it costs."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{results['metric']} in % with 95 % intervals, clustered by image",
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("compressor", no_wrap=True)
    for name in ("tokens", "score", "to all tokens", "p", "MFLOPs", "prefill ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, cost in zip(results["eval"], results["cost"], strict=True):
        label = (
            row["compressor"]
            if row["compressor"] == "none"
            else (f"{row['compressor']} {row['budget']}")
        )
        other = row.get("difference")
        table.add_row(
            label,
            str(cost["visual_tokens"]),
            _interval(row["accuracy"], row["ci95"]),
            "-" if other is None else _interval(other["mean"], other["ci95"], "+"),
            "-" if other is None else f"{other['p']:.3f}",
            f"{sum(cost['flops'].values()) / 1e6:,.1f}",
            f"{cost['ms']['prefill']:.2f}",
        )
    width = None if sys.stdout.isatty() else 100
    Console(width=width, highlight=False).print(table)
    _show_summaries(results)


def _interval(mean: float, limits: Sequence[float], sign: str = "") -> str:
    low, high = (f"{100 * limit:{sign}.1f}" for limit in limits)
    return f"{100 * mean:{sign}.1f} ({low} to {high})"


def _show_summaries(results: Mapping[str, Any]) -> None:
    """The metric's own numbers of each method, where it has any."""
    for row in results["summary"]:
        numbers = {
            key: value
            for key, value in row.items()
            if key not in ("compressor", "budget", "n", "score") and isinstance(value, int | float)
        }
        if numbers:
            told_numbers = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            print(f"{row['compressor']} {row['budget']}: {told_numbers}")
