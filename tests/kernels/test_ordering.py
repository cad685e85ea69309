"""The order of scores: every function against sorting in Python, ties, zeros and NaN included."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_vlm.compressors import Signals, VisualTokens, build, select
from efficient_vlm.kernels import ordering
from efficient_vlm.kernels.attention import keep_blocks

WIDTH = 7
MINUS_NAN = -np.float32(np.nan)  # As x86 makes it of 0 / 0.
FEW = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, float("nan"), float(MINUS_NAN)]
ROW = st.lists(st.sampled_from(FEW), min_size=WIDTH, max_size=WIDTH)
MASK = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)


def by_hand(scores, mask):
    """Indices from the highest score to the lowest, those that the mask leaves out last."""

    def key(i):
        lowest = math.isnan(scores[i]) or scores[i] == -math.inf
        return (not mask[i], 0 if not mask[i] else math.inf if lowest else -scores[i], i)

    return sorted(range(len(scores)), key=key)


@jax.jit
def everything(scores, mask):
    tie = jnp.arange(WIDTH, 0, -1, jnp.int32)[None]
    return dict(
        top=ordering.top_k(scores, 4, mask)[1],
        best=ordering.best(scores, mask),
        order=ordering.order(scores, mask),
        ranks=ordering.ranks(scores, mask),
        grouped=ordering.by_group((~mask).astype(jnp.int32), scores),
        turned=ordering.by_group((~mask).astype(jnp.int32), scores, tie),
        selected=select.top_k(scores, mask, 4, jnp.array([3])),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROW, MASK)
def test_against_sorting(row, mask):
    found = jax.tree.map(np.asarray, everything(np.float32([row]), np.array([mask])))
    order = by_hand(row, mask)
    real = sum(mask)
    assert found["order"][0].tolist() == order
    assert found["top"][0].tolist() == order[:4] and found["best"][0] == order[0]
    assert [order.index(i) for i in range(WIDTH)] == found["ranks"][0].tolist()
    # Inside its group padding is ordered as well.
    assert found["grouped"][0, :real].tolist() == order[:real]
    backwards = by_hand(row[::-1], mask[::-1])
    assert found["turned"][0, :real].tolist() == [WIDTH - 1 - i for i in backwards[:real]]
    indices, valid = found["selected"]
    assert indices[0].tolist() == order[:4]
    assert valid[0].tolist() == [j < min(3, real) for j in range(4)]


def test_blocks_with_nan_come_last_whatever_its_sign():
    for bad in (np.float32(np.nan), MINUS_NAN):
        kept = keep_blocks(jnp.array([[bad, 2, 3, 4]]), 2, 1)
        assert kept.tolist() == [[False, False, True, True]]
    kept = keep_blocks(jnp.array([[-0.0, -0.0, 0.0, 0.0]]), 2, 1)
    assert kept.tolist() == [[True, True, False, False]]


def test_tome_merges_the_first_of_equal_cosines():
    """The best cosine of token 0 is -1e-6, which rounds to -0.0; that of token 2 is 0.0."""
    first, second, third = np.eye(3, 4, dtype=np.float32)
    keys = jnp.array([[first - 1e-6 * second, second, third, second]])[:, :, None]
    tokens = VisualTokens.from_grid(jnp.arange(16.0).reshape(1, 4, 4), (2, 2))
    out = build("tome", r=1).apply({}, tokens, Signals(keys=keys))
    assert out.source.tolist() == [[0, 0, 1, 2]]


def test_a_cosine_of_nan_does_not_attract():
    """`argmax` has the first NaN for the highest; token 4 is like token 5 and nothing else."""
    keys = np.eye(6, 4, dtype=np.float32)[None, :, None]
    keys[0, 5] = keys[0, 4] = [[0, 1, 1, 0]]
    keys[0, 1] = np.inf  # Its unit vector is NaN.
    tokens = VisualTokens.from_grid(jnp.arange(12.0).reshape(1, 6, 2), (1, 6))
    out = build("tome", r=1).apply({}, tokens, Signals(keys=jnp.asarray(keys)))
    assert out.source.tolist() == [[0, 1, 2, 3, 4, 4]]
