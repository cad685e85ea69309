"""tome against a plain loop, its schedules, and the identity of proportional attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tome_loops as loops

from efficient_vlm.compressors import Signals, VisualTokens, build
from efficient_vlm.compressors.in_encoder.bipartite import Merge, pair
from efficient_vlm.compressors.units import units_of_grid
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError

GRID, WIDTH, HEADS, HEAD_DIM = (3, 5), 6, 2, 4
NUM_TOKENS = 15


@functools.cache
def two_steps(first, second, class_token):
    """Jitted: 15 tokens to `first` and then to `second`; keys of both steps."""

    def function(embed, keys, mask):
        out = [VisualTokens.from_grid(embed, GRID, mask=mask)]
        for budget, k in zip((first, second), keys, strict=True):
            module = build("tome", budget=budget).clone(class_token=class_token)
            out.append(module.apply({}, out[-1], Signals(keys=k)))
        return out[1:]

    return jax.jit(function)


def hard_batch(seed, second):
    """(embed, keys of step 1, mask): random, tied, equal, duplicated and padded rows."""
    rng = np.random.default_rng(seed)
    shape = (NUM_TOKENS, HEADS, HEAD_DIM)
    rows = [rng.normal(size=shape) for _ in range(6)]
    rows.append(np.repeat(rng.normal(size=shape)[:1], NUM_TOKENS, axis=0))
    rows.append(np.repeat(rng.normal(size=shape)[:1], NUM_TOKENS, axis=0))
    rows.append(rng.normal(size=shape)[rng.integers(0, 4, NUM_TOKENS)])
    rows.append(rng.choice([-1.0, 1.0], size=shape))
    rows.append(np.where(rng.random((NUM_TOKENS, 1, 1)) < 0.3, 0, rng.normal(size=shape)))
    keys = np.float32(rows)
    batch = len(keys)
    embed = np.float32(rng.normal(size=(batch, NUM_TOKENS, WIDTH)))
    mask = rng.random((batch, NUM_TOKENS)) < rng.choice([0.6, 0.9, 1.1], size=(batch, 1))
    mask[0], mask[1], mask[2] = True, False, np.arange(NUM_TOKENS) == 4
    mask[3] = np.arange(NUM_TOKENS) % 2 == 0  # whole columns of one parity are padding
    mask[4], mask[6] = np.arange(NUM_TOKENS) < 10, True
    later = np.float32(rng.normal(size=(batch, second, HEADS, HEAD_DIM)))
    return embed, (keys, later), mask


def expected_step(row, source, keys, budget, class_token, noise=None):
    real = [int(i) for i in np.flatnonzero(row["mask"])]
    merges = max(0, len(real) - budget)
    pairs = loops.pairs_to_merge(keys, real, merges, class_token, noise)
    new, holder = loops.merge(row["embed"], row["position"], row["size"], real, pairs, budget)
    return new, np.where(source >= 0, holder[source], -1)


@pytest.mark.parametrize(
    ("first", "second", "class_token"),
    [(8, 4, False), (8, 4, True), (12, 11, False), (14, 7, True)],
)
def test_agrees_with_the_loop(first, second, class_token):
    """The second step has tokens of several sizes, and padding at the end."""
    checked = doubtful = 0
    for seed in range(3):
        embed, keys, mask = hard_batch(seed, first)
        poisoned = np.where(mask[..., None], embed, np.nan)
        first_keys = np.where(mask[..., None, None], keys[0], np.inf)
        steps = two_steps(first, second, class_token)(poisoned, (first_keys, keys[1]), mask)
        steps = jax.tree.map(np.asarray, steps)
        for b in range(len(mask)):
            position = np.array([divmod(p, GRID[1]) for p in range(NUM_TOKENS)], float)
            row = {"embed": np.float64(embed[b]), "position": position}
            row |= {"size": mask[b].astype(float), "mask": mask[b]}
            source = np.where(mask[b], np.arange(NUM_TOKENS), -1)
            for out, k, budget in zip(steps, keys, (first, second), strict=True):
                noise = np.random.default_rng(b)
                arguments = row, source, k[b], budget, class_token
                row, source = expected_step(*arguments)
                checked += 1
                if (expected_step(*arguments, noise)[1] != source).any():
                    doubtful += 1
                    break
                np.testing.assert_array_equal(out.source[b], source)
                np.testing.assert_array_equal(out.mask[b], row["mask"])
                for field in ("embed", "position", "size"):
                    actual = getattr(out, field)[b]
                    np.testing.assert_allclose(actual, row[field], atol=2e-6, err_msg=field)
    assert doubtful <= checked // 10


@pytest.mark.parametrize(("r", "left"), [(8, 393), (13, 278), (16, 209), (23, 48)])
def test_published_counts_of_clip_large(r, left):
    """577 tokens with CLS, the 23 layers that LLaVA executes."""
    stages = build("tome", r=r).stages(23, 576, class_token=True)
    assert [stage.layer for stage in stages] == list(range(23))
    assert all(stage.inside and stage.module.class_token for stage in stages)
    assert stages[-1].module.budget + 1 == left
    assert [s.module.budget for s in stages] == [576 - r * (i + 1) for i in range(23)]


@pytest.mark.parametrize("budget", [1, 2, 48, 100, 192, 575])
def test_a_budget_is_reached_exactly(budget):
    counts = [s.module.budget for s in build("tome", budget=budget).stages(23, 576)]
    steps = -np.diff([576, *counts])
    assert counts[-1] == budget
    assert (steps[:-1] >= steps[1:]).all(), "only the last layers merge less"
    assert all(step <= before // 2 for step, before in zip(steps, [576, *counts], strict=False))


def test_stages_of_chosen_layers():
    stages = build("tome", r=4, layers=[5, 2]).stages(8, 16)
    assert [(s.layer, s.module.budget) for s in stages] == [(2, 12), (5, 8)]
    assert build("tome", budget=16).stages(8, 16) == ()
    assert [s.module.budget for s in build("tome", r=9).stages(8, 16)] == [8, 4, 2, 1]


def test_knobs_run_from_the_fewest_tokens_to_the_most():
    module = build("tome", r=4)
    knobs = list(module.knobs(3, 16))
    counts = [module.clone(**knob).stages(3, 16) for knob in knobs]
    assert [s[-1].module.budget if s else 16 for s in counts] == list(range(2, 17))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_a_merged_token_counts_as_its_copies():
    """Proportional attention in float64 over merged tokens equals attention over all the copies."""
    rng = np.random.default_rng(0)
    group = np.array([0, 0, 1, 1, 0, 0, 2, 1, 3, 3, 4, 5, 0, 0])  # copies, some of one parity
    distinct = np.round(rng.normal(size=(6, WIDTH)), 2)
    embed = np.float32(distinct[group])[None]
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (2, 7))
    units = units_of_grid((2, 7), 1)
    merged = jax.jit(lambda t: Merge(t, units, pair(t.embed, t.mask, 5))())(tokens)
    assert sorted(np.asarray(merged.size)[0].tolist(), reverse=True)[:3] == [4, 2, 2]
    np.testing.assert_allclose(
        np.asarray(merged.embed)[0][np.asarray(merged.source)[0]], embed[0], atol=1e-6
    )

    query, key, value = rng.normal(size=(3, WIDTH, WIDTH))
    copies = distinct[group]
    # The merged tokens in float64: their values are those of the distinct ones.
    slots = [group[np.flatnonzero(np.asarray(merged.source)[0] == s)[0]] for s in range(9)]
    tokens64, sizes = distinct[slots], np.float64(merged.size)[0]
    asked = 0.1 * rng.normal(size=(4, WIDTH)) @ query
    whole = softmax(asked @ (copies @ key).T) @ (copies @ value)
    short = softmax(asked @ (tokens64 @ key).T + np.log(sizes)) @ (tokens64 @ value)
    np.testing.assert_allclose(short, whole, rtol=1e-12, atol=1e-12)
    plain = softmax(asked @ (tokens64 @ key).T) @ (tokens64 @ value)
    assert np.abs(plain - whole).max() > 1e-2, "without log(size) it does not hold"


@pytest.mark.parametrize("class_token", [False, True])
def test_equal_tokens_of_great_width_tie(class_token):
    keys = np.repeat(np.random.default_rng(0).normal(size=(1, 1, 1, 1000)), 16, axis=1)
    tokens = VisualTokens.from_grid(jnp.ones((1, 16, WIDTH)), (4, 4))
    module = build("tome", r=3).clone(class_token=class_token)
    out = jax.jit(lambda t, k: module.apply({}, t, Signals(keys=k)))(tokens, jnp.float32(keys))
    # The first three of A join the first of B.
    merged = [1, 3, 5] if class_token else [0, 2, 4]
    target = 0 if class_token else 1
    holder = np.asarray(out.source)[0]
    assert np.flatnonzero(holder == holder[target]).tolist() == sorted([*merged, target])
    assert out.size[0, holder[target]] == 4


def test_bfloat16_and_gradients():
    embed, keys, mask = hard_batch(0, 8)
    embed = np.where(mask[..., None], embed, np.nan)

    def loss(embed, keys):
        tokens = VisualTokens.from_grid(embed, GRID, mask=mask)
        out = build("tome", budget=8).apply({}, tokens, Signals(keys=keys))
        return (out.embed.astype(jnp.float32) * out.size[..., None]).sum(), out

    function = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_embed, by_keys), out = function(jnp.asarray(embed, jnp.bfloat16), keys[0])
    assert out.embed.dtype == jnp.bfloat16
    # Sums of sizes times means are sums over the patches.
    np.testing.assert_allclose(
        np.float32(by_embed), np.where(mask[..., None], np.ones_like(embed), 0), rtol=0.02
    )
    assert not by_keys.any()


@pytest.mark.parametrize("options", [{"budget": 9}, {"r": 7}, {"r": 40}, {"budget": 15}])
def test_flops(options):
    module = build("tome", head_dim=HEAD_DIM, **options)
    tokens = VisualTokens.from_grid(jnp.zeros((1, NUM_TOKENS, WIDTH)), GRID)
    signals = Signals(keys=jnp.zeros((1, NUM_TOKENS, HEADS, HEAD_DIM)))
    counted = traced_flops(lambda t, s: module.apply({}, t, s), tokens, signals)
    assert counted == module.flops(NUM_TOKENS, WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "compressor.r: None"),
        ({"r": 3, "budget": 5}, "one of the two"),
        ({"r": 0}, "compressor.r: 0"),
        ({"r": 2.5}, "compressor.r: 2.5"),
        ({"r": 2, "layers": (1, -1)}, "compressor.layers: -1"),
        ({"r": 2, "layers": ()}, "compressor.layers: empty"),
        ({"r": 2, "layers": 3.5}, "compressor.layers: 3.5"),
        ({"r": 2, "layers": "all"}, "compressor.layers: 'all'"),
        ({"r": 2, "proportional": "yes"}, "compressor.proportional: 'yes'"),
        ({"r": 2, "class_token": True}, "unknown name 'class_token'"),
        ({"r": 2, "layers": (1, 8)}, "compressor.layers: 8, but the encoder has 8 layers"),
        ({"budget": 3, "layers": (1, 2)}, "4 to 16"),
        ({"budget": 17}, "cannot give 17"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        build("tome", **options).stages(8, 16)


def test_one_call_merges_at_most_half():
    tokens = VisualTokens.from_grid(jnp.ones((1, NUM_TOKENS, WIDTH)), GRID)
    signals = Signals(keys=jnp.ones((1, NUM_TOKENS, HEADS, HEAD_DIM)))
    with pytest.raises(UserError, match="allowed: 8 to 15"):
        build("tome", budget=7).apply({}, tokens, signals)
    with pytest.raises(UserError, match="signals.keys"):
        build("tome", r=7).apply({}, tokens)
    same = build("tome", budget=NUM_TOKENS).apply({}, tokens, signals)
    assert same.embed is tokens.embed, "the full budget is the identity"
    out = jax.eval_shape(lambda: build("tome", r=40).apply({}, tokens, signals))
    assert out.embed.shape == (1, 8, WIDTH)
