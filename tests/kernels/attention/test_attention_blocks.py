"""Which blocks are left out: never one that holds anything, and all that bounds can tell."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import blocks, choose, make_mask, visible

ARGUMENTS = ("causal", "window", "prefix_length", "q_positions", "kv_positions", "q_segments")
ARGUMENTS += ("kv_segments", "q_lengths", "kv_lengths")
MASKS = [name for name in cases.FEATURES if name not in ("softcap", "bias", "importance", "plain")]


def drawn(features, seed, batch=2, queries=21, keys=27):
    shape = (batch, 1, 1, queries, keys, 1, 1)
    given = cases.options(features, shape, seed)
    return make_mask(queries, keys, **given), given, shape


@settings(max_examples=60, deadline=None)
@given(
    features=st.lists(st.sampled_from(MASKS), min_size=1, max_size=3, unique=True).filter(
        lambda features: features != ["positions"]  # Positions alone hide nothing.
    ),
    seed=st.integers(0, 999),
)
def test_masks_and_their_blocks(features, seed):
    mask, options, shape = drawn(features, seed)
    seen = np.broadcast_to(visible(mask), (2, 21, 27))
    by_hand = [[[cases.sees(b, i, j, shape, **options) for j in range(27)] for i in range(21)]
               for b in range(2)]  # fmt: skip
    np.testing.assert_array_equal(seen, by_hand)
    padded = blocks.pad_mask(mask, 24, 32)
    seen = np.pad(seen, ((0, 0), (0, 3), (0, 5)))
    np.testing.assert_array_equal(np.broadcast_to(visible(padded), seen.shape), seen)
    cut = seen.reshape(2, 3, 8, 4, 8)
    live = np.broadcast_to(blocks.live_blocks(padded, 8, 8), (2, 3, 4))
    whole = np.broadcast_to(blocks.whole_blocks(padded, 8, 8), (2, 3, 4))
    assert not (cut.any(axis=(2, 4)) & ~live).any()
    assert not (whole & ~cut.all(axis=(2, 4))).any()


def live_share(mask, size=64):
    return float(np.mean(blocks.live_blocks(mask, size, size)))


def test_what_bounds_can_tell_is_left_out():
    """Shares of 16 x 16 blocks, counted by hand."""
    count = 1024
    assert live_share(make_mask(count, count, causal=True)) == (16 * 17 / 2) / 256
    assert live_share(make_mask(count, count, causal=True, window=64)) == (16 + 15) / 256
    assert live_share(make_mask(count, count, kv_lengths=[256])) == 4 / 16
    rows = np.repeat(np.arange(4), 256)[None]
    assert live_share(make_mask(count, count, q_segments=rows, kv_segments=rows)) == 1 / 4
    # Kept tokens keep their positions: half of the keys, causal.
    kept = np.arange(0, 2 * count, 2)
    mask = make_mask(count, count, causal=True, q_positions=kept, kv_positions=kept)
    assert live_share(mask) == (16 * 17 / 2) / 256
    live = np.zeros((1, count), bool)
    live[:, 128:192] = live[:, 640:704] = True
    assert live_share(make_mask(count, count, kv_live=live)) == 2 / 16


def test_whole_blocks_need_no_mask():
    mask = make_mask(1024, 1024, causal=True)
    assert np.sum(blocks.whole_blocks(mask, 64, 64)) == 16 * 15 / 2
    rows = np.repeat(np.arange(4), 256)[None]
    mask = make_mask(1024, 1024, q_segments=rows, kv_segments=rows)
    assert np.mean(blocks.whole_blocks(mask, 64, 64)) == 1 / 4


def test_lists_of_blocks():
    live = jnp.array([[[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]], bool)
    table, count = blocks.listed(live)
    assert count.tolist() == [[2, 0, 4]]
    assert table.tolist()[0][0] == [1, 3, 3, 3] and table.tolist()[0][2] == [0, 1, 2, 3]
    first = jnp.array([[[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]], bool)
    table, count = blocks.listed(live, first)
    assert count.tolist() == [[2, 0, 4]]
    assert table.tolist()[0][0] == [3, 1, 1, 1] and table.tolist()[0][2] == [2, 3, 0, 1]


@pytest.mark.parametrize("spares", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_of_tokens_see_each_other(window, spares):
    """Two images of one row, whose tokens stand in front in memory and apart in the prompt."""
    rng = np.random.default_rng(0)
    block = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]])
    place = rng.permutation(12)[None]
    mask = make_mask(
        *(12, 12),
        causal=True,
        q_positions=place,
        kv_positions=place,
        q_blocks=block,
        kv_blocks=block,
        window=window,
        window_spares_blocks=spares,
    )
    for i, j in np.ndindex(12, 12):
        same = block[0, i] == block[0, j] > 0
        seen = place[0, j] <= place[0, i] or same
        if window is not None:
            seen &= place[0, j] > place[0, i] - window or (same and spares)
        assert bool(visible(mask)[0, i, j]) == seen, (i, j)
    live = blocks.live_blocks(mask, 3, 3)
    some = np.asarray(visible(mask)).reshape(1, 4, 3, 4, 3).any(axis=(2, 4))
    assert not (some & ~np.asarray(live)).any()


def test_a_window_holds_within_blocks():
    """On both sides, unless it spares them; under causality there is no rule for its right side."""
    given = dict(window=(2, 1), q_blocks=np.ones((1, 8), int), kv_blocks=np.ones((1, 8), int))
    plain = visible(make_mask(8, 8, window=(2, 1)))
    np.testing.assert_array_equal(visible(make_mask(8, 8, **given)), plain)
    assert visible(make_mask(8, 8, window_spares_blocks=True, **given)).all()
    assert visible(make_mask(8, 8, causal=True, window_spares_blocks=True, **given)).all()
    with pytest.raises(UserError, match="its right side"):
        make_mask(8, 8, causal=True, **given)


@pytest.mark.parametrize("window", [3, (3, 2), np.int64(3)])
def test_positions_have_no_gradients(window):
    def some(p):
        mask = make_mask(
            *(24, 40), causal=True, q_positions=p, window=window, prefix_length=p[0] + 3
        )
        return sum(x.sum() for x in (mask.high, mask.low) if x is not None)

    assert not jax.grad(some)(jnp.arange(24.0) * 1.5).any()


def test_masks_of_different_rules_are_not_chosen_between():
    given = dict(causal=True, window=3, q_blocks=np.ones(9), kv_blocks=np.ones(9))
    one, two = (make_mask(9, 9, window_spares_blocks=spares, **given) for spares in (True, False))
    with pytest.raises(UserError, match="spares"):
        choose(jnp.array(True), one, two)


@pytest.mark.parametrize("pick", [True, False])
def test_one_program_for_layers_with_and_without_a_window(pick):
    given = dict(causal=True, q_segments=np.zeros((1, 9)), kv_segments=np.zeros((1, 9)))
    near, far = make_mask(9, 9, window=3, **given), make_mask(9, 9, **given)
    expected = visible(near if pick else far)
    for picked in (pick, jnp.array(pick)):
        np.testing.assert_array_equal(visible(choose(picked, near, far)), expected)
        turned = choose(jnp.logical_not(picked), far, near)  # Whichever has the window.
        np.testing.assert_array_equal(visible(turned), expected)


def test_no_limit_is_no_mask():
    assert make_mask(5, 7) is None
    with pytest.raises(UserError, match=r"\[batch, 7\]"):
        make_mask(5, 7, kv_live=np.ones((2, 5), bool))
