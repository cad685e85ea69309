"""Losses of preferences and rewards against float64 formulas and numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.train import preference
from efficient_vlm.train.losses import ratio, token_cross_entropy

RANDOM = np.random.default_rng(1)
LABELS = np.array([[3, -1, 0, 5], [-1, -1, 2, 1], [-1, -1, -1, -1]], np.int32)


def test_log_probs_of_sequences():
    logits = RANDOM.normal(size=(3, 4, 7)) * 3
    total = np.log(np.exp(logits).sum(-1))
    sums = [
        sum(logits[b, s, y] - total[b, s] for s, y in enumerate(row) if y >= 0)
        for b, row in enumerate(LABELS)
    ]
    logits[LABELS < 0] = np.nan  # Padding.
    logits = np.float32(logits)
    found, count = preference.sequence_log_probs(logits, LABELS)
    np.testing.assert_allclose(found, sums, rtol=1e-6)
    np.testing.assert_array_equal(count, [3, 2, 0])
    slope = jax.grad(lambda x: preference.sequence_log_probs(x, LABELS)[0].sum())(logits)
    assert np.isfinite(slope).all()
    cross_entropy = token_cross_entropy(np.nan_to_num(logits), LABELS)["loss"]
    np.testing.assert_allclose(-found.sum(), cross_entropy[0], rtol=1e-6)
    large = preference.token_log_probs(np.float32([[[1e4, -1e4]]]), np.array([[1]], np.int32))
    np.testing.assert_allclose(large, -2e4)


def test_dpo():
    """Equation 7; a pair that the policy has moved by ln 9 / beta is nine to one."""
    beta, smoothing = 0.1, 0.2
    values = RANDOM.normal(size=(4, 5)) * 20
    x = beta * ((values[0] - values[2]) - (values[1] - values[3]))
    better, worse = np.log1p(np.exp(-x)), np.log1p(np.exp(x))
    arrays = [np.float32(v) for v in values]
    plain = preference.dpo(*arrays, beta=beta)
    np.testing.assert_allclose(plain["loss"][0], better.sum(), rtol=1e-5)
    np.testing.assert_allclose(plain["margin"][0], x.sum(), rtol=1e-4)
    assert plain["accuracy"] == ((x > 0).sum(), 5)
    smooth = preference.dpo(*arrays, beta=beta, label_smoothing=smoothing)
    wanted = (1 - smoothing) * better + smoothing * worse
    np.testing.assert_allclose(smooth["loss"][0], wanted.sum(), rtol=1e-5)
    zero, moved = np.zeros(1, np.float32), np.full(1, np.log(9) / beta, np.float32)
    np.testing.assert_allclose(preference.dpo(zero, zero, zero, zero)["loss"][0], np.log(2))
    np.testing.assert_allclose(
        preference.dpo(moved, zero, zero, zero, beta=beta)["loss"][0], np.log(10 / 9), rtol=1e-5
    )


def test_slopes_of_dpo():
    """-beta sigmoid(-x) for the chosen, the opposite for the rejected, none for the reference."""
    values = [np.float32(v) for v in RANDOM.normal(size=(4, 5)) * 3]
    slopes = jax.grad(lambda *v: preference.dpo(*v, beta=0.5)["loss"][0], (0, 1, 2, 3))(*values)
    x = 0.5 * ((values[0] - values[2]) - (values[1] - values[3]))
    wanted = -0.5 / (1 + np.exp(np.float64(x)))
    np.testing.assert_allclose(slopes[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(slopes[1], -wanted, rtol=1e-5)
    assert not np.any(slopes[2:])
    far = [np.float32([v]) for v in (-1e4, 1e4, 1e4, -1e4)]
    value, slope = jax.value_and_grad(lambda *v: preference.dpo(*v)["loss"][0])(*far)
    np.testing.assert_allclose((value, slope[0]), (4e3, -0.1))


def test_simpo():
    """Equation 6, with answers of unequal length."""
    won, lost = np.array([-6.0, -30.0]), np.array([-8.0, -5.0])
    long, short = np.array([3.0, 10.0]), np.array([2.0, 5.0])
    found = preference.simpo(
        (np.float32(won), np.float32(long)),
        (np.float32(lost), np.float32(short)),
        beta=2.0,
        gamma=1.5,
    )
    # 2 (-2 + 4) - 1.5 = 2.5 and 2 (-3 + 1) - 1.5 = -5.5.
    wanted = np.log1p(np.exp(-2.5)) + np.log1p(np.exp(5.5))
    np.testing.assert_allclose(found["loss"][0], wanted, rtol=1e-6)
    assert found["accuracy"] == (1, 2) and found["loss"][1] == 2
    np.testing.assert_allclose(found["margin"][0], 4 - 4, atol=1e-6)


def test_advantages_of_groups():
    rewards = np.float32([[1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [3, 1, 2, 2]])
    found = preference.group_advantages(rewards)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1])
    assert not found[1].any()  # Exactly: 0.1 has no exact mean in float32.
    np.testing.assert_allclose(found[2], np.sqrt(2) * np.array([1, -1, 0, 0]), rtol=1e-6)
    plain = preference.group_advantages(rewards, scale=False)
    np.testing.assert_allclose(plain[2], [1, -1, 0, 0])
    np.testing.assert_allclose(plain[0], [0.5, -0.5, -0.5, 0.5])
    assert not plain[1].any()


def grpo_by_loops(now, sampled, advantages, reference, clip=0.2, beta=0.04):
    """The negative of equation 3, a token at a time; k3 and the share of clipped tokens."""
    rows, kls, shares = [], [], []
    for b, row in enumerate(LABELS):
        losses, divergences, clipped = [], [], []
        for s, label in enumerate(row):
            if label < 0:
                continue
            r, a = np.exp(now[b, s] - sampled[b, s]), advantages[b]
            inside = min(max(r, 1 - clip), 1 + clip)
            quotient = np.exp(reference[b, s] - now[b, s])
            divergences.append(quotient - np.log(quotient) - 1)
            losses.append(-min(r * a, inside * a) + beta * divergences[-1])
            clipped.append(inside * a < r * a)
        if losses:
            rows.append(np.mean(losses))
            kls.append(np.mean(divergences))
            shares.append(np.mean(clipped))
    return sum(rows), sum(kls), sum(shares)


def test_grpo():
    now, sampled, reference = -np.abs(RANDOM.normal(size=(3, 3, 4)))
    advantages = np.array([1.3, -0.7, 0.4])
    arrays = [np.float32(v) for v in (now, sampled, advantages)]
    found = preference.grpo(*arrays, LABELS, reference=np.float32(reference))
    wanted = grpo_by_loops(now, sampled, advantages, reference)
    for name, value in zip(("loss", "kl", "clipped"), wanted, strict=True):
        np.testing.assert_allclose(found[name][0], value, rtol=1e-5)
        assert found[name][1] == 2  # The third answer has no tokens.

    def loss(now):
        return preference.grpo(now, *arrays[1:], LABELS, reference=np.float32(reference))["loss"][0]

    slopes, step = jax.grad(loss)(arrays[0]), 1e-6
    for index in np.ndindex(now.shape):
        change = np.zeros_like(now)
        change[index] = step
        high, low = (
            grpo_by_loops(now + sign * change, sampled, advantages, reference)[0]
            for sign in (1, -1)
        )
        np.testing.assert_allclose(slopes[index], (high - low) / (2 * step), atol=1e-5)


def test_grpo_at_its_start_is_the_policy_gradient():
    """Where the policy is the one that sampled: value -A, slope -A / tokens, nothing clipped."""
    now = np.float32(-np.abs(RANDOM.normal(size=(3, 4))))
    advantages = np.float32([2.0, -3.0, 1.0])

    def loss(now, sampled, advantages):
        return preference.grpo(now, sampled, advantages, LABELS)["loss"][0]

    value, slopes = jax.value_and_grad(loss, (0, 1, 2))(now, now, advantages)
    np.testing.assert_allclose(value, -2.0 + 3.0, rtol=1e-6)
    wanted = np.where(LABELS >= 0, -advantages[:, None] / np.array([[3], [2], [1]]), 0)
    np.testing.assert_allclose(slopes[0], wanted, rtol=1e-6)
    assert not slopes[1].any() and not slopes[2].any()
    metrics = preference.grpo(now, now, advantages, LABELS, reference=now)
    assert metrics["clipped"][0] == 0 and ratio(metrics["kl"]) == 0


def test_far_policies_stay_finite():
    now, other = np.full((3, 4), -1e4, np.float32), np.zeros((3, 4), np.float32)
    now[LABELS < 0] = np.nan
    for first, second in ((now, other), (other, now)):
        for advantage in (0.0, -1.0, 1.0):
            advantages = np.full(3, advantage, np.float32)

            def loss(x, second=second, advantages=advantages):
                return preference.grpo(x, second, advantages, LABELS, reference=second)["loss"][0]

            value, slope = jax.value_and_grad(loss)(jnp.asarray(first))
            assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, float("nan")])
def test_smoothing_that_is_none(smoothing):
    zero = np.zeros(1, np.float32)
    with pytest.raises(UserError, match="label_smoothing"):
        preference.dpo(zero, zero, zero, zero, label_smoothing=smoothing)
