"""The TPU kernels on two simulated cores, with races looked for and fresh memory full of NaN."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import AttentionContract
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from efficient_vlm.kernels.attention import attention, platforms
from efficient_vlm.kernels.attention.tpu import blocks as tpu_blocks
from efficient_vlm.kernels.paged_attention import attention_decode, quantise

SHAPE = (1, 2, 1, 200, 300, 64, 64)
SETS = [
    ("plain",),
    ("causal", "bias", "softcap"),
    ("lengths", "causal", "importance"),
    ("segments", "bias", "importance"),
    ("prefix", "window", "positions"),
]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """One tile a block; "parallel" dimensions are really shuffled over two cores."""
    monkeypatch.setattr(tpu_blocks, "_SIZES", dict.fromkeys(tpu_blocks._SIZES, ((128, 128),) * 2))
    how = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=2,
        random_seed=3,
    )
    with platforms.interpreted(how):
        yield
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("features", SETS, ids=" + ".join)
def test_forward_backward_and_importance(features):
    q, k, v = cases.arrays(SHAPE)
    given = cases.options(features, SHAPE)
    weighed = "importance_weights" in given

    def both(implementation):
        def loss(q, k, v):
            found = attention(q, k, v, implementation=implementation, **given)
            total = jnp.sum(found.out**2) + jnp.sum(jnp.where(found.lse < 1e9, found.lse, 0))
            if weighed:
                total += jnp.sum(found.importance**2)
            return total, found

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    for one, two in zip(jax.tree.leaves(both("tpu")), jax.tree.leaves(both("reference"))):
        scale = max(1.0, float(np.abs(np.nan_to_num(two, posinf=0)).max()))
        np.testing.assert_allclose(one / scale, two / scale, atol=2e-5)


def test_decoding_from_pages_in_int8():
    q, k, v = cases.arrays((2, 4, 2, 1, 1280, 64, 64))
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)

    def pool(x):  # Row 0 has pages 0 and 1, of two blocks each.
        x = x.reshape(2, 2, 2, 640, *x.shape[3:])
        return np.moveaxis(x, 2, 1).reshape(4, *x.shape[1:2], *x.shape[3:])

    k, v, k_scale, v_scale = (pool(np.asarray(x)) for x in (k, v, k_scale, v_scale))
    given = dict(pages=np.arange(4).reshape(2, 2), k_scale=k_scale, v_scale=v_scale)
    given["live"] = np.random.default_rng(0).random((2, 1280)) < 0.7
    lengths = np.array([1280, 700])
    found = attention_decode(q, k, v, lengths, implementation="tpu", **given)
    plain = attention_decode(q, k, v, lengths, implementation="xla", **given)
    np.testing.assert_allclose(found.out, plain.out, atol=2e-5)
    np.testing.assert_allclose(found.lse, plain.lse, atol=2e-5)


def test_decoding():
    q, k, v = cases.arrays((2, 4, 2, 1, 1100, 64, 64))
    lengths = np.array([1100, 40])
    found = attention_decode(q, k, v, lengths, implementation="tpu")
    plain = attention_decode(q, k, v, lengths, implementation="xla")
    np.testing.assert_allclose(found.out, plain.out, atol=2e-5)
    np.testing.assert_allclose(found.lse, plain.lse, atol=2e-5)


def test_drafts_in_a_window():
    """Lengths of each query and a window, over two blocks of which one is beyond the second row."""
    q, k, v = cases.arrays((2, 4, 2, 3, 1100, 64, 64))
    given = dict(places=np.arange(1100.0)[None], after=np.array([[900, 2, 1050], [3, 4, -1]]))
    lengths = np.array([[1098, 1099, 1100], [40, 41, 0]])
    found = attention_decode(q, k, v, lengths, implementation="tpu", **given)
    plain = attention_decode(q, k, v, lengths, implementation="xla", **given)
    np.testing.assert_allclose(found.out, plain.out, atol=2e-5)
    np.testing.assert_allclose(found.lse, plain.lse, atol=2e-5)


class Contract(AttentionContract):
    """Collected by nothing: all of it takes minutes here, see `test_attention_tpu`."""

    implementation = "tpu"


def test_the_contract_reads_nothing_out_of_range():
    """Lengths that no block divides, under a mask of models, and rows that see nothing."""
    Contract().test_masks_of_models()
    Contract().test_nothing_to_see()
