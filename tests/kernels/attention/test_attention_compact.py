"""Kept tokens moved together: attention to them is attention to the originals."""

import attention_cases as cases
import jax
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, compact, keep_blocks, make_mask

RNG = np.random.default_rng(0)
KEEP = RNG.random((3, 40)) < np.array([[0.3], [0.9], [0.0]])
MOST = int(KEEP.sum(axis=1).max())


def turned(*arrays):
    return tuple(x.swapaxes(1, 2) for x in arrays)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_kept_tokens(causal):
    """Lengths, bias and positions of `compact` give what hiding the other tokens gives."""
    q, k, v = cases.arrays((3, 4, 2, 40, 40, 8, 8))
    sizes = RNG.integers(1, 5, (3, 40)).astype(np.float32)
    found = jax.jit(compact, static_argnums=2)(turned(k, v), KEEP, MOST, sizes=sizes)
    assert found.lengths.tolist() == KEEP.sum(axis=1).tolist()
    ours = attention(
        q,
        *turned(*found.values),
        key_bias=found.key_bias,
        kv_lengths=found.lengths,
        kv_positions=found.positions,
        causal=causal,
    )
    mask = make_mask(40, 40, causal=causal, kv_live=KEEP)
    hidden = attention(q, k, v, key_bias=np.log(sizes), mask=mask)
    np.testing.assert_allclose(ours.out, hidden.out, atol=1e-6)
    np.testing.assert_allclose(ours.lse, hidden.lse, atol=1e-6)


def test_what_is_moved():
    x = RNG.normal(size=(3, 40, 2, 5)).astype(np.float32)
    given = {"x": x, "even": np.arange(40)[None].repeat(3, 0) % 2 == 0}
    found = compact(given, KEEP, 7, positions=np.arange(40)[None].repeat(3, 0) * 2)
    assert found.values["even"].dtype == bool
    for row in range(3):
        kept = np.flatnonzero(KEEP[row])[:7]
        count = len(kept)
        assert found.lengths[row] == count
        np.testing.assert_array_equal(found.index[row][:count], kept)
        np.testing.assert_array_equal(found.values["x"][row][:count], x[row][kept])
        np.testing.assert_array_equal(found.positions[row][:count], 2 * kept)
        assert not np.any(found.values["x"][row][count:]) and not np.any(found.key_bias[row])


def test_gradients_go_back_to_kept_tokens_alone():
    x = RNG.normal(size=(3, 40, 5)).astype(np.float32)
    gradient = jax.grad(lambda x: compact(x, KEEP, MOST).values.sum())(x)
    np.testing.assert_array_equal(gradient, np.broadcast_to(KEEP[..., None], x.shape))


def test_best_blocks_are_kept_in_place():
    scores = RNG.random((2, 30)).astype(np.float32)
    keep = np.asarray(keep_blocks(scores, 8, 2))
    for row in range(2):
        total = [scores[row][i : i + 8].sum() for i in range(0, 30, 8)]
        best = np.argsort(total)[-2:]
        np.testing.assert_array_equal(keep[row], np.isin(np.arange(30) // 8, best))


@pytest.mark.parametrize(
    "call",
    [
        lambda: compact(np.zeros((3, 40)), KEEP, 0),
        lambda: compact(np.zeros((3, 40)), KEEP, 41),
        lambda: compact(np.zeros((3, 39)), KEEP, 4),
        lambda: keep_blocks(np.zeros((2, 30)), 8, 5),
        lambda: keep_blocks(np.zeros((2, 30)), 0, 1),
    ],
)
def test_mistakes_are_named(call):
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) <= 3
