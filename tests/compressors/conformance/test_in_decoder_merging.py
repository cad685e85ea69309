"""SparseVLM, DART and FitPrune against float64 loops, and their schedules against the papers."""

import dataclasses
import functools
import math

import in_decoder_merging_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_states import best, check_kept, random_case

from efficient_vlm.compressors import Signals, VisualTokens, build
from efficient_vlm.compressors.in_decoder import fitprune, sparsevlm_plan, sparsevlm_scores
from efficient_vlm.compressors.in_decoder.clusters import dpc_knn
from efficient_vlm.compressors.signals import DecoderState
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError
from efficient_vlm.nn.rotary import rotate

GRID, TOKENS, TEXT = (4, 6), 24, 5
VISUAL = (24, 17, 9, 3, 0)  # real tokens by row


@functools.cache
def apply(module):
    """One compiled program for a module, whatever it is shown."""
    return jax.jit(lambda tokens, state: module.apply({}, tokens, Signals(decoder=state)))


def case(seed, **options):
    """Tokens that already stand for several patches."""
    tokens, state = random_case(seed, grid=GRID, text=TEXT, visual=VISUAL, **options)
    size = np.random.default_rng(seed).integers(1, 4, tokens.mask.shape)
    return tokens.replace(size=np.where(tokens.mask, size, 0).astype(np.float32)), state


# Rows of text see the same either way; only fitprune looks at visual rows.
CASES = [
    pytest.param(seed, {"ties": ties}, id=f"{seed}-{ties=}")
    for seed in range(3)
    for ties in (False, True)
]
CASE = pytest.mark.parametrize(("seed", "options"), CASES)


def check_groups(out, tokens, row, groups, budget):
    """That `out` holds the tokens {place: members}, in the order of their places."""
    source = np.full(tokens.source.shape[1], -1)
    for slot, place in enumerate(sorted(groups)):
        members = groups[place]
        size = np.float64(tokens.size[row, members])
        exact = {"rtol": 0} if len(members) == 1 else {"rtol": 1e-5, "atol": 1e-6}
        for field in ("embed", "position"):
            value = np.float64(getattr(tokens, field)[row, members])
            mean = (value * size[:, None]).sum(axis=0) / size.sum()
            mean = value[0] if len(members) == 1 else mean
            np.testing.assert_allclose(
                getattr(out, field)[row, slot], mean, **exact, err_msg=f"{field}, {row=}"
            )
        assert out.size[row, slot] == size.sum()
        for member in members:
            source[tokens.source[row] == member] = slot
    np.testing.assert_array_equal(out.source[row], source, err_msg=f"{row=}")
    np.testing.assert_array_equal(out.mask[row], np.arange(budget) < len(groups))
    np.testing.assert_array_equal(out.size[row, len(groups) :], 0)
    np.testing.assert_array_equal(out.embed[row, len(groups) :], 0)


# Budget, then the counts that follow: kept and merged tokens.
SPARSE = {
    "published": ({"budget": 6}, 5, 1),
    "many": ({"budget": 9, "keep": (6,), "recycle": 1.0}, 6, 3),
    "few": ({"budget": 2}, 1, 1),
    "one": ({"budget": 1}, 1, 0),
    "nearly-all": ({"budget": 23}, 22, 1),
    "2.0": ({"budget": 7, "version": "2.0", "num_heads": 2}, 7, 0),
}


class TestSparseVLM:
    @CASE
    @pytest.mark.parametrize("name", SPARSE)
    def test_matches_loops(self, name, seed, options):
        fields, kept, places = SPARSE[name]
        module = build("sparsevlm", **fields)
        tokens, state = case(seed, **options)
        out = jax.tree.map(np.asarray, apply(module)(tokens, state))
        own = {k: v for k, v in fields.items() if k in ("version", "recycle", "num_heads")}
        for row in range(len(VISUAL)):
            scores = self.scores(
                seed, tuple(options.items()), row, own.get("version", "1.5"), module.num_heads
            )
            groups = loops.sparsevlm(
                tokens, state, row, kept=kept, places=places, scores=scores, **own
            )
            assert len(groups) == min(module.budget, VISUAL[row])
            check_groups(out, tokens, row, groups, module.budget)

    @staticmethod
    @functools.cache
    def scores(seed, options, row, version, num_heads):
        _, state = case(seed, **dict(options))
        return loops.sparse_scores(state, row, TOKENS, version, num_heads) if VISUAL[row] else None

    def test_identity_at_full_budget(self):
        tokens, state = case(0)
        out = apply(build("sparsevlm", budget=TOKENS))(tokens, state)
        jax.tree.map(np.testing.assert_array_equal, out, tokens)

    def test_only_the_prompt_rates(self):
        _, state = case(3)
        words = np.asarray(jax.jit(sparsevlm_scores.raters)(state))
        assert not (words & ~state.prompt).any()
        for row in range(len(VISUAL)):
            if VISUAL[row]:
                assert np.flatnonzero(words[row]).tolist() == loops.raters(state, row)

    def test_equal_words_all_rate(self):
        _, state = case(1)
        first = np.where(np.isnan(state.first_text), np.nan, np.float32(0.3))
        words = jax.jit(sparsevlm_scores.raters)(dataclasses.replace(state, first_text=first))
        np.testing.assert_array_equal(np.asarray(words), state.prompt)

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_rotary_bias_is_read_off_the_queries(self, fraction):
        """(2 sum_j cos((m - n) theta_j) + channels that do not turn) / Dh."""
        rng, depth, places = np.random.default_rng(0), 8, 9
        plain = jnp.asarray(rng.normal(size=(1, places, 2, depth)), jnp.float32)
        where = jnp.asarray(rng.integers(0, 40, (1, places)))
        spec = {"theta": 100.0, "fraction": fraction}
        turned = jax.jit(lambda x, at: rotate(x, at, spec))(plain, where)
        _, state = random_case(0, grid=(2, 2), text=5, visual=(4,))
        state = dataclasses.replace(
            state,
            query=turned,
            key=turned[:, :, :1],
            plain_query=plain,
            plain_key=plain[:, :, :1],
            live=np.ones((1, places), bool),
        )

        @jax.jit
        def bias(state):
            turned = sparsevlm_scores.turns(state, fraction)
            return sparsevlm_scores.rotary_bias(state, turned, jnp.arange(places), floor=-9.0)

        found = np.asarray(bias(state))[0]
        pairs = int(depth * fraction) // 2
        for m in range(places):
            for n in range(places):
                angle = float(where[0, m] - where[0, n])
                cosines = [math.cos(angle * 100.0 ** (-j / pairs)) for j in range(pairs)]
                expected = (2 * math.fsum(cosines) + depth - 2 * pairs) / depth
                assert float(found[m, n]) == pytest.approx(expected, abs=2e-4)


class TestClusters:
    @pytest.mark.parametrize("ties", [False, True])
    def test_matches_loops(self, ties):
        run = jax.jit(dpc_knn, static_argnums=2)
        for seed in range(6):
            rng = np.random.default_rng(seed)
            x = rng.integers(0, 3, (4, 14, 4)) if ties else rng.normal(size=(4, 14, 4))
            x = x.astype(np.float32)
            mask = rng.random((4, 14)) < np.array([[2.0], [0.8], [0.4], [-1.0]])
            poisoned = np.where(mask[..., None], x, np.nan)
            centre, valid, cluster = map(np.asarray, run(poisoned, mask, 4))
            for row in range(4):
                real = np.flatnonzero(mask[row])
                groups = loops.clusters(np.float64(x[row, real]), 4) if len(real) else {}
                expected = np.full(14, -1)
                for slot, members in enumerate(groups.values()):
                    expected[real[members]] = slot
                np.testing.assert_array_equal(cluster[row], expected)
                assert centre[row][valid[row]].tolist() == real[list(groups)].tolist()


DART = {
    "default": {"budget": 13},
    "fewer-than-pivots": {"budget": 3},
    "one": {"budget": 1},
    "no-text-pivots": {"budget": 9, "text_pivots": 0},
    "no-visual-pivots": {"budget": 9, "visual_pivots": 0},
    "more-pivots-than-places": {"budget": 12, "visual_pivots": 9, "text_pivots": 9},
}


@CASE
@pytest.mark.parametrize("name", DART)
def test_dart(name, seed, options):
    module = build("dart", **DART[name])
    tokens, state = case(seed, **options)
    out = jax.tree.map(np.asarray, apply(module)(tokens, state))
    pivots = (module.visual_pivots, module.text_pivots)
    for row in range(len(VISUAL)):
        chosen = loops.dart(state, tokens.mask[row], row, module.budget, *pivots)
        assert len(chosen) == min(module.budget, VISUAL[row])
        check_kept(out, tokens, row, chosen, module.budget)


@pytest.mark.parametrize(
    ("name", "budget", "bidirectional"), [("dart", 13, False), ("fitprune", 5, True)]
)
def test_equal_tokens_keep_the_first(name, budget, bidirectional):
    """Everything is alike; without `bidirectional` fitprune's columns would differ."""
    tokens, state = case(0, bidirectional=bidirectional)
    same = {
        f: np.where(np.isnan(getattr(state, f)), np.nan, np.float32(0.5))
        for f in ("query", "key", "after", "before", "first_visual", "first_text")
    }
    state = dataclasses.replace(state, **same, bias=np.zeros_like(state.bias))
    out = jax.tree.map(np.asarray, apply(build(name, budget=budget))(tokens, state))
    for row in range(len(VISUAL)):
        check_kept(out, tokens, row, np.flatnonzero(tokens.mask[row])[:budget], budget)


@CASE
@pytest.mark.parametrize(("budget", "bidirectional"), [(5, True), (5, False), (23, False)])
def test_fitprune(budget, bidirectional, seed, options):
    module = build("fitprune", budget=budget)
    options = {**options, "bidirectional": bidirectional}
    tokens, state = case(seed, **options)
    out = jax.tree.map(np.asarray, apply(module)(tokens, state))
    for row in range(len(VISUAL)):
        mask, chosen = tokens.mask[row], []
        if mask.any():
            chosen = best(fitprune_scores(seed, tuple(options.items()), row), mask, budget)
        check_kept(out, tokens, row, chosen, budget)


@functools.cache
def fitprune_scores(seed, options, row):
    tokens, state = case(seed, **dict(options))
    return loops.fitprune(state, tokens.mask[row], row)


def shapes(count, text, heads=2, depth=8, entering=None):
    """(VisualTokens, DecoderState) without data; width = heads x depth."""
    places, width = count + text, heads * depth
    first = entering or count

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    four = [array(places, heads, depth)] * 4
    state = DecoderState(
        *four,
        live=array(places, dtype=bool),
        prompt=array(text, dtype=bool),
        last=array(dtype=jnp.int32),
        bias=array(places),
        before=array(places, width),
        after=array(places, width),
        first_visual=array(first, width),
        first_text=array(text, width),
        first_live=array(first, dtype=bool),
    )
    tokens = VisualTokens(
        embed=array(count, width),
        position=array(count, 2),
        size=array(count),
        mask=array(count, dtype=bool),
        source=array(first, dtype=jnp.int32),
    )
    return tokens, state


def program(module, tokens, state):
    return functools.partial(module.apply, {}), (tokens, Signals(decoder=state))


@pytest.mark.parametrize(
    ("name", "fields", "entering"),
    [
        ("sparsevlm", {"budget": 30}, None),
        ("sparsevlm", {"budget": 30, "keep": (27,)}, 120),
        ("sparsevlm", {"budget": 30, "version": "2.0"}, None),
        ("dart", {"budget": 30}, None),
        ("dart", {"budget": 2}, None),
        ("fitprune", {"budget": 30}, None),
    ],
)
@pytest.mark.parametrize("text", [3, 70])
def test_flops_are_those_of_the_program(name, fields, entering, text):
    module = build(name, **fields)
    if entering:
        module = module.clone(entering=entering)
    function, arguments = program(module, *shapes(80, text, entering=entering))
    assert traced_flops(function, *arguments) == module.flops(80, 16, num_text=text)
    assert build(name, budget=80).flops(80, 16, num_text=text) == 0


def largest(jaxpr):
    sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                sizes.append(largest(value.jaxpr))
            elif hasattr(value, "eqns"):
                sizes.append(largest(value))
    return max(sizes, default=0)


@pytest.mark.parametrize("name", ["dart", "fitprune", "sparsevlm"])
def test_no_map_of_all_places(name):
    function, arguments = program(build(name, budget=64), *shapes(576, 64))
    assert largest(jax.make_jaxpr(function)(*arguments).jaxpr) < 640 * 576


@pytest.mark.parametrize("name", ["sparsevlm", "dart"])
def test_bfloat16_and_gradients(name):
    module = build(name, budget=9)
    tokens, state = case(0)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, state)

    def loss(embed):
        out = module.apply({}, tokens.replace(embed=embed), Signals(decoder=state))
        return jnp.sum(out.embed.astype(jnp.float32) ** 2), out

    embed = jnp.asarray(tokens.embed, jnp.bfloat16)
    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(embed)
    gradient = np.asarray(gradient, np.float32)
    assert out.embed.dtype == jnp.bfloat16
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    assert (gradient[~tokens.mask] == 0).all()


# Golden numbers of the papers and the official code, N = 576 and 32 layers.


def entering(stages, num_layers=32, num_tokens=576):
    """Visual tokens that enter each layer."""
    left = {stage.layer: stage.module.budget for stage in stages}
    counts = [num_tokens]
    for layer in range(1, num_layers):
        counts.append(left.get(layer, counts[-1]))
    return counts


@pytest.mark.parametrize(
    ("version", "budget", "behind", "written", "processed"),
    [
        ("1.5", 192, [309, 204, 113], 192.03125, 206.5),
        ("1.5", 128, [312, 117, 39], 128.625, 145.40625),
        ("1.5", 96, [249, 55, 27], 96.9375, 114.09375),
        ("1.5", 64, [82, 32, 18], 64.8125, 82.25),
        ("2.0", 192, [300, 200, 118], None, 206.75),
        ("2.0", 128, [238, 108, 60], None, 144.125),
        ("2.0", 96, [246, 54, 28], None, 113.9375),
        ("2.0", 64, [66, 34, 20], None, 81.8125),
    ],
)
def test_sparsevlm_ledger(version, budget, behind, written, processed):
    stages = build("sparsevlm", budget=budget, version=version).stages(32, 576)
    assert [stage.layer for stage in stages] == [3, 7, 16]
    assert [stage.module.budget for stage in stages] == behind
    enters = entering(stages)
    assert np.mean(enters) == processed
    if written is not None:  # What a layer writes enters the next one; the cuts are at its output.
        assert np.mean([*enters[1:], behind[-1]]) == written
    assert stages[0].module.position_policy == ("reindex" if version == "1.5" else "retain")


def cut(stage):
    """What a cut does to full rows; shorter ones have a third of their own tokens, or 192."""
    return stage.layer, stage.module.budget, stage.module.keep


def test_sparsevlm_default_is_a_third():
    default = build("sparsevlm").stages(32, 576)
    named = build("sparsevlm", budget=192).stages(32, 576)
    assert [cut(stage) for stage in default] == [cut(stage) for stage in named]


@pytest.mark.parametrize(("tokens", "layers"), [(64, 8), (64, 6), (144, 24), (100, 12)])
def test_sparsevlm_meets_other_budgets(tokens, layers):
    for version in ("1.5", "2.0"):
        one = build("sparsevlm", keep=(1, 1, 1), version=version)
        lowest = np.mean(entering(one.stages(layers, tokens), layers, tokens))
        least = math.ceil(lowest)
        for budget in (least, tokens // 3, tokens // 2, tokens):
            module = build("sparsevlm", budget=budget, version=version)
            mean = np.mean(entering(module.stages(layers, tokens), layers, tokens))
            assert abs(mean - budget) <= 1.5
        with pytest.raises(UserError, match=f"mean of {lowest:.4g} (.|\n)*budget={least}"):
            build("sparsevlm", budget=least - 1, version=version).stages(layers, tokens)


def test_sparsevlm_versions_may_be_numbers():
    assert build("sparsevlm", version=2.0) == build("sparsevlm", version="2.0")
    assert build("sparsevlm", version=1.5).position_policy == "reindex"
    assert build("sparsevlm", version=2).position_policy == "retain"


def test_sparsevlm_explicit_counts():
    stages = build("sparsevlm", keep=(0.5, 100, 10), layers=(2, 5, 10)).stages(12, 576)
    assert [stage.layer for stage in stages] == [2, 5, 10]
    assert [stage.module.keep for stage in stages] == [(288,), (100,), (10,)]
    settings = build("sparsevlm").knobs(32, 576)
    means = []
    for setting in settings[:: len(settings) // 20]:
        means.append(np.mean(entering(build("sparsevlm", **setting).stages(32, 576))))
    assert means == sorted(means)
    assert means[0] < 60
    assert sparsevlm_plan.kept_of(309, 576, 0.3) + 9 == 309


REAL = {10: 6.4, 20: 15.4, 50: 49.7, 60: 59.7, 80: 79.7, 90: 89.7}


@pytest.mark.parametrize("nominal", REAL)
def test_fitprune_nominal_against_real(nominal):
    """The reference's real reductions, where deletion is between attention and feed-forward."""
    d, m = fitprune.WIDTH, fitprune.MLP
    deleted, cost, n = fitprune.DELETED[nominal], 0, 576
    for number in deleted:
        left = n - number
        # QKV of all; queries of what is left against all keys, their output and feed-forward.
        cost += 3 * n * d**2 + 2 * n * left * d + left * d**2 + 3 * left * d * m
        n = left
    full = 32 * fitprune.layer_flops(576)
    assert 100 * (1 - cost / full) == pytest.approx(REAL[nominal], abs=0.05)
    # Our cuts are behind the layers.
    enters = entering(build("fitprune", rate=nominal / 100).stages(32, 576))
    assert enters == [576 - sum(deleted[:layer]) for layer in range(32)]
    real = 100 * (1 - sum(map(fitprune.layer_flops, enters)) / full)
    assert REAL[nominal] - 2.5 < real < REAL[nominal]


def test_fitprune_geometric_meets_its_rate():
    for rate in (0.1, 0.5, 0.9):
        module = build("fitprune", rate=rate, schedule="geometric")
        enters = entering(module.stages(32, 576))
        real = 1 - sum(map(fitprune.layer_flops, enters)) / 32 / fitprune.layer_flops(576)
        assert real == pytest.approx(rate, abs=2e-3)


def test_fitprune_other_shapes():
    assert all(len(deleted) == 32 for deleted in fitprune.DELETED.values())
    previous = 576.0
    for rate in (0.1, 0.15, 0.2, 0.52, 0.55, 0.57, 0.85, 0.9):  # also between published rates
        mean = np.mean(entering(build("fitprune", rate=rate).stages(8, 64), 8, 64))
        assert mean < previous
        previous = mean
    stages = build("fitprune", counts=[0.5, 20, 20]).stages(4, 64)
    assert [(s.layer, s.module.budget) for s in stages] == [(1, 32), (2, 20)]
    rates = [s["rate"] for s in build("fitprune").knobs(32, 576)]
    assert rates == sorted(rates, reverse=True)


def test_dart_stages():
    (stage,) = build("dart").stages(32, 576)
    assert (stage.layer, stage.module.budget, stage.module.position_policy) == (2, 127, "retain")
    (stage,) = build("dart", keep=16, layer=1).stages(8, 64)
    assert (stage.layer, stage.module.budget) == (1, 16)


@pytest.mark.parametrize(
    ("name", "fields", "geometry", "message"),
    [
        ("sparsevlm", {"budget": 100}, (32, 576), "compressor.budget.*\n.*64, 96, 128, 192"),
        ("sparsevlm", {"budget": 65}, (8, 64), "compressor.budget: 65, but only 64"),
        ("sparsevlm", {"budget": 600}, (32, 576), "600, but only 576(.|\n)*64, 96, 128, 192"),
        ("sparsevlm", {"budget": 0}, (32, 576), "compressor.budget: 0"),
        ("sparsevlm", {"layers": (0, 1, 2)}, (8, 64), "compressor.layers(.|\n)*1 to 7"),
        ("sparsevlm", {"entering": 64}, (8, 64), "unknown name 'entering'"),
        ("sparsevlm", {"version": 3}, (32, 576), "compressor.version(.|\n)*1.5, 2.0"),
        ("dart", {"budget": 600}, (32, 576), "compressor.budget: dart cannot keep 600 of 576"),
        ("fitprune", {"counts": 577}, (2, 576), "compressor.counts: fitprune cannot keep 577"),
        ("sparsevlm", {"budget": 64, "keep": (3, 2, 1)}, (32, 576), "compressor.keep"),
        ("sparsevlm", {"keep": (3, 2)}, (32, 576), "compressor.keep"),
        ("sparsevlm", {"keep": (3, 2, 5)}, (32, 576), "compressor.keep"),
        ("sparsevlm", {"keep": (577, 2, 1)}, (32, 576), "compressor.keep"),
        ("sparsevlm", {"version": "3"}, (32, 576), "compressor.version"),
        ("sparsevlm", {"recycle": 2}, (32, 576), "compressor.recycle"),
        ("sparsevlm", {"num_heads": 0}, (32, 576), "compressor.num_heads"),
        ("sparsevlm", {"layers": (2, 6, 40), "budget": 64}, (32, 576), "compressor.layers"),
        ("sparsevlm", {"layers": (2, 6), "budget": 64}, (32, 576), "compressor.layers"),
        ("sparsevlm", {"budget": 16}, (3, 64), "compressor.layers"),
        ("dart", {"layer": 32}, (32, 576), "compressor.layer"),
        ("dart", {"keep": 1.5}, (32, 576), "compressor.keep"),
        ("dart", {"keep": 5, "budget": 5}, (32, 576), "compressor.keep"),
        ("dart", {"keep": 600}, (32, 576), "compressor.keep"),
        ("dart", {"visual_pivots": 0, "text_pivots": 0}, (32, 576), "compressor.visual_pivots"),
        ("fitprune", {"rate": 0.95}, (32, 576), "compressor.rate"),
        ("fitprune", {"rate": 0}, (32, 576), "compressor.rate"),
        ("fitprune", {"schedule": "linear"}, (32, 576), "compressor.schedule"),
        ("fitprune", {"counts": (5, 6)}, (32, 576), "compressor.counts"),
        ("fitprune", {"counts": (6, 5)}, (32, 576), "compressor.counts"),
        ("fitprune", {"budget": 64}, (32, 576), "compressor.budget"),
        ("fitprune", {}, (1, 576), "compressor.name"),
    ],
)
def test_user_errors(name, fields, geometry, message):
    with pytest.raises(UserError, match=message) as error:
        build(name, **fields).stages(*geometry)
    assert len(str(error.value).splitlines()) <= 3
