"""Small states, what harms their files, and scripts that save them in processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).resolve().parents[2]


def make_state(seed=0, width=8):
    params = {
        "encoder": {"kernel": jax.random.normal(jax.random.key(seed), (width, 4))},
        "head": {
            "kernel": jax.random.normal(jax.random.key(seed + 1), (4, 3)).astype(jnp.bfloat16)
        },
    }
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "rng": jax.random.split(jax.random.key(seed + 2), 3),
        "step": jnp.int32(seed),
        "mask": jnp.array([True, False]),
        "empty": jnp.zeros((0, 4)),
        "count": seed + 5,
        "host": np.arange(3, dtype=np.int64) + 2**40,
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state
    )


def assert_equal(got, want):
    """Bitwise, with types; independent of state_sha256."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if hasattr(b, "dtype"):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        else:
            assert a == b


def harm_flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def run_script(text, *arguments, devices=1, wait=True):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if not wait:
        return process
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors[-3000:]
    return output
