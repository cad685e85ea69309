"""Recomputed attention rows and column sums against the whole map, by float64 loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_states import DEPTH, HEADS, full_map, random_case
from jax.extend import core

from efficient_vlm.compressors.in_decoder import rows

TOKENS, PLACES = 12, 17

attention_rows = jax.jit(rows.attention_rows, static_argnames="rotary")
column_sums = jax.jit(rows.column_sums, static_argnames=("rotary", "heads", "block"))


@functools.cache
def case(seed, bidirectional=False, ties=False):
    return random_case(seed, bidirectional=bidirectional, ties=ties)[1]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_rows(bidirectional, rotary):
    for seed in range(3):
        state = case(seed, bidirectional, ties=seed == 2)
        index = np.random.default_rng(seed).integers(0, PLACES, (4, 6))
        out = attention_rows(state, index, rotary=rotary)
        assert out.shape == (4, HEADS, 6, PLACES)
        assert out.dtype == jnp.float32
        for b in range(4):
            expected = full_map(state, b, rotary=rotary)[:, index[b]]
            np.testing.assert_allclose(out[b], expected, atol=2e-6)
            lives = state.live[b, index[b]]
            np.testing.assert_allclose(out[b].sum(-1), np.tile(lives, (HEADS, 1)), atol=1e-5)


def test_rows_among_some_keys():
    state = case(0)
    among = np.broadcast_to(np.arange(PLACES) < TOKENS, (4, PLACES))
    out = attention_rows(state, state.last[:, None], among=among)
    for b in range(4):
        part = full_map(state, b)[:, state.last[b]] * among[b]
        total = part.sum(axis=-1, keepdims=True)
        # The last row has no visual token, so nothing shares the softmax.
        np.testing.assert_allclose(out[b, :, 0], part / np.where(total > 0, total, 1), atol=2e-6)
    assert not out[3].any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("heads", rows.HEADS)
def test_column_sums(bidirectional, heads):
    for seed in range(2):
        state = case(seed, bidirectional)
        weight = np.random.default_rng(seed).random((4, PLACES)).astype(np.float32)
        out = column_sums(state, weight, heads=heads, block=5)  # 17 rows: the last block is short
        for b in range(4):
            entries = full_map(state, b)  # [H, i, j]
            expected = np.zeros((HEADS, PLACES))
            for i in range(PLACES):
                for j in range(PLACES):
                    if heads == "each":
                        expected[:, j] += weight[b, i] * entries[:, i, j]
                    else:
                        one = entries[:, i, j].mean() if heads == "mean" else entries[:, i, j].max()
                        expected[:, j] += weight[b, i] * one
            np.testing.assert_allclose(
                out[b], expected if heads == "each" else expected[0], atol=1e-5
            )


def test_column_means_divide_by_all_rows():
    state = case(1)
    judges = rows.judges(state)
    out = rows.column_means(state, judges, block=4)
    for b in range(4):
        chosen = [i for i in range(PLACES) if judges[b, i]]
        expected = sum(full_map(state, b).mean(axis=0)[i] for i in chosen) / len(chosen)
        np.testing.assert_allclose(out[b], expected, atol=1e-5)
    assert not rows.column_means(state, np.zeros((4, PLACES), bool)).any()


def test_judges_are_visual_tokens_and_the_prompt():
    state = case(0)
    for visual in (False, True):
        for text in (False, True):
            out = rows.judges(state, visual=visual, text=text)
            np.testing.assert_array_equal(out[:, :TOKENS], state.live[:, :TOKENS] & visual)
            np.testing.assert_array_equal(out[:, TOKENS:], state.prompt & text)


def test_padding_reaches_no_gradient():
    state = case(0)

    def total(query, key):
        moved = state.replace(query=query, key=key)
        out = rows.attention_rows(moved, jnp.asarray(state.last)[:, None])
        return jnp.sum(out * jnp.cos(jnp.arange(PLACES)))

    gradient = jax.grad(total, argnums=(0, 1))(jnp.asarray(state.query), jnp.asarray(state.key))
    for g in gradient:
        assert np.isfinite(g).all()
        assert not np.asarray(g)[~state.live].any()


def test_bfloat16_states_are_scored_in_float32():
    state = random_case(0, dtype=jnp.bfloat16)[1]
    exact = jax.tree.map(lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, state)
    out = rows.attention_rows(state, state.last[:, None])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, rows.attention_rows(exact, state.last[:, None]), atol=1e-6)


def buffers(jaxpr):
    """Sizes of all results in a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars)
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if isinstance(inner, core.Jaxpr):
                    yield from buffers(inner)


def test_no_map_of_all_places_is_formed():
    """At 1024 places the row needs no more than the keys, the sums no more than a block of rows."""
    visual, text = 1000, 24
    places = visual + text
    state = random_case(0, grid=(2, 2), text=3, visual=(4,))[1]

    def widen(x, old):
        return tuple({7: places, 4: visual, 3: text}.get(n, n) if n in old else n for n in x.shape)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0], *widen(x[0], {7})), x.dtype), state
    )
    shapes = shapes.replace(prompt=jax.ShapeDtypeStruct((1, text), bool))
    one = jax.make_jaxpr(lambda s: rows.attention_rows(s, s.last[:, None]))(shapes)
    assert max(buffers(one.jaxpr)) <= places * HEADS * DEPTH
    weight = jax.ShapeDtypeStruct((1, places), jnp.float32)
    all_rows = jax.make_jaxpr(lambda s, w: rows.column_sums(s, w, block=16))(shapes, weight)
    assert max(buffers(all_rows.jaxpr)) <= 16 * HEADS * places < places * places
