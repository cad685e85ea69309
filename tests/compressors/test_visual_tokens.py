"""The types, their two book-keepers and the selections, against loops over patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_vlm.compressors import Signals, VisualTokens, build, select
from efficient_vlm.compressors.tokens import merge, take


def fresh(grid, seed=0, mask=None, bias=True):
    """Tokens of two rows with random contents."""
    rng = np.random.default_rng(seed)
    num_tokens = grid[0] * grid[1]
    mask = rng.random((2, num_tokens)) < 0.7 if mask is None else np.asarray(mask)
    embed = jnp.asarray(rng.normal(size=(2, num_tokens, 3)), jnp.float32)
    tokens = VisualTokens.from_grid(embed, grid, mask=jnp.asarray(mask))
    if bias:
        tokens = tokens.replace(bias=jnp.asarray(rng.normal(size=mask.shape), jnp.float32))
    return tokens


def test_from_grid():
    tokens = fresh((2, 3), mask=[[True] * 6, [True, False] * 3])
    assert tokens.position[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert tokens.size.tolist() == [[1] * 6, [1, 0, 1, 0, 1, 0]]
    assert tokens.source.tolist() == [[0, 1, 2, 3, 4, 5], [0, -1, 2, -1, 4, -1]]


def test_from_grid_of_a_smaller_image():
    mask = jnp.array([[True, True, True, False]])
    tokens = VisualTokens.from_grid(jnp.ones((1, 4, 1)), (2, 2), source_grid=(4, 4), mask=mask)
    assert tokens.position[0].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert tokens.size.tolist() == [[4, 4, 4, 0]]
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]]
    assert tokens.source.reshape(4, 4).tolist() == rows


@pytest.mark.parametrize(("source", "grid"), [((4, 4), (3, 3)), ((8, 8), (5, 5)), ((4, 6), (2, 2))])
def test_a_smaller_image_keeps_the_books_of_resampled_features(source, grid):
    """`downsample` before the encoder and behind it differ in features only."""
    before = VisualTokens.from_grid(jnp.ones((1, grid[0] * grid[1], 1)), grid, source)
    full = VisualTokens.from_grid(jnp.ones((1, source[0] * source[1], 1)), source)
    after = build("downsample", budget=grid[0] * grid[1], grid=source).apply({}, full)
    for field in ("embed", "position", "size", "mask", "source"):
        np.testing.assert_allclose(getattr(before, field), getattr(after, field), atol=1e-5)
    assert before.size.sum() == pytest.approx(source[0] * source[1])


def test_from_grid_rejects_other_shapes():
    with pytest.raises(ValueError, match="6 tokens"):
        VisualTokens.from_grid(jnp.ones((1, 6, 2)), (2, 2))
    with pytest.raises(ValueError, match="smaller"):
        VisualTokens.from_grid(jnp.ones((1, 6, 2)), (2, 3), source_grid=(2, 2))


def test_take_sorts_and_remaps():
    tokens = fresh((2, 4), seed=1, mask=[[True] * 8, [False, True] * 4])
    indices = jnp.array([[6, 0, 3], [5, 2, 7]])
    out = take(tokens, indices, jnp.array([[True, True, False], [True, True, True]]))
    assert out.mask.tolist() == [[True, True, False], [True, True, False]]
    assert out.source.tolist() == [[0, -1, -1, -1, -1, -1, 1, -1], [-1] * 5 + [0, -1, 1]]
    for row, chosen in enumerate(([0, 6], [5, 7])):
        for field in ("embed", "position", "size", "bias"):
            got, had = getattr(out, field)[row], getattr(tokens, field)[row]
            np.testing.assert_array_equal(got[:2], had[jnp.array(chosen)])
            assert not np.any(got[2:])


def test_merge_weighs_by_size():
    tokens = fresh((2, 4), seed=2)
    first = np.array([[2, 2, 0, -1, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]])
    second = np.array([[0, 0, -1], [1, 1, 1]])
    out = merge(merge(tokens, jnp.asarray(first), 3), jnp.asarray(second), 2)
    mask = np.asarray(tokens.mask)
    for row in range(2):
        # Two merges in a row are one merge of the patches: only weights by size give that.
        final = [second[row][a] if a >= 0 else -1 for a in first[row]]
        final = [f if m else -1 for f, m in zip(final, mask[row], strict=True)]
        assert out.source[row].tolist() == final
        for slot in range(2):
            members = [p for p in range(8) if final[p] == slot]
            assert out.size[row, slot] == len(members)
            assert out.mask[row, slot] == bool(members)
            for field in ("embed", "position", "bias"):
                values = np.float64(getattr(tokens, field)[row])[members]
                mean = values.mean(axis=0) if members else np.zeros(values.shape[1:])
                np.testing.assert_allclose(getattr(out, field)[row, slot], mean, atol=1e-6)


def test_compressors_follow_one_another():
    """4 x 4 patches pooled to 4, strided to 2: the books still speak of patches."""
    tokens = fresh((4, 4), mask=np.ones((2, 16), bool))
    pooled = build("average_pool", budget=4).apply({}, tokens)
    out = build("stride", budget=2).apply({}, pooled)
    assert out.size.tolist() == [[4, 4]] * 2
    assert out.position[0].tolist() == [[0.5, 2.5], [2.5, 2.5]]
    rows = [[-1, -1, 0, 0], [-1, -1, 0, 0], [-1, -1, 1, 1], [-1, -1, 1, 1]]
    assert out.source[0].reshape(4, 4).tolist() == rows
    np.testing.assert_allclose(out.bias[0, 0], tokens.bias[0, jnp.array([2, 3, 6, 7])].mean(), 1e-5)


def test_text_topk_adds_to_an_earlier_bias():
    tokens = fresh((4, 4), mask=np.ones((2, 16), bool))
    module, signals = build("text_topk", budget=16), Signals(text=jnp.ones((2, 4)))
    out, _ = module.init_with_output(jax.random.key(0), tokens, signals)
    np.testing.assert_array_equal(out.bias, tokens.bias)


SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), -float("inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SCORES, st.booleans()), min_size=7, max_size=7), st.sampled_from([1, 4, 7])
)
def test_top_k_is_stable(row, k):
    """Ties to the lowest index, NaN with the worst, padding after every real token."""
    scores, mask = np.float32([s for s, _ in row]), np.array([m for _, m in row])
    indices, valid = select.top_k(jnp.asarray(scores)[None], jnp.asarray(mask)[None], k)
    worst = np.finfo(np.float32).min
    rank = [worst if np.isnan(s) else max(s, worst) for s in scores]
    expected = sorted(np.flatnonzero(mask), key=lambda i: (-rank[i], i))[:k]
    assert indices[0][valid[0]].tolist() == expected
    assert valid[0].tolist() == [j < len(expected) for j in range(k)]
