#!/usr/bin/env bash
# grain 0.2.18: the state of an iterator over a shuffled MapDataset is a position alone,
# {"next_index": n}. Set on a dataset that is shuffled with another seed (or of another length), it is
# taken without a word, and goes on there in the other order: within one epoch some elements come
# twice and others never. Whoever resumes must compare the seeds.
# Seen with Python 3.11, grain 0.2.18:
#   state: {'next_index': 5}
#   resumed with seed 0: twice [], never []
#   resumed with seed 1: twice [8], never [5]
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'grain==0.2.18'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata

import grain

print("grain", importlib.metadata.version("grain"))


def make(seed):
    return iter(grain.MapDataset.range(10).shuffle(seed=seed).to_iter_dataset())


before = make(seed=0)
first = [int(next(before)) for _ in range(5)]
state = before.get_state()
print("state:", state)
resumed = {}
for seed in (0, 1):
    after = make(seed)
    after.set_state(state)
    resumed[seed] = [int(each) for each in after]
    seen = first + resumed[seed]
    twice = sorted(each for each in set(seen) if seen.count(each) > 1)
    print(f"resumed with seed {seed}: twice {twice}, never {sorted(set(range(10)) - set(seen))}")
assert sorted(first + resumed[0]) == list(range(10))
assert sorted(first + resumed[1]) != list(range(10)), "changed"
PY
