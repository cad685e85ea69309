#!/usr/bin/env bash
# qwix 0.1.8: a Linen module that casts its kernel, `kernel.astype(x.dtype)`, can be quantised
# (`init` of the PTQ model works, and `quantize_params` too), but `apply` with the quantised weights
# raises ValueError("Unsupported type: <class '...QArray'>"): `WithAux.astype` takes arrays alone.
# `nn.Dense` does not show it, since it casts by `promote_dtype`, which qwix replaces.
# Seen with Python 3.11, jax 0.10.2, flax 0.12.8:
#   init: WithAux
#   apply without the cast: ok
#   apply with the cast: ValueError: Unsupported type: <class 'qwix._src.core.qarray.QArray'>
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'qwix==0.1.8' 'jax==0.10.2' 'flax==0.12.8'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import jax
import jax.numpy as jnp
import qwix
from flax import linen as nn


class Product(nn.Module):
    cast: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 4))
        kernel = kernel.astype(x.dtype) if self.cast else kernel
        return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))


def run(cast):
    model, x = Product(cast), jnp.ones((2, 8))
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8")]
    quantised = qwix.quantize_model(model, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(quantised.init, jax.random.key(0), x)["params"]
    print("init:", type(shapes["kernel"]).__name__)
    params = qwix.quantize_params(model.init(jax.random.key(0), x)["params"], shapes)
    return quantised.apply({"params": params}, x)


assert run(False).shape == (2, 4)
print("apply without the cast: ok")
try:
    run(True)
except ValueError as error:
    print("apply with the cast: ValueError:", error)
    assert "Unsupported type" in str(error)
else:
    raise SystemExit("changed: the cast is taken now")
PY
