"""The Markdown table: accuracy, cost, and what of it a smaller picture gives as well."""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from savings_methods import TOKENS

from efficient_vlm.evaluation.stats import Difference, paired_difference
from efficient_vlm.files import write_atomic

MODES = {
    "free": "as trained, with all patches",
    "tuned": "fine-tuned with each method",
    "scratch": "smaller pictures, trained with them from the start",
}
# A smaller picture counts as no slower than a method up to this ratio of medians.
SLACK = 1.02
QUESTIONS = "questions.json"

Results = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def gathered(folder: Path) -> Results:
    """mode -> method -> its results of all seeds, by seed."""
    found: dict = {mode: collections.defaultdict(list) for mode in MODES}
    questions = json.loads((folder / QUESTIONS).read_text())
    for path in sorted(folder.glob("seed*/*/*.json"), key=lambda p: int(p.parts[-3][4:])):
        each = json.loads(path.read_text())
        if each["questions"] != digest(questions):
            raise SystemExit(f"error: {path} answers other questions than {folder / QUESTIONS}")
        each["images"] = [question[0] for question in questions]
        found[each["mode"]][each["method"]].append(each)
    return found


def digest(questions: Sequence[Sequence]) -> str:
    """What results name their questions by."""
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]


def keep_questions(folder: Path, questions: Sequence[Sequence]) -> str:
    """The digest of (record, slot, task) of each question; the first result writes them down."""
    path = folder / QUESTIONS
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(questions, separators=(",", ":")) + "\n").encode())
    return digest(questions)


def scores(results: Sequence[Mapping], seeds: Sequence[int]) -> np.ndarray:
    """[questions, seeds], the share of right draws."""
    chosen = [each for each in results if each["seed"] in seeds]
    return np.array([[int(c, 16) / each["draws"] for c in each["right"]] for each in chosen]).T


def difference(one: Sequence[Mapping], other: Sequence[Mapping]) -> Difference:
    """Of the accuracies over all tasks, question by question over the seeds that both have."""
    seeds = sorted({each["seed"] for each in one} & {each["seed"] for each in other})
    return paired_difference(scores(one, seeds), scores(other, seeds), one[0]["images"])


def rivals(label: str, costs: Mapping[str, Mapping], known: Sequence[str]) -> dict[str, str]:
    """The smaller pictures that a method must beat; the whole picture is the largest of them.

    "budget" is the smallest one with at least as many tokens, "time" the largest one whose encoder
    takes no longer.
    """
    pictures = {name: costs[name] for name in known if name.startswith("downsample_")}
    if "none" in known:
        pictures["none"] = costs["none"]
    pictures.pop(label, None)
    own, found = costs[label], {}
    enough = {n: c["tokens"] for n, c in pictures.items() if c["tokens"] >= own["tokens"]}
    quick = {n: c["tokens"] for n, c in pictures.items() if c["ratio"] <= SLACK * own["ratio"]}
    if enough:
        found["budget"] = min(enough, key=enough.get)
    if quick:
        found["time"] = max(quick, key=quick.get)
    return found


def markdown(results: Results, timed: Mapping[str, Any]) -> str:
    """The page: a table for each mode, and below it who does not beat a smaller picture."""
    costs, lines = timed["rows"], ["# Savings inside the encoder, beside smaller pictures", ""]
    every = [each for rows in results.values() for found in rows.values() for each in found]
    if any(each["quick"] for each in every):
        lines += ["**A run of a few steps, as a test: these numbers mean nothing.**", ""]
    lines += [
        "Written by `python experiments/encoder_savings/run.py`; protocol and reading: README.md "
        "beside it. Exact match in %, mean over seeds; MFLOPs and time are of encoder, projector "
        "and compressor for one picture (time without a compressor behind the encoder), time as "
        f"the median ratio to all patches over {timed['turns']} turns with quartiles. Differences "
        "are in points over all questions, with 95 % intervals clustered by picture, to the "
        "smallest smaller picture with at least as many tokens, and to the largest whose encoder "
        "takes no longer; in brackets: which one.",
    ]
    for mode, title in MODES.items():
        rows = {label: found for label, found in results[mode].items() if label in costs}
        if rows:
            # Who may be trained meets whichever of the two trainings of a picture is better.
            others = {**rows, **(_better(rows, results["scratch"]) if mode == "tuned" else {})}
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *_block(rows, others, costs)]
    return "\n".join(lines) + "\n"


def _better(
    rows: Mapping[str, Sequence[Mapping]], scratch: Mapping[str, Sequence[Mapping]]
) -> dict:
    """Smaller pictures whose fresh models answer more than the fine-tuned ones."""
    return {
        label: found
        for label, found in scratch.items()
        if found and label in rows and difference(found, rows[label]).mean > 0
    }


def _block(rows: Mapping, others: Mapping, costs: Mapping[str, Mapping]) -> list[str]:
    """The table of `rows`, beside the smaller pictures among `others`."""
    tasks = list(next(iter(rows.values()))[0]["accuracy"])
    heads = ["method", "tokens", *tasks, "MFLOPs", "time", "seeds", "equal budget", "equal time"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    beaten, saving = [], 0
    for label in [label for label in costs if label in rows]:
        found, cost = rows[label], costs[label]
        cells = [f"`{label}`", str(cost["tokens"])]
        for task in tasks:
            cells.append(
                f"{100 * np.mean([each['accuracy'][task]['accuracy'] for each in found]):.1f}"
            )
        low, high = cost["quartiles"]
        cells += [f"{cost['flops'] / 1e6:.0f}", f"{cost['ratio']:.2f} ({low:.2f}-{high:.2f})"]
        cells.append(str(len(found)))
        against = rivals(label, costs, list(rows))
        gaps = {key: difference(found, others[name]) for key, name in against.items()}
        for key in ("budget", "time"):
            text = "–"
            if key in gaps and found[0]["kind"] not in ("whole", "picture"):
                gap = [100 * value for value in gaps[key][:3]]
                text = "{:+.1f} ({:+.1f} to {:+.1f})".format(*gap) + f" [{_tokens(against[key])}]"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
        if "time" in gaps and found[0]["kind"] not in ("whole", "picture"):
            saving += 1
            if not gaps["time"].lo > 0:
                beaten.append(f"`{label}`")
    if saving:
        none = "every method beats it"
        lines += ["", f"**Not better than a smaller picture at equal time** ({len(beaten)} of "]
        lines[-1] += f"{saving}): {', '.join(beaten) or none}."
    return lines


def _tokens(label: str) -> int:
    return TOKENS if label == "none" else int(label.rpartition("_")[2])
