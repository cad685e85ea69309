"""Kernels of one platform asked for in a program for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, cudnn
from efficient_vlm.kernels.paged_attention import attention_decode

Q = jnp.ones((1, 2, 256, 64), jnp.bfloat16)


def total(q, implementation):
    return attention(q, Q, Q, implementation=implementation).out.astype(jnp.float32).sum()


def without_jit(function):
    def run(x):
        with jax.disable_jit():
            return function(x)

    return run


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks a CPU for what it has not")
@pytest.mark.parametrize("implementation", ["tpu", "gpu", "cudnn"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.grad,
        lambda f: jax.vmap(f, axis_size=1, in_axes=None),
        jax.checkpoint,
        without_jit,
    ],
    ids=["eager", "jit", "grad", "vmap", "checkpoint", "disable_jit"],
)
def test_a_cpu_says_which_it_has(implementation, wrap):
    with pytest.raises(UserError) as error:
        wrap(lambda q: total(q, implementation))(Q)
    lines = str(error.value).splitlines()
    assert f"implementation {implementation!r}" in lines[0] and len(lines) == 3
    assert "reference, xla" in lines[1] and "implementation=None" in lines[2]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks a CPU for what it has not")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
def test_a_cpu_beside_a_cudnn(wrap, monkeypatch):
    """JAX finds the library, the program is for the CPU all the same."""
    monkeypatch.setattr(cudnn, "attend", lambda q, *_, **options: q)
    with pytest.raises(UserError, match="'cudnn' in a program that is not for CUDA"):
        wrap(lambda q: total(q, "cudnn"))(Q)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks a CPU for what it has not")
def test_decoding_too():
    with pytest.raises(UserError, match="'tpu' in a program that is not for TPU"):
        attention_decode(Q[:, :, :1], Q, Q, np.array([256]), implementation="tpu")


def test_a_program_for_a_tpu_is_made_anywhere():
    traced = jax.jit(jax.grad(lambda q: total(q, "tpu"))).trace(Q)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(UserError, match="'tpu' in a program that is not for TPU"):
        traced.lower(lowering_platforms=("cuda",))
