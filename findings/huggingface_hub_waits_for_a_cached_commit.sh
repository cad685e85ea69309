#!/usr/bin/env bash
# huggingface_hub 2.4.0: with a snapshot in the cache and no network, the name of its branch is
# answered in a fraction of a second, and the exact commit of the very same snapshot only after the
# listing of its files was retried for some 20 seconds. Whoever pins commits, for runs that can be
# repeated, waits that long at every start without a network, unless HF_HUB_OFFLINE=1 is set.
# Seen with Python 3.11, huggingface_hub 2.4.0:
#   main: 0.2 s
#   commit: 23.3 s
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'huggingface_hub==2.4.0'
HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore - <<'PY'
import os
import pathlib
import socket
import time

with socket.socket() as free:  # A port where nobody answers.
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
commit = "a" * 40
model = pathlib.Path(os.environ["HF_HOME"], "hub/models--org--name")
snapshot = model / "snapshots" / commit
snapshot.mkdir(parents=True)
(snapshot / "config.json").write_text("{}")
(model / "refs").mkdir()
(model / "refs/main").write_text(commit)

import huggingface_hub

print("huggingface_hub", huggingface_hub.__version__)
seconds = {}
for revision in ("main", commit):
    start = time.monotonic()
    found = huggingface_hub.snapshot_download("org/name", revision=revision)
    seconds[revision] = time.monotonic() - start
    assert found == str(snapshot), found
    print(f"{'commit' if revision == commit else revision}: {seconds[revision]:.1f} s")
assert seconds[commit] > 20 * seconds["main"], "changed"
PY
