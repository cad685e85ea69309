"""Attention, masks, rotary positions and experts against plain float64 NumPy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention as dot_product_attention
from efficient_vlm.kernels.attention import make_mask, visible
from efficient_vlm.nn import attention, rotary
from efficient_vlm.nn.linear import product
from efficient_vlm.nn.moe import MoE, check_moe


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_by_definition(causal, prefix, window):
    rng = np.random.default_rng(0)
    segments = rng.integers(-1, 3, (2, 8))
    index = np.arange(8)
    mask = visible(
        make_mask(
            *(8, 8),
            q_positions=index,
            kv_positions=index,
            q_segments=segments,
            kv_segments=segments,
            shared_segment=0,
            causal=causal,
            prefix_length=prefix,
            window=window,
        )
    )
    for b, i, j in np.ndindex(2, 8, 8):
        seen = segments[b, j] in (segments[b, i], 0) and -1 not in (segments[b, i], segments[b, j])
        if causal:
            seen &= j <= i or (i < prefix and j < prefix)
        if window is not None:
            seen &= j > i - window or j < prefix
        assert bool(mask[b, i, j]) == seen, (b, i, j)


def test_rope_is_relative_and_exact():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(m, n):
        at = [rotary.rotate(x, jnp.array([[p]]), {"theta": 100.0}) for x, p in ((q, m), (k, n))]
        return float((at[0] * at[1]).sum())

    assert product(3, 1) == pytest.approx(product(7.5, 5.5), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
    # As complex numbers, by the definition: (x_j + i x_{j+d/2}) e^{i m theta_j}.
    x = np.asarray(q)[0, 0, 0].astype(np.complex128)
    turned = (x[:4] + 1j * x[4:]) * np.exp(1j * 2.0 * 100.0 ** (-np.arange(4) / 4))
    ours = np.asarray(rotary.rotate(q, jnp.array([[2]]), {"theta": 100.0}))[0, 0, 0]
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag]), atol=1e-6)


def test_rope_fraction_leaves_the_rest():
    x = jnp.ones((1, 2, 1, 8))
    out = rotary.rotate(x, jnp.array([[5, 9]]), {"theta": 100.0, "fraction": 0.5})
    np.testing.assert_array_equal(out[..., 4:], 1)
    assert not np.allclose(out[..., :4], 1)


def silu(x):
    return x / (1 + np.exp(-x))


def of_experts(layer, rng, tokens, share):
    """x [2, tokens, 8], which of them are valid, parameters, what the layer gives; the same in
    float64."""
    x = rng.normal(size=(2, tokens, 8))
    valid = rng.random((2, tokens)) < share
    params = nn.unbox(layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), valid))
    y, stats = layer.apply(params, jnp.asarray(x, jnp.float32), jnp.asarray(valid))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    return x, valid, params, y, stats, p


def expert(p, e, token):
    return (silu(token @ p["gate"][e]) * (token @ p["up"][e])) @ p["down"][e]


@pytest.mark.parametrize(
    ("top_k", "shared", "normalize"), [(1, 0, True), (2, 8, True), (3, 0, False)]
)
def test_moe_by_hand(top_k, shared, normalize):
    """Token by token, expert by expert, in float64; padding counts in no statistic."""
    layer = MoE(num_experts=4, top_k=top_k, expert_dim=6, shared_dim=shared, normalize=normalize)
    x, valid, _, y, stats, p = of_experts(layer, np.random.default_rng(0), tokens=5, share=0.7)
    load, probability, z, expected = np.zeros(4), np.zeros(4), 0.0, np.zeros_like(x)
    for b, t in np.ndindex(2, 5):
        token = x[b, t]
        logits = token @ p["router"]["kernel"]
        probabilities = softmax(logits)
        best = np.argsort(-probabilities)[:top_k]
        weights = probabilities[best] / (
            probabilities[best].sum() if normalize and top_k > 1 else 1
        )
        for w, e in zip(weights, best, strict=True):
            expected[b, t] += w * expert(p, e, token)
        if shared:
            s = p["shared"]
            hidden = silu(token @ s["gate"]["kernel"]) * (token @ s["up"]["kernel"])
            expected[b, t] += hidden @ s["down"]["kernel"]
        if valid[b, t]:
            load[best] += 1
            probability += probabilities
            z += np.log(np.exp(logits).sum()) ** 2
    count = valid.sum()
    np.testing.assert_allclose(y, expected, atol=1e-5)
    balance = 4 * (load / (count * top_k)) @ (probability / count)
    for name, value in (("load_balance", balance), ("router_z", z / count)):
        total, denominator = stats[name]
        assert float(total / denominator) == pytest.approx(value, rel=1e-5)
    np.testing.assert_array_equal(stats["expert_load"][0], load)


@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.0), (2, 0.5), (3, 0.75), (2, 9.0)])
def test_capacity_by_hand(top_k, factor):
    """Row by row: first choices in order, then second ones; padding takes no place."""
    options = dict(num_experts=4, top_k=top_k, expert_dim=6)
    layer = MoE(**options, capacity=factor)
    x, valid, params, y, stats, p = of_experts(layer, np.random.default_rng(1), 9, share=0.8)
    room = math.ceil(factor * 9 * top_k / 4)
    dropped = 0
    for b in range(2):
        taken, expected = np.zeros(4, int), np.zeros_like(x[b])
        probabilities = np.stack([softmax(token @ p["router"]["kernel"]) for token in x[b]])
        best = np.argsort(-probabilities, axis=-1)[:, :top_k]
        for choice, t in np.ndindex(top_k, 9):
            if not valid[b, t]:
                continue
            e = best[t, choice]
            if taken[e] == room:
                dropped += 1
                continue
            taken[e] += 1
            weight = probabilities[t, e] / (probabilities[t, best[t]].sum() if top_k > 1 else 1)
            expected[t] += weight * expert(p, e, x[b, t])
        np.testing.assert_allclose(y[b][valid[b]], expected[valid[b]], atol=1e-5)
    assert float(stats["dropped"][0]) == dropped and (dropped == 0) == (factor == 9.0)
    if factor == 9.0:
        free, _ = MoE(**options).apply(params, jnp.asarray(x, jnp.float32), jnp.asarray(valid))
        np.testing.assert_allclose(y[valid], free[valid], atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_moe_gradients_reach_every_parameter(top_k):
    """The router too, also where only one expert is chosen."""
    layer = MoE(num_experts=2, top_k=top_k, expert_dim=6)
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    valid = jnp.ones((1, 6), bool)
    params = nn.unbox(layer.init(jax.random.key(0), x, valid))
    grads = jax.grad(lambda p: (layer.apply(p, x, valid)[0] ** 2).sum())(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(leaf).max()) > 0, path


@pytest.mark.parametrize(
    "change",
    [
        *(dict(top_k=value) for value in (0, 3, 1.5, "2", True)),
        *(dict(expert_dim=value) for value in (0, "8")),
        *(dict(capacity=value) for value in (0, math.inf, math.nan, True, "1.25")),
        dict(num_experts=4.0),
        dict(shared_dim=-1),
        dict(normalize=[]),
    ],
    ids=str,
)
def test_mixtures_that_cannot_be(change):
    with pytest.raises(UserError, match=f"moe.{next(iter(change))}: "):
        check_moe({"num_experts": 2, "top_k": 1, "expert_dim": 8, **change})


def test_attention_rows_are_those_of_the_layer():
    """With its cap, its biases and its window; a row that sees none of the keys looks at all."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 8, h, 8)), jnp.float32) for h in (4, 2))
    bias = jnp.asarray(rng.normal(size=(1, 8)), jnp.float32)
    mask = make_mask(8, 8, causal=True, window=3)
    index, live = np.array([[4, 6, 7]]), jnp.array([[True, True, False, True]])
    found = attention.attention_rows(q, k, index, live, 0.5, 2.0, bias, mask)
    turned, keys = q.swapaxes(1, 2), k.swapaxes(1, 2)[:, :, :4]
    for at, row in enumerate(index[0]):
        seen = np.array(live[0]) & (np.arange(4) > row - 3)
        whole = dot_product_attention(
            turned[:, :, row : row + 1],
            *(keys, keys),
            scale=0.5,
            softcap=2.0,
            key_bias=bias[:, :4],
            mask=make_mask(1, 4, kv_live=seen if seen.any() else live[0]),
            importance_weights=jnp.ones((1, 1)),
        )
        np.testing.assert_allclose(found[0, at], whole.importance[0], atol=1e-6)


def test_attention_rows_by_hand():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 6, 2, 8))
    index = np.array([[0, 4, 4], [2, 1, 3]])
    mask = rng.random((2, 4)) < 0.7
    mask[:, 0] = True
    ours = attention.attention_rows(
        jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), index, jnp.asarray(mask), 0.5
    )
    for b, r in np.ndindex(2, 3):
        rows = []
        for head in range(4):
            logits = 0.5 * k[b, :4, head // 2] @ q[b, index[b, r], head]
            rows.append(softmax(np.where(mask[b], logits, -np.inf)))
        np.testing.assert_allclose(ours[b, r], np.mean(rows, axis=0), atol=1e-6)


# --- products in bfloat16 ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_product_of_stored_bfloat16(rows):
    """The sums are kept in more than the 16 bits that the result has, also for a single row."""
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(rows, 1, 300), (300, 40)])
    )
    y = jax.jit(lambda x, kernel: product(x, kernel, "bfloat16"))(x, kernel)
    assert y.dtype == jnp.bfloat16 and y.shape == (rows, 1, 40)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    # Half a place of 8 bits, and what the order of float32 sums makes of it.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_is_asked_for_float32(platform, stored):
    """And only of parameters that are not trained: rematerialisation keeps plain products."""
    shapes = [jax.ShapeDtypeStruct(shape, stored) for shape in ((1, 300), (300, 40))]
    function = jax.jit(lambda x, kernel: product(x, kernel, "bfloat16"))
    text = jax.export.export(function, platforms=[platform])(*shapes).mlir_module()
    results = re.findall(r"dot_general.*-> tensor<(\S+)>", text)
    wide = platform == "cpu" and stored == "bfloat16"
    assert results == ["8x40xf32" if wide else "1x40xbf16"], text
