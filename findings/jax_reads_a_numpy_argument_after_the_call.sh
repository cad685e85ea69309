#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a jitted function reads a NumPy argument after its call has returned, if the
# array begins at a multiple of 64 bytes; an array that does not is copied. So a buffer that is
# filled again for the next batch, or a test that writes into its input, changes the result of the
# call before, now and then: NumPy's own allocations begin at multiples of 64 by chance.
# Seen with Python 3.11, jax 0.10.2 (the array held 1 at the call and 2 afterwards):
#   begins at a multiple of 64 bytes: the result is of [2]
#   begins 4 bytes behind one: the result is of [1]
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

print("jax", importlib.metadata.version("jax"))


def ones(offset, count=4096):
    """int32 ones that begin `offset` bytes behind a multiple of 64."""
    memory = np.zeros(4 * count + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    array = memory[start : start + 4 * count].view(np.int32)
    array[:] = 1
    return array


# Long enough that the caller is back before the argument is needed.
@jax.jit
def slow(array, matrix):
    power = jnp.linalg.matrix_power(matrix, 64).sum()
    return array + (0 * power).astype(jnp.int32)


matrix = np.eye(1200, dtype=np.float32)
slow(ones(0), matrix).block_until_ready()
found = {}
for offset in (0, 4):
    array = ones(offset)
    result = slow(array, matrix)
    array[:] = 2
    found[offset] = np.unique(np.asarray(result)).tolist()
print("begins at a multiple of 64 bytes: the result is of", found[0])
print("begins 4 bytes behind one: the result is of", found[4])
assert found == {0: [2], 4: [1]}, "changed"
PY
