"""The TPU kernels in Pallas' interpreter hold the contract; what they leave out is not read."""

import attention_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import AttentionContract

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, make_mask, platforms
from efficient_vlm.kernels.attention.tpu import blocks as tpu_blocks
from efficient_vlm.kernels.attention.tpu.call import Call


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Blocks of one tile, so that small problems have many."""
    monkeypatch.setattr(tpu_blocks, "_SIZES", dict.fromkeys(tpu_blocks._SIZES, ((128, 128),) * 2))
    with platforms.interpreted(True):
        yield


class TestTpu(AttentionContract):
    """Contract."""

    implementation = "tpu"


def test_blocks_that_nothing_sees_are_not_read():
    """Whole blocks of garbage: what is neither fetched nor computed cannot spoil anything."""
    shape = (1, 2, 1, 256, 512, 64, 64)
    q, k, v = cases.arrays(shape)
    for x in (k, v):
        x[:, :, 256:] = np.nan
    found = attention(q, k, v, kv_lengths=np.array([200]), implementation="tpu")
    x = attention(q, k[:, :, :200], v[:, :, :200], implementation="reference")
    np.testing.assert_allclose(found.out, x.out, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"), [("float64", "float64"), ("wide", "head dim 512 (at most 256)")]
)
def test_what_it_lacks_is_named(change, words):
    q = jnp.zeros((1, 1, 8, 512 if change == "wide" else 8))
    q = np.zeros((1, 1, 8, 8)) if change == "float64" else q
    with pytest.raises(UserError) as error:
        attention(q, q, q, implementation="tpu")
    text = str(error.value)
    assert words in text and "reference, xla" in text and len(text.splitlines()) <= 3


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="MiB of VMEM"):
        tpu_blocks.check("forward", 4096, 8192, 128)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (330, 330), (200, 700)])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_the_compiler_is_told_of_what_is_computed(by, queries, keys, causal):
    """Of tokens in order without padding: the blocks that the lists of the call hold."""
    q, k, v = (jnp.zeros((2, 2, n, 64)) for n in (queries, keys, keys))
    place = jnp.arange(queries) + keys - queries
    live = jnp.ones((2, keys), bool)
    mask = make_mask(queries, keys, causal=causal, q_positions=place, kv_live=live)
    name = {"queries": "backward_q", "keys": "backward_kv"}[by]
    call = Call(name, by, q, k, v, None, mask, 1.0, None)
    flops = call.options(3, (1,) * 4)["cost_estimate"].flops
    assert flops == 2 * 3 * 2 * 128 * 128 * call.lists[0].sum()
