"""Holds the quickstart's results.json against what the README promises."""

import json
import sys
from pathlib import Path

# (compressor, budget, task): lowest accuracy on unseen glyphs.
LEAST = {
    ("none", 64, "needle"): 0.88,
    ("none", 64, "count"): 0.95,
    ("none", 64, "point"): 0.97,
    ("none", 64, "global"): 0.99,
    ("text_topk", 16, "needle"): 0.85,
}
MOST_SECONDS = 300

results = json.loads(Path(sys.argv[1]).read_text())
found = {(r["compressor"], r["budget"], r["task"]): r["accuracy"] for r in results["eval"]}
wrong = [f"{key}: {found[key]} < {least}" for key, least in LEAST.items() if found[key] < least]
compiled = {k: n for k, n in results["train"]["compilations"].items() if n != 1}
wrong += [f"{k} was compiled {n} times" for k, n in compiled.items()]
for key, least in LEAST.items():
    print(f"{key}: {found[key]:.3f}, at least {least}")
print(f"training: {results['train']['seconds']} s")
if results["train"]["seconds"] > MOST_SECONDS:
    # A slow machine is no mistake in the code; it is said, not failed.
    print(f"SLOW: training took more than {MOST_SECONDS} s")
if wrong:
    sys.exit("\n".join(wrong))
