"""Attention: every form against loops in float64, and the form that each platform gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.kernels import attention as kernel

# batch, queries, keys, heads, key heads, head dim
SHAPES = {
    "one head": (1, 4, 4, 1, 1, 8),
    "odd sizes": (2, 13, 17, 3, 3, 5),
    "grouped keys": (2, 11, 7, 6, 2, 4),
    "one query": (3, 1, 9, 4, 2, 8),
}


def case(shape, seed=0, dtype=np.float32):
    batch, queries, keys, heads, kv_heads, dim = shape
    rng = np.random.default_rng(seed)

    def draw(*size):
        return rng.normal(size=size).astype(dtype)

    return (
        (
            draw(batch, queries, heads, dim),
            draw(batch, keys, kv_heads, dim),
            draw(batch, keys, kv_heads, dim),
        ),
        rng.random((batch, queries, keys)) < 0.7,
        draw(batch, keys).astype(np.float32),
    )


def by_hand(q, k, v, scale, mask=None, key_bias=None, softcap=None):
    """float64, query by query; a query that sees nothing gets the mean of all values."""
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(batch, queries, heads):
        logits = np.empty(keys)
        for j in range(keys):
            logits[j] = scale * np.dot(q[b, i, h].astype(float), k[b, j, h // groups])
            if softcap is not None:
                logits[j] = softcap * np.tanh(logits[j] / softcap)
            if key_bias is not None:
                logits[j] += key_bias[b % len(key_bias), j]
        if mask is not None:
            seen = np.broadcast_to(mask, (batch, queries, keys))[b, i]
            logits = np.where(seen, logits, -np.inf) if seen.any() else np.zeros(keys)
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ v[b, :, h // groups].astype(float)
    return out


@pytest.fixture(params=["plain", "tiles", "narrow tiles"])
def form(request, monkeypatch):
    """`attention` as on a TPU, as on a CPU in one block of queries, and in blocks of a few."""
    for name in ("_FEW_LOGITS", "_FEW_LOGITS_OF_HEAD"):
        monkeypatch.setattr(kernel, name, 10**9 if request.param == "plain" else 0)
    monkeypatch.setattr(kernel, "_TILE_LOGITS", 64 if request.param == "narrow tiles" else 10**9)

    def attention(*args, **options):  # A new function: jit must not remember another form.
        return kernel.attention(*args, **options)

    return jax.jit(attention, static_argnames=("scale", "softcap"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_loops(form, shape):
    (q, k, v), mask, bias = case(shape)
    for options in (
        {},
        dict(mask=mask, key_bias=bias),
        dict(mask=mask, key_bias=bias, softcap=0.5),
    ):
        ours = form(q, k, v, scale=0.7, **options)
        np.testing.assert_allclose(ours, by_hand(q, k, v, 0.7, **options), atol=2e-6)


@pytest.mark.parametrize("size", [(1, 1, 17), (2, 1, 17), (1, 13, 17), (2, 13, 1), (1, 1, 1)])
def test_masks_and_biases_that_many_rows_share(form, size):
    (q, k, v), _, bias = case(SHAPES["odd sizes"])
    mask = np.random.default_rng(3).random(size) < 0.8
    ours = form(q, k, v, scale=0.3, mask=mask, key_bias=bias[:1])
    expected = by_hand(q, k, v, 0.3, mask=mask, key_bias=bias[:1])
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_a_query_that_sees_nothing_is_finite(form):
    (q, k, v), mask, bias = case(SHAPES["odd sizes"])
    mask[0, 3] = False
    mask[1] = False

    def loss(q, k, v, bias):
        return form(q, k, v, scale=1.0, mask=mask, key_bias=bias).sum()

    out = form(q, k, v, scale=1.0, mask=mask, key_bias=bias)
    np.testing.assert_allclose(out[0, 3], v[0].mean(axis=0), atol=1e-6)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
    assert all(np.isfinite(g).all() for g in gradients)


def test_logits_far_from_zero(form):
    """Without the maximum taken off, exp would overflow in one row and vanish in the other."""
    (q, k, v), _, _ = case(SHAPES["odd sizes"])
    for scale in (300.0, -300.0):
        np.testing.assert_allclose(
            form(q, k, v, scale=scale), by_hand(q, k, v, scale), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("shape", [SHAPES["odd sizes"], SHAPES["grouped keys"]], ids=str)
def test_gradients_against_differences(form, shape):
    """Directional derivatives; the differences are of the float64 loops."""
    arrays, mask, bias = case(shape)
    rng = np.random.default_rng(4)
    weight = rng.normal(size=arrays[0].shape)
    options = dict(mask=mask, softcap=2.0)

    def loss(q, k, v, bias):
        return (form(q, k, v, scale=0.6, key_bias=bias, **options) * weight).sum()

    def exact(q, k, v, bias):
        return (by_hand(q, k, v, 0.6, key_bias=bias, **options) * weight).sum()

    given = [a.astype(np.float64) for a in (*arrays, bias)]
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, bias)
    for i, gradient in enumerate(gradients):
        way = rng.normal(size=given[i].shape)
        ahead, behind = list(given), list(given)
        ahead[i], behind[i] = given[i] + 1e-4 * way, given[i] - 1e-4 * way
        expected = (exact(*ahead) - exact(*behind)) / 2e-4
        assert np.vdot(gradient, way) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_bfloat16(form):
    (q, k, v), mask, bias = case(SHAPES["grouped keys"])
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    ours = form(q, k, v, scale=0.5, mask=mask, key_bias=bias)
    assert ours.dtype == jnp.bfloat16
    rounded = [np.asarray(x, np.float64) for x in (q, k, v)]
    expected = by_hand(*rounded, 0.5, mask=mask, key_bias=bias)
    np.testing.assert_allclose(ours.astype(np.float32), expected, atol=0.02)


LARGE = [jax.ShapeDtypeStruct((1, 1024, 12, 64), jnp.float32)] * 3
LOGITS = 12 * 1024 * 1024 * 4


def large(q, k, v):
    return kernel.attention(q, k, v, scale=0.125)


def gradient(q, k, v):
    return jax.grad(lambda *args: large(*args).sum(), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("function", [large, gradient])
def test_a_cpu_never_holds_all_logits(function):
    if jax.default_backend() != "cpu":
        pytest.skip("the form of the CPU")
    temporaries = jax.jit(function).lower(*LARGE).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < LOGITS


@pytest.mark.parametrize("function", [large, gradient])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_platform_lowered_for_decides(function, platform):
    text = jax.jit(function).trace(*LARGE).lower(lowering_platforms=(platform,)).as_text()
    assert ("12x1024x1024xf32" in text) == (platform != "cpu")
    assert ("stablehlo.while" in text) == (platform == "cpu")
