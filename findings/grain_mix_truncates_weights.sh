#!/usr/bin/env bash
# grain 0.2.18: `MapDataset.mix` does not keep the weights it is given: 0.7 and 0.3 draw 69,970 and
# 30,030 of 100,000 elements. The smallest weight becomes 100 and the others are cut to whole numbers
# in that unit: 233 and 100. Weights that fit into it (0.6 and 0.4: 150 and 100) are kept.
# efficient_vlm/data/mixture.py counts in exact fractions (tests/data/test_mixture.py).
# Seen with Python 3.11, grain 0.2.18:
#   [0.7, 0.3] {'a': 69970, 'b': 30030}
#   [0.6, 0.4] {'a': 60000, 'b': 40000}
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
"$folder/venv/bin/python" - <<'PY'
import collections, importlib.metadata
import grain
print("grain", importlib.metadata.version("grain"))
parts = [grain.MapDataset.source([name]).repeat(10**6) for name in "ab"]
counts = {}
for weights in ([0.7, 0.3], [0.6, 0.4]):
    mixed = grain.MapDataset.mix(parts, weights=weights)
    counts[tuple(weights)] = dict(collections.Counter(mixed[i] for i in range(100_000)))
    print(weights, counts[tuple(weights)])
assert counts[0.7, 0.3] == {"a": 69970, "b": 30030}, counts
assert counts[0.6, 0.4] == {"a": 60000, "b": 40000}, counts
print("as recorded")
PY
