"""The differentiable top-K and `visionselector` against float64 arithmetic, and what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_vlm.compressors import VisualTokens, build
from efficient_vlm.compressors.soft_select import hard_top_k, soft_top_k
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError

RANDOM = np.random.default_rng(0)
SCORES = (RANDOM.normal(size=(5, 12)) * [[0.0], [1e-3], [1.0], [8.0], [2.0]]).astype(np.float32)
MASK = np.ones((5, 12), bool)
MASK[3, ::3] = False
MASK[4, 3:] = False  # 3 real tokens.


def soft(scores, mask, k):
    """p in float64, by bisection over a wide bracket."""
    out = np.zeros(scores.shape)
    for row, (s, real) in enumerate(zip(np.float64(scores), mask, strict=True)):
        if real.sum() <= k:
            out[row] = real
            continue
        low, high = -1e4, 1e4
        for _ in range(200):
            t = (low + high) / 2
            p = 1 / (1 + np.exp(-np.clip(s + t, -500, 500)))
            low, high = (t, high) if p[real].sum() < k else (low, t)
        out[row] = np.where(real, p, 0)
    return out


@pytest.mark.parametrize("k", [1, 4, 11])
def test_values(k):
    p = np.asarray(soft_top_k(jnp.asarray(SCORES), jnp.asarray(MASK), k))
    np.testing.assert_allclose(p, soft(SCORES, MASK, k), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(p.sum(1), np.minimum(MASK.sum(1), k), rtol=1e-5)
    assert (p[~MASK] == 0).all()


def test_gradient():
    k, weight = 4, RANDOM.normal(size=SCORES.shape)

    def total(scores):
        return jnp.sum(soft_top_k(scores, jnp.asarray(MASK), k) * weight)

    found = np.asarray(jax.grad(total)(jnp.asarray(SCORES)))
    # Central differences in float64.
    step, numeric = 1e-5, np.zeros(SCORES.shape)
    for at in np.ndindex(SCORES.shape):
        moved = [np.float64(SCORES), np.float64(SCORES)]
        for side, sign in zip(moved, (1, -1), strict=True):
            side[at] += sign * step
        up, down = (np.sum(soft(side, MASK, k) * weight) for side in moved)
        numeric[at] = (up - down) / (2 * step)
    np.testing.assert_allclose(found, numeric, rtol=1e-3, atol=1e-5)

    # Implicit differentiation by JAX of the condition that defines t, at the root from NumPy.
    p = soft(SCORES[2:3], MASK[2:3], k)[0, 0]
    root = np.float32(np.log(p / (1 - p)) - SCORES[2, 0])

    def implicit(scores):
        def condition(t):
            return jnp.sum(jax.nn.sigmoid(scores + t)) - k

        t = jax.lax.custom_root(
            condition, root, lambda f, t: jnp.float32(root), lambda g, y: y / g(jnp.float32(1))
        )
        return jnp.sum(jax.nn.sigmoid(scores + t) * weight[2])

    other = jax.grad(implicit)(jnp.asarray(SCORES[2]))
    np.testing.assert_allclose(found[2], other, rtol=1e-4, atol=1e-6)
    assert (found[4] == 0).all(), "a row that keeps all has nothing to choose"


def test_hard_limit():
    hard = np.asarray(hard_top_k(jnp.asarray(SCORES), jnp.asarray(MASK), 4))
    assert hard.sum(1).tolist() == [4, 4, 4, 4, 3]
    far = jnp.asarray(SCORES * 1e7)
    p = np.asarray(soft_top_k(far, jnp.asarray(MASK), 4))
    np.testing.assert_allclose(p[1:], hard[1:], atol=1e-4)
    gradient = jax.grad(lambda s: jnp.sum(soft_top_k(s, jnp.asarray(MASK), 4) ** 2))(far)
    assert np.isfinite(gradient).all()


def test_scores_are_the_mean_over_all_pairs():
    module, rng = build("visionselector", budget=3, dim=5), np.random.default_rng(1)
    embed = rng.normal(size=(2, 8, 6)).astype(np.float32)
    mask = np.array([[True] * 8, [True, False] * 4])
    kernels = {n: rng.normal(size=(6, 5)).astype(np.float32) for n in ("query", "key")}
    params = {"params": {f"visionselector_{n}": kernel for n, kernel in kernels.items()}}
    dirty = np.where(mask[..., None], embed, np.nan)
    tokens = VisualTokens.from_grid(jnp.asarray(dirty), (2, 4), mask=jnp.asarray(mask))
    out = module.apply(params, tokens)
    for row in range(2):
        real = np.flatnonzero(mask[row])
        q, k = (np.float64(embed[row]) @ kernels[n] for n in ("query", "key"))
        score = {i: np.mean([q[i] @ k[j] for j in real]) / np.sqrt(5) for i in real}
        kept = sorted(sorted(score, key=lambda i: -score[i])[:3])
        assert [p for p in range(8) if out.source[row, p] >= 0] == kept
        assert (out.embed[row] == embed[row, kept]).all()
        assert out.position[row].tolist() == [[i // 4, i % 4] for i in kept]
    whole = tokens.replace(embed=jnp.asarray(embed), mask=jnp.ones((2, 8), bool))
    one = jax.tree.map(lambda x: x[:1], whole)
    assert module.flops(8, 6) == traced_flops(module.apply, params, one)


def test_a_planted_token_is_learnt():
    """Each picture has one token that the loss asks for, among others that it does not."""
    rng, sign = np.random.default_rng(2), np.random.default_rng(3).normal(size=8)
    embed = rng.normal(size=(16, 9, 8)).astype(np.float32)
    planted = rng.integers(9, size=16)
    embed[np.arange(16), planted] += 2 * sign
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (3, 3))
    taught = build("visionselector", dim=4, **{"soft": 2})
    asked = build("visionselector", budget=2, dim=4)
    params, tx = taught.init(jax.random.key(0), tokens), optax.adam(0.05)
    params = jax.tree.map(lambda x: x.value if hasattr(x, "value") else x, params, is_leaf=_is_box)

    def loss(params):
        out = taught.apply(params, tokens)
        wanted = jnp.take_along_axis(out.embed, planted[:, None, None], axis=1)
        first = jnp.take_along_axis(tokens.embed, planted[:, None, None], axis=1)
        # The rest of what is seen is noise.
        missed = jnp.mean(jnp.square(wanted - first))
        return missed + jnp.mean(jnp.square(out.embed.sum(1) - wanted[:, 0])) + out.penalty.mean()

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), loss(params)

    def found(params):
        kept = asked.apply(params, tokens).source[np.arange(16), planted] >= 0
        return float(np.mean(kept))

    (after, _), losses = jax.lax.scan(step, (params, tx.init(params)), None, length=80)
    assert losses[-1] < losses[0] / 2
    assert found(after) >= 0.9
    assert found(after) > found(params)


def _is_box(x):
    return hasattr(x, "value") and hasattr(x, "names")


def test_refusals():
    with pytest.raises(UserError, match=r"compressor\.budget: missing"):
        build("visionselector")
    with pytest.raises(UserError, match=r"compressor\.soft"):
        build("visionselector", soft=0)
    with pytest.raises(UserError, match=r"compressor\.dim"):
        build("visionselector", budget=2, dim=0)
