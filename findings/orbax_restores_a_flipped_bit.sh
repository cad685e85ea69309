#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: the arrays of a checkpoint (OCDBT, zarr with zstd) carry no checksum that
# `restore` compares: with one bit of the data file flipped the checkpoint is restored without an
# error or a warning, and with other values. A digest of one's own is the only way to know.
# Seen with Python 3.11, orbax-checkpoint 0.12.8, jax 0.10.2, flax 0.12.8:
#   a bit at 25% of the file: restored, other values
#   a bit at 50% of the file: restored, other values
#   a bit at 75% of the file: restored, other values
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'orbax-checkpoint==0.12.8' 'jax==0.10.2' 'flax==0.12.8'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata
import logging
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"))
values = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"w": jnp.asarray(values)})
    data = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole, silent = data.read_bytes(), 0
    for share in (0.25, 0.5, 0.75):
        damaged = bytearray(whole)
        damaged[int(len(whole) * share)] ^= 1
        data.write_bytes(damaged)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                read = checkpointer.restore(path, {"w": jnp.zeros((256, 256))})["w"]
        except Exception as error:
            print(f"a bit at {share:.0%} of the file: {type(error).__name__}")
            continue
        wrong = int((np.asarray(read) != values).sum())
        print(f"a bit at {share:.0%} of the file: restored, {wrong > 0 and 'other values'}")
        silent += wrong > 0
assert silent == 3, "changed: a flipped bit is noticed"
PY
