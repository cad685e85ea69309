#!/usr/bin/env bash
# jax 0.10.2: `compiled.cost_analysis()` counts the body of a `lax.scan` once, whatever its length:
# ten turns have the FLOPs of one, and a tenth of the same scan unrolled. A model whose layers are
# scanned seems to cost one layer. And a gather of four rows counts the bytes of its whole table.
# Seen with Python 3.11, jax 0.10.2:
#   products of 1 turn, 10 turns, 10 turns unrolled: 1.00 1.00 10.00
#   bytes of a gather of 4 rows of 64 bytes, table of 6400000: 6400272
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata

import jax
import jax.numpy as jnp

print("jax", importlib.metadata.version("jax"))


def cost(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()


def scanned(turns, unroll):
    def function(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=turns, unroll=unroll)[0]

    return cost(function, x, w)["flops"]


x = w = jnp.ones((64, 64))
product = 2 * 64**3
found = [scanned(*of) / product for of in ((1, 1), (10, 1), (10, 10))]
print("products of 1 turn, 10 turns, 10 turns unrolled:", *(f"{each:.2f}" for each in found))
assert [round(each) for each in found] == [1, 1, 10], "changed: the turns of a loop are counted"
table, rows = jnp.ones((100_000, 16)), jnp.arange(4)
read = cost(lambda table, rows: table[rows], table, rows)["bytes accessed"]
print(f"bytes of a gather of 4 rows of 64 bytes, table of {table.nbytes}: {read:.0f}")
assert read > table.nbytes, "changed: a gather counts what it reads"
PY
