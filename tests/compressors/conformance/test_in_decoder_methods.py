"""FastV, PyramidDrop, FEATHER, V2Drop and VTW against plain float64 loops over the whole map."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_states import best, check_kept, full_map, random_case

from efficient_vlm.compressors import Signals
from efficient_vlm.compressors.in_decoder.fastv import FastV
from efficient_vlm.compressors.in_decoder.feather import Feather
from efficient_vlm.compressors.in_decoder.pyramiddrop import PyramidDrop
from efficient_vlm.compressors.in_decoder.v2drop import V2Drop
from efficient_vlm.compressors.in_decoder.vtw import VisualTokensWithdrawal
from efficient_vlm.costs.traced import traced_flops

GRID, TOKENS, BUDGET = (3, 4), 12, 5


@functools.cache
def apply(module):
    """One compiled program for a module, whatever it is shown."""
    return jax.jit(lambda tokens, state: module.apply({}, tokens, Signals(decoder=state)))


def last_row(state, row):
    """Attention of the last prompt token, mean over heads."""
    return full_map(state, row).mean(axis=0)[state.last[row]][:TOKENS]


def mean_row(state, row):
    """Mean of the attention of every visual and every prompt token."""
    attention, judges = full_map(state, row).mean(axis=0), []
    for i in range(attention.shape[0]):
        if state.live[row, i] and (i < TOKENS or state.prompt[row, i - TOKENS]):
            judges.append(i)
    return sum(attention[i] for i in judges)[:TOKENS] / len(judges)


def plain_row(state, row, *, visual_only):
    """As `last_row` without rotary positions; the softmax over visual keys, or all."""
    rows = full_map(state, row, rotary=False)[:, state.last[row], :]
    shares = np.zeros(TOKENS)
    for head in rows:
        total = math.fsum(head[:TOKENS]) if visual_only else 1.0
        for t in range(TOKENS):
            shares[t] += head[t] / total / len(rows) if total else 0.0
    return shares


def variation(state, row):
    out = np.zeros(TOKENS)
    for t in range(TOKENS):
        change = np.float64(state.after[row, t]) - np.float64(state.before[row, t])
        out[t] = math.sqrt(math.fsum(change**2))
    return out


CASES = {
    "fastv-last": (FastV(budget=BUDGET), last_row),
    "fastv-mean": (FastV(budget=BUDGET, row="mean"), mean_row),
    "pyramiddrop": (PyramidDrop(budget=BUDGET), last_row),
    "feather-second": (
        Feather(budget=BUDGET, stride=0),
        functools.partial(plain_row, visual_only=True),
    ),
    "feather-all": (
        Feather(budget=BUDGET, stride=0, softmax="all"),
        functools.partial(plain_row, visual_only=False),
    ),
    "v2drop": (V2Drop(budget=BUDGET), variation),
}


def check(module, scores, tokens, state, *, exact=True):
    out = jax.tree.map(np.asarray, apply(module)(tokens, state))
    for row in range(tokens.mask.shape[0]):
        each, mask = scores(state, row), tokens.mask[row]
        real = np.sort(each[mask])
        if exact and len(real) > 1:
            assert np.diff(real).min() > 1e-7, "the case must not hang on rounding"
        # Equal tokens have scores that differ in the last bits of float64; they are ties.
        chosen = best(np.round(each, 9), mask, module.budget)
        check_kept(out, tokens, row, chosen, module.budget)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_random_cases(name, bidirectional):
    for seed in range(3):
        tokens, state = random_case(seed, grid=GRID, bidirectional=bidirectional)
        check(*CASES[name], tokens, state)


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lowest_index(name):
    """Tokens of three kinds: equal ones have equal scores."""
    module, scores = CASES[name]
    for seed in range(3):
        tokens, state = random_case(seed, grid=GRID, ties=True, bidirectional=True)
        check(module, scores, tokens, state, exact=False)


@pytest.mark.parametrize("name", CASES)
def test_equal_tokens(name):
    """All places are alike: the first real ones stay."""
    module, _ = CASES[name]
    tokens, state = random_case(0, grid=GRID, poison=False, bidirectional=True)
    state = jax.tree.map(
        lambda x: np.ones_like(x) if x.dtype == np.float32 and x.ndim > 2 else x, state
    ).replace(bias=np.zeros_like(state.bias))
    out = jax.tree.map(np.asarray, apply(module)(tokens, state))
    for row in range(4):
        check_kept(out, tokens, row, np.flatnonzero(tokens.mask[row])[:BUDGET], BUDGET)


@pytest.mark.parametrize("name", CASES)
def test_one_token(name):
    module, scores = CASES[name]
    module = module.clone(budget=1)
    check(module, scores, *random_case(7, grid=GRID))


@pytest.mark.parametrize("stride", [2, 3])
def test_feather_keeps_the_grid_and_the_best_beside_it(stride):
    spaced = [y * 4 + x for y in range(0, 3, stride) for x in range(0, 4, stride)]
    budget = len(spaced) + 3
    module = Feather(budget=budget, stride=stride, grid=GRID)
    for seed in range(3):
        tokens, state = random_case(seed, grid=GRID)
        out = jax.tree.map(np.asarray, apply(module)(tokens, state))
        for row in range(4):
            scores, mask = plain_row(state, row, visual_only=True), tokens.mask[row]
            chosen = [t for t in spaced if mask[t]]
            others = [t for t in best(scores, mask, TOKENS) if t not in chosen]
            check_kept(out, tokens, row, (chosen + others)[:budget], budget)
            # A superset of the official union of the grid and the three best of all.
            assert set(chosen) | set(best(scores, mask, 3)) <= set((chosen + others)[:budget])


@pytest.mark.parametrize("module", [V2Drop(budget=0), VisualTokensWithdrawal(budget=0)])
def test_all_tokens_dropped(module):
    tokens, state = random_case(0, grid=GRID)
    out = apply(module)(tokens, state)
    assert out.embed.shape == (4, 0, 8)
    assert out.mask.shape == out.size.shape == (4, 0)
    assert out.position.shape == (4, 0, 2)
    assert (np.asarray(out.source) == -1).all()
    assert module.apply({}, out, Signals(decoder=state)) is out  # nothing is left to drop


@pytest.mark.parametrize("name", CASES)
def test_identity_at_the_full_count(name):
    module = CASES[name][0].clone(budget=TOKENS)
    tokens, state = random_case(0, grid=GRID)
    assert module.apply({}, tokens, Signals(decoder=state)) is tokens


@pytest.mark.parametrize("name", CASES)
def test_a_second_cut_follows_the_patches(name):
    """The tokens of one cut go into the next: `source` still starts at the patches."""
    module, scores = CASES[name]
    tokens, _ = random_case(0, grid=GRID, visual=(12, 12), poison=False)
    kept = np.array([[1, 2, 3, 5, 7, 8, 9, 11], [0, 1, 2, 3, 4, 5, 6, 7]])
    first = jax.tree.map(lambda x: x[:, :12], tokens).replace(
        embed=np.take_along_axis(tokens.embed, kept[..., None], 1),
        position=np.take_along_axis(tokens.position, kept[..., None], 1),
        size=np.take_along_axis(tokens.size, kept, 1),
        mask=np.ones((2, 8), bool),
        source=np.stack([[list(k).index(p) if p in k else -1 for p in range(12)] for k in kept]),
    )
    _, state = random_case(1, grid=(2, 4), visual=(8, 8))
    out = jax.tree.map(np.asarray, apply(module.clone(grid=None))(first, state))
    assert (out.source >= 0).sum() == 2 * BUDGET
    for row in range(2):
        for patch in range(12):
            if (slot := out.source[row, patch]) >= 0:
                np.testing.assert_array_equal(out.embed[row, slot], tokens.embed[row, patch])
                np.testing.assert_array_equal(out.position[row, slot], divmod(patch, 4))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_and_gradients(name):
    module = CASES[name][0]
    tokens, state = random_case(0, grid=GRID, dtype=jnp.bfloat16)

    def total(embed, state):
        out = module.apply({}, tokens.replace(embed=embed), Signals(decoder=state))
        assert out.embed.dtype == jnp.bfloat16
        return jnp.sum(out.embed.astype(jnp.float32)), out

    floats = jax.grad(total, argnums=(0, 1), has_aux=True, allow_int=True)
    (embed, beside), out = jax.jit(floats)(jnp.asarray(tokens.embed), state)
    kept = np.asarray(out.source) >= 0
    np.testing.assert_array_equal(np.asarray(embed, np.float32), kept[..., None] * np.ones(8))
    # The score is cut off: nothing flows into what it was made of.
    for leaf in jax.tree.leaves(beside):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.asarray(leaf, np.float32).any()


@pytest.mark.parametrize("name", CASES)
def test_flops(name):
    """Per cut: 2 S x 16 for one row (4 heads of 4), 2 S^2 x 16 for all; nothing at N."""
    module = CASES[name][0]
    tokens, state = random_case(0, grid=GRID, visual=(12,))
    count = traced_flops(lambda t, s: module.apply({}, t, Signals(decoder=s)), tokens, state)
    assert module.flops(TOKENS, 16, 0, num_text=5) == count
    expected = {"fastv-mean": 2 * 17 * 17 * 16, "v2drop": 0}.get(name, 2 * 17 * 16)
    assert count == expected
    assert module.clone(budget=TOKENS).flops(TOKENS, 16, 0, num_text=5) == 0
