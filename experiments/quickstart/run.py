"""The quickstart with ten seeds, each trained and evaluated as a user does it.

    python experiments/quickstart/run.py --seeds=0-9 --runs=runs/seeds

Writes results.json beside this file, prints the table of the README, and fails if a seed ends below
what the README promises. Runs that are finished are not repeated, unfinished ones are resumed.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
# (compressor, budget, task): lowest accuracy on unseen glyphs, for every seed.
PROMISED = {
    ("none", 64, "needle"): 0.90,
    ("none", 64, "count"): 0.97,
    ("none", 64, "point"): 0.98,
    ("none", 64, "global"): 0.99,
    ("text_topk", 16, "needle"): 0.90,
}
MOST_SECONDS = 300  # Of training, on two cores.


def train(seed: int, runs: Path) -> dict[str, Any]:
    """results.json of one seed; the run may have been finished before."""
    workdir = runs / str(seed)
    command = ["efficient-vlm", "train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command.append(f"--config.seed={seed}")  # Of parameters and of the order of the data.
    path = workdir / "results.json"
    if not path.exists():
        print(f"$ {shlex.join(command)}", flush=True)
        subprocess.run(command, check=True, cwd=HERE.parents[1])  # noqa: S603
    return json.loads(path.read_text())


def gathered(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of all seeds, from the results.json of each."""
    first = next(iter(results.values()))
    return {
        "command": f"python experiments/quickstart/run.py --seeds={','.join(map(str, results))}",
        "protocol": first["protocol"],
        "environment": first["environment"],
        "cost": first["cost"],
        "seeds": [
            {
                "seed": seed,
                "train": each["train"],
                "eval": each["eval"],
                "controls": each["controls"],
                "prefill_ms": [row["ms"]["prefill"] for row in each["cost"]],
            }
            for seed, each in results.items()
        ],
    }


def below(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which promises the rows `eval` of one seed do not keep."""
    found = {(r["compressor"], r["budget"], r["task"]): r["accuracy"] for r in rows}
    return [
        f"{' '.join(map(str, key))}: {found[key]}, promised {least}"
        for key, least in PROMISED.items()
        if found[key] < least
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """The table of the README: medians over the seeds, and the range."""
    seeds = results["seeds"]
    tasks = list(dict.fromkeys(row["task"] for row in seeds[0]["eval"]))
    lines = [
        f"| compressor | visual tokens | {' | '.join(tasks)} | MFLOPs | prefill ms |",
        "|---|---|" + "---|" * (len(tasks) + 2),
    ]
    for index, cost in enumerate(results["cost"]):
        key = cost["compressor"], cost["budget"]
        cells = [f"`{key[0]}`", f"{key[1]}"]
        for task in tasks:
            cells.append(_spread(_accuracies(seeds, (*key, task))))
        prefill = statistics.median(seed["prefill_ms"][index] for seed in seeds)
        cells += [f"{sum(cost['flops'].values()) / 1e6:.1f}", f"{prefill:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _accuracies(seeds: Sequence[Mapping[str, Any]], key: tuple[str, int, str]) -> list[float]:
    return [
        row["accuracy"]
        for seed in seeds
        for row in seed["eval"]
        if (row["compressor"], row["budget"], row["task"]) == key
    ]


def _spread(values: Sequence[float]) -> str:
    """ "93.1 (91.8-94.5)": median, lowest and highest in %."""
    numbers = statistics.median(values), min(values), max(values)
    return "{:.1f} ({:.1f}-{:.1f})".format(*(100 * value for value in numbers))


def parse_seeds(text: str) -> list[int]:
    """ "0-9" or "0,3,5" as numbers."""
    first, dash, last = text.partition("-")
    try:
        if dash:
            return list(range(int(first), int(last) + 1))
        return [int(number) for number in text.split(",")]
    except ValueError:
        allowed = "a range such as 0-9, or numbers such as 0,3,5"
        raise SystemExit(f"error: --seeds={text[:40]!r}\n  allowed: {allowed}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0-9", help="a range or a list (default: %(default)s)")
    runs = Path("runs/seeds")
    parser.add_argument("--runs", type=Path, default=runs, help="workdirs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    found, failed = {}, False
    for seed in parse_seeds(args.seeds):
        found[seed] = train(seed, args.runs.absolute())
        args.out.write_text(json.dumps(gathered(found), indent=1) + "\n")
        wrong, seconds = below(found[seed]["eval"]), found[seed]["train"]["seconds"]
        failed |= bool(wrong)
        print(f"seed {seed}: {seconds:.0f} s of training; {'; '.join(wrong) or 'as promised'}")
    print(markdown(gathered(found)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
