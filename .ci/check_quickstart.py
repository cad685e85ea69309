"""Holds the quickstart's results.json against what the README promises."""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "quickstart"))
from run import MOST_SECONDS, PROMISED

MOST_WAIT = 0.05  # Share of a step spent waiting for data.

path = Path(sys.argv[1])
results = json.loads(path.read_text())
found = {(r["compressor"], r["budget"], r["task"]): r for r in results["eval"]}
# Rounding differs between processors, and a set of images is a sample: the interval decides.
wrong = [
    f"{key}: {found[key]['accuracy']}, interval {found[key]['ci95']}, lies below {least}"
    for key, least in PROMISED.items()
    if found[key]["ci95"][1] < least
]
compiled = {k: n for k, n in results["train"]["compilations"].items() if n != 1}
wrong += [f"{k} was compiled {n} times" for k, n in compiled.items()]
lines = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
wait = statistics.median(row["data_wait_fraction"] for row in lines if row["split"] == "train")
print(f"data wait: {100 * wait:.2f} % of a step")
if wait > MOST_WAIT:
    wrong.append(f"data wait: {wait} > {MOST_WAIT}")
for row in results["controls"]:
    # Chance is at most 1 in 7: ten digits, counts, eight rows or columns, colours of a skewed draw.
    if row["ci95"][0] > 0.2:
        wrong.append(f"control {row['control']}, {row['task']}: {row['accuracy']} is above chance")
for key, least in PROMISED.items():
    print(f"{key}: {found[key]['accuracy']:.3f} {found[key]['ci95']}, at least {least}")
print(f"training: {results['train']['seconds']} s")
if results["train"]["seconds"] > MOST_SECONDS:
    # A slow machine is no mistake in the code; it is said, not failed.
    print(f"SLOW: training took more than {MOST_SECONDS} s")
if wrong:
    sys.exit("\n".join(wrong))
