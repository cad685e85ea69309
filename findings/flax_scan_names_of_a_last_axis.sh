#!/usr/bin/env bash
# flax 0.12.8: `nn.scan` with `variable_axes={"params": -1}` stacks parameters along the last axis, but
# puts the name of the new axis before the last one: the value is [4, 5, 3] and its names are
# ("embed", "layers", "mlp"). A sharding made of these names cuts layers where it means the width.
# With axis 0 or 1 names and value agree.
# Seen with Python 3.11, flax 0.12.8, jax 0.10.2:
#   axis 0: value (3, 4, 5), names ('layers', 'embed', 'mlp'), agree: True
#   axis 1: value (4, 3, 5), names ('embed', 'layers', 'mlp'), agree: True
#   axis -1: value (4, 5, 3), names ('embed', 'layers', 'mlp'), agree: False
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'flax==0.12.8' 'jax==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata

import jax
import jax.numpy as jnp
from flax import linen as nn

print("flax", importlib.metadata.version("flax"))
SIZES = {"embed": 4, "mlp": 5, "layers": 3}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
        self.param("kernel", init, (SIZES["embed"], SIZES["mlp"]))
        return x, None


agree = {}
for axis in (0, 1, -1):
    layers = nn.scan(
        Layer,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=SIZES["layers"],
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    kernel = layers().init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]["kernel"]
    agree[axis] = kernel.value.shape == tuple(SIZES[name] for name in kernel.names)
    print(f"axis {axis}: value {kernel.value.shape}, names {kernel.names}, agree: {agree[axis]}")
assert agree == {0: True, 1: True, -1: False}, "changed"
PY
