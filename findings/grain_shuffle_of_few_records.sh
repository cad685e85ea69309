#!/usr/bin/env bash
# grain 0.2.18: the fewer records a data set has, the longer `shuffle` takes for each of them. A number
# is passed through a 16-bit cipher until it is below the length, so 3 records take some twenty
# thousand passes each (milliseconds) and 50,000 take one or two (microseconds).
# efficient_vlm/data/mixture.py puts fewer than 64 records in order itself.
# Seen with Python 3.11, grain 0.2.18 (times differ between machines):
#   3 records: 7028 us each
#   128 records: 275 us each
#   50000 records: 8 us each
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata, time
import grain
print("grain", importlib.metadata.version("grain"))
taken = {}
for length in (3, 128, 50_000):
    order = grain.MapDataset.range(length).shuffle(seed=0).repeat(1000)
    start = time.perf_counter()
    for i in range(300):
        order[i]
    taken[length] = (time.perf_counter() - start) / 300
    print(f"{length} records: {taken[length] * 1e6:.0f} us each")
assert taken[3] > 50 * taken[50_000], taken
print("as recorded")
PY
