"""tome and tofu where a unit is a block of patches: loops in float64, and the case of one patch."""

import jax
import numpy as np
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build
from efficient_vlm.compressors.in_encoder.bipartite import STEP, Merge, pair
from efficient_vlm.compressors.units import units_of_grid
from efficient_vlm.errors import UserError

GRID, SIDE, WIDTH = (4, 6), 2, 3
UNITS = units_of_grid(GRID, SIDE)
RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(2, 24, WIDTH)).astype(np.float32)
KEYS = RNG.normal(size=(2, 24, 2, 5)).astype(np.float32)


def pairs_by_loop(keys, r):
    """[(unit that moves, unit that it joins)] of keys [24, H, Dh] (arXiv 2210.09461, section 3)."""
    unit = np.float64(keys).mean(axis=1)[UNITS.places].mean(axis=1)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    found = []
    for a in range(0, 6, 2):
        cosines = [np.round(unit[a] @ unit[b] / STEP) for b in range(1, 6, 2)]
        found.append((max(cosines), a, 1 + 2 * int(np.argmax(cosines))))
    best = sorted(found, key=lambda item: (-item[0], item[1]))[:r]
    return [(a, b) for _, a, b in best]


def left_by_loop(states, keys, r, kind):
    """Patches that are left, [K * 4, WIDTH], and the unit that holds each unit, -1 for none."""
    moves = dict(pairs_by_loop(keys, r))
    stay = [u for u in range(6) if u not in moves]
    out = []
    for unit in stay:
        members = [unit, *(u for u, to in moves.items() if to == unit)]
        each = np.float64(states)[UNITS.places[members]]  # [members, 4, WIDTH]
        merged = each.mean(axis=0)
        if kind == "drop":
            merged = each[0]
        elif kind == "mlerp" and len(members) > 1:
            longest = np.linalg.norm(each, axis=-1).max(axis=0)
            merged *= (longest / np.linalg.norm(merged, axis=-1))[:, None]
        out.append(merged)
    holder = [stay.index(moves.get(u, u)) for u in range(6)]
    if kind == "drop":
        holder = [-1 if u in moves else slot for u, slot in enumerate(holder)]
    return np.concatenate(out), holder


@pytest.mark.parametrize("kind", ["mean", "mlerp", "drop"])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_agrees_with_the_loop(kind, r):
    if kind == "mean":
        method = build("tome", r=r, layers=(0,))
    else:
        method = build("tofu", r=r, layers=(0,), prune_layers=int(kind == "drop"))
    (stage,) = method.stages(2, 24, patches=GRID, side=SIDE)
    assert stage.inside
    assert stage.module.budget == (6 - r) * 4
    tokens = VisualTokens.from_grid(STATES, GRID)
    found = jax.jit(lambda t, k: stage.module.apply({}, t, Signals(keys=k)))(tokens, KEYS)
    for row in range(2):
        states, holder = left_by_loop(STATES[row], KEYS[row], r, kind)
        np.testing.assert_allclose(found.embed[row], states, atol=1e-6)
        expected = np.full(24, -1)
        for unit, slot in enumerate(holder):
            expected[UNITS.places[unit]] = -1 if slot < 0 else 4 * slot + np.arange(4)
        np.testing.assert_array_equal(found.source[row], expected)
        total = 24 if kind != "drop" else 4 * (6 - r)
        assert float(found.size[row].sum()) == total


def test_a_unit_is_a_token_of_all_its_patches():
    """The same step on 6 tokens, each the patches of a unit side by side."""
    tokens = VisualTokens.from_grid(STATES, GRID)
    metric = RNG.normal(size=(2, 6, 4)).astype(np.float32)
    pairs = pair(metric, np.ones((2, 6), bool), 2)
    units = Merge(tokens, UNITS, pairs)()
    wide = STATES[:, UNITS.places].reshape(2, 6, -1)
    one = Merge(VisualTokens.from_grid(wide, (2, 3)), units_of_grid((2, 3), 1), pairs)()
    np.testing.assert_allclose(units.embed.reshape(2, 4, -1), one.embed, atol=1e-6)
    np.testing.assert_array_equal(
        units.size.reshape(2, 4, 4), np.repeat(one.size, 4).reshape(2, 4, 4)
    )
    np.testing.assert_array_equal(units.source[:, UNITS.places[:, 0]] // 4, one.source)


def test_features_of_earlier_layers_merge_alike():
    tokens = VisualTokens.from_grid(STATES, GRID)
    pairs = pair(STATES[:, UNITS.places[:, 0]], np.ones((2, 6), bool), 3)
    merge = Merge(tokens, UNITS, pairs)
    np.testing.assert_allclose(merge.features(tokens.embed), merge().embed, atol=1e-6)


def test_units_at_the_border_lack_patches():
    """3 x 3 patches: a unit of four, two of two and one of one; places without a patch stay so."""
    grid, units = (3, 3), units_of_grid((3, 3), 2)
    states = RNG.normal(size=(1, 9, WIDTH)).astype(np.float32)
    tokens = VisualTokens.from_grid(states, grid)
    metric = np.float32([[[1, 0], [1, 0], [0, 1], [0.5, 1]]])  # The whole unit joins that beside.
    found = Merge(tokens, units, pair(metric, np.ones((1, 4), bool), 1))()
    assert np.asarray(found.size)[0].tolist() == [2, 1, 2, 1, 1, 1, 0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(found.embed[0, 0], (states[0, 0] + states[0, 2]) / 2, atol=1e-6)
    np.testing.assert_allclose(found.embed[0, 1], states[0, 1], atol=1e-6)
    assert np.asarray(found.mask)[0].tolist() == [True] * 6 + [False, False, True] + [False] * 3


def test_bad_options():
    with pytest.raises(UserError, match="compressor.prune_layers: -1") as caught:
        build("tofu", r=2, prune_layers=-1)
    assert len(str(caught.value).splitlines()) <= 3
