"""Shapes in signatures: tests check them, the package does not, and they cost no start-up time."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from shape_checks import check_fields

from efficient_vlm.kernels import attention, grouped_matmul, paged_attention

TESTS = Path(__file__).parent

# A mask of one row broadcasts to two: NumPy's rules hide the mistake.
WRONG = """
import jax.numpy as jnp
from efficient_vlm.compressors import score
print(score.min_max(jnp.zeros((2, 4)), jnp.ones((1, 4), bool)).shape)
"""


def run(code: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, from the folder of the tests."""
    root = f"import sys; sys.path.insert(0, {str(TESTS.parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", root + code], cwd=TESTS, capture_output=True, text=True
    )


def test_a_wrong_shape_is_refused_under_the_hook():
    result = run("import shape_checks" + WRONG)
    assert result.returncode == 1
    assert "TypeCheckError" in result.stderr
    assert "parameters of efficient_vlm.compressors.score.min_max" in result.stderr
    assert "typechecking parameter 'mask'" in result.stderr


def test_the_package_alone_checks_no_shapes():
    result = run(WRONG + "assert 'beartype' not in sys.modules, 'beartype is imported'\n")
    assert (result.returncode, result.stdout) == (0, "(2, 4)\n"), result.stderr


def test_importing_the_package_imports_neither_jax_nor_jaxtyping():
    names = ("jax", "jaxtyping", "beartype", "numpy")
    result = run(f"import efficient_vlm; print([n for n in {names} if n in sys.modules])\n")
    assert result.stdout == "[]\n", result.stderr


def checked(function):
    """The kernels raise a UserError for wrong shapes themselves, so the hook leaves them alone."""
    return jaxtyped(function, typechecker=beartype)


def arrays(shape, dtype, kind):
    values = np.linspace(-1, 1, np.prod(shape)).reshape(shape)
    return jnp.asarray(values, dtype) if kind == "jax" else values.astype(dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("jax", jnp.bfloat16), ("numpy", np.float32)])
def test_signatures_of_the_kernels_hold(kind, dtype):
    q, k = arrays((2, 4, 3, 8), dtype, kind), arrays((2, 2, 5, 8), dtype, kind)
    v, bias = arrays((2, 2, 5, 6), dtype, kind), arrays((1, 5), np.float32, kind)
    result = checked(attention.attention)(
        *(q, k, v),
        key_bias=bias,
        q_positions=np.arange(3),
        kv_positions=np.zeros((2, 5)),
        kv_lengths=np.array([5, 3]),
        importance_weights=np.ones((2, 3), np.float32),
    )
    check_fields(result)
    rows = np.array([[0], [2]])
    checked(attention.attention_importance)(
        q, k, result.lse, np.ones((2, 1), np.float32), rows=rows
    )
    lhs, rhs = arrays((6, 8), dtype, kind), arrays((2, 8, 4), dtype, kind)
    checked(grouped_matmul.grouped_matmul)(lhs, rhs, np.array([2, 4]))


@pytest.mark.parametrize("pages", [None, np.array([[0], [2]])])
def test_signatures_of_decoding_hold(pages):
    pool = arrays((3 if pages is not None else 2, 2, 4, 8), jnp.bfloat16, "jax")
    (k, k_scale), (v, v_scale) = map(checked(paged_attention.quantise), (pool, pool))
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    q, live = arrays((2, 4, 1, 8), jnp.bfloat16, "jax"), np.ones((1, 4), bool)
    decode = checked(paged_attention.attention_decode)
    check_fields(decode(q, k, v, np.array([4, 2]), pages=pages, live=live, **scales))
    with pytest.raises(TypeCheckError, match="'lengths'"):
        decode(q, k, v, np.array([4, 2, 1]), pages=pages, **scales)
