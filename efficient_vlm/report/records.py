"""Reading what a run left in its workdir, however incomplete, for the report and the summary."""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError, first_line
from efficient_vlm.evaluation.token_maps import Example, read_maps

KNOWN = ("config.json", "results.json", "metrics.jsonl", "predictions", "maps", "checkpoints")
# More predictions than this are sampled from the front: a report has seconds, not minutes.
_MAX_PREDICTION_BYTES = 64 << 20

# Files of answers without the evidence end so; they are no answers of the method.
_CONTROLS = ("-blank", "-shuffled")


Setting = tuple[str, int]  # (compressor, budget)


@dataclasses.dataclass
class Run:
    """The content of a workdir.

    Attributes:
      name: last part of the workdir's path.
      config, results: parsed files, {} if missing.
      metrics: lines of metrics.jsonl, last writer wins per (split, step), in order of steps.
      predictions: lines of predictions/*.jsonl, without those of controls.
      maps: example questions with the arrays of their token maps.
      drawn_maps: those of a workdir whose evaluation drew them: entries of maps/maps.json, "image",
        "file" and "scores" made absolute paths.
      problems: what was unreadable, one sentence each.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    predictions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    maps: list[Example] = dataclasses.field(default_factory=list)
    drawn_maps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def split(self, name: str) -> list[dict[str, Any]]:
        """Metrics of one split."""
        return [m for m in self.metrics if m.get("split") == name]


def read_run(workdir: str | os.PathLike) -> Run:
    """Reads a workdir; damaged parts are named in `problems`, never fatal.

    Raises:
      UserError: the folder does not exist or holds nothing that a run writes.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        raise UserError(f"workdir: no folder {str(folder)!r}", fix="pass the --workdir of a run")
    if not any((folder / name).exists() for name in KNOWN):
        raise UserError(
            f"workdir: {str(folder)!r} holds no run",
            allowed=f"a folder with any of {', '.join(KNOWN)}",
        )
    run = Run(folder.resolve().name)
    run.config = _json(folder / "config.json", dict, run.problems)
    run.results = _json(folder / "results.json", dict, run.problems)
    run.metrics = _metrics(_lines([folder / "metrics.jsonl"], run.problems))
    answers = sorted((folder / "predictions").glob("*.jsonl"))
    answers = [path for path in answers if not path.stem.endswith(_CONTROLS)]
    run.predictions = _lines(answers, run.problems)
    _read_maps(folder, run)
    return run


def _read_maps(folder: Path, run: Run) -> None:
    path = folder / "maps" / "maps.json"
    listing = _json(path, list, []) if path.exists() else []
    drawn = [entry for entry in listing if isinstance(entry, dict) and "arrays" not in entry]
    if drawn:
        run.drawn_maps = [_inside(folder / "maps", entry) for entry in drawn]
        return
    run.maps = read_maps(folder, damaged=lambda error: run.problems.append(f"{first_line(error)}."))


def _json(path: Path, kind: type, problems: list[str]):
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return kind()
    if not isinstance(value, kind):
        problems.append(f"{path.name} does not hold a JSON {kind.__name__}.")
        return kind()
    return value


def _lines(paths: Iterable[Path], problems: list[str]) -> list[dict[str, Any]]:
    records, bad, room = [], 0, _MAX_PREDICTION_BYTES
    for path in paths:
        if not path.exists():
            continue
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                room -= len(line)
                if room < 0:
                    problems.append(f"{path.name}: only the first 64 MiB of JSON lines were read.")
                    return records
                try:
                    value = json.loads(line) if line.strip() else None
                except ValueError:
                    value = False
                if isinstance(value, dict):
                    records.append(value)
                elif value is not None:
                    bad += 1
        if bad:
            # A killed run may leave half a line at the end; more than that is worth a look.
            problems.append(f"{path.name}: {bad} line(s) were not JSON objects and are left out.")
            bad = 0
    return records


def _metrics(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # A resumed run writes the steps after its checkpoint again.
    latest = {}
    for record in records:
        if isinstance(record.get("step"), int):
            latest[record.get("split"), record["step"]] = record
    return sorted(latest.values(), key=lambda r: r["step"])


def _inside(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with paths of files in `folder`; anything outside of it becomes None."""

    def path(value: Any) -> Path | None:
        inside = isinstance(value, str) and value == Path(value).name
        return folder / value if inside and (folder / value).is_file() else None

    shown = [m for m in entry.get("maps") or [] if isinstance(m, dict)]
    shown = [{**m, "file": path(m.get("file")), "scores": path(m.get("scores"))} for m in shown]
    return {**entry, "image": path(entry.get("image")), "maps": shown}


def number(value: Any) -> float:
    """A float, NaN for anything that is not a real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def rows_of(results: Mapping[str, Any], part: str) -> dict[Setting, list[dict[str, Any]]]:
    """Rows of results["eval"] or ["cost"] by (compressor, budget), malformed ones left out.

    Order: larger budgets first; at one budget "none" first, then as in the file.
    """
    found = collections.defaultdict(list)
    for row in results.get(part) or []:
        if isinstance(row, dict) and isinstance(row.get("budget"), int):
            found[str(row.get("compressor")), row["budget"]].append(row)
    place = {setting: k for k, setting in enumerate(found)}
    order = sorted(found, key=lambda s: (-s[1], s[0] != "none", place[s]))
    return {setting: found[setting] for setting in order}


def tasks_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the evaluated tasks in order of appearance."""
    rows = rows_of(results, "eval").values()
    return list(dict.fromkeys(str(r.get("task")) for group in rows for r in group))


def by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{task: {"mean", "lo", "hi", "n"}} of one setting; missing limits are NaN."""
    out = {}
    for row in rows:
        limits = row.get("ci95")
        limits = limits if isinstance(limits, list) and len(limits) == 2 else (None, None)
        out[str(row.get("task"))] = {
            "mean": number(row.get("accuracy")),
            "lo": number(limits[0]),
            "hi": number(limits[1]),
            "n": number(row.get("n")),
        }
    return out


def macro_mean(rows: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy, mean over the tasks of one setting."""
    means = [t["mean"] for t in by_task(rows).values() if math.isfinite(t["mean"])]
    return float(np.mean(means)) if means else math.nan


def baseline_of(settings: Iterable[Setting]) -> Setting | None:
    """The setting that the others are compared with: "none", else the largest budget."""
    settings = list(settings)
    full = [s for s in settings if s[0] == "none"]
    return max(full or settings, key=lambda s: s[1], default=None)


def stage(row: Mapping[str, Any], group: str, *names: str) -> float:
    """Sum of stages of row[group] ("flops" or "ms"); NaN if one is missing."""
    values = row.get(group)
    values = values if isinstance(values, dict) else {}
    return sum(number(values.get(name)) for name in names)
