"""The contract of every compressor, as one class: a new method adds a row to CASES."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shape_checks import check_fields

from efficient_vlm.compressors import DecoderState, Signals, VisualTokens, build, names, reachable

BATCH, WIDTH, TEXT_WIDTH = 3, 8, 8
TEXT, HEADS, DEPTH = 3, 2, 4  # of the decoder and encoder layers that signals come from


@dataclasses.dataclass(frozen=True)
class Case:
    """One method with options.

    Attributes:
      name: of the method.
      kind: "select" if it keeps tokens as they are, "merge" if every patch goes into some token,
        "mixed" if some are merged and others dropped.
      options: from the grid to options of `build`.
      random: the result depends on the row's place in the batch.
      trained: it has parameters, or a bias that is taught: gradients are checked.
      identity: at the full budget the tokens are unchanged.
      fewer: with few real tokens it may give even fewer (cells of padding, holes).
      internal: fields that only `stages` sets, as pairs.
    """

    name: str
    kind: str = "select"
    options: Callable[[tuple[int, int]], dict] = lambda grid: {}
    random: bool = False
    trained: bool = False
    identity: bool = True
    fewer: bool = False
    note: str = ""
    internal: tuple[tuple[str, object], ...] = ()

    def __str__(self):
        return self.name + self.note


def fixed(**options):
    return lambda grid: options


CUTS = ("neighbours", "diversity", "stride", "random")
CASES = [
    Case("none"),
    Case("average_pool", "merge"),
    Case(
        "pixel_shuffle",
        "merge",
        lambda grid: {"budgets": reachable("pixel_shuffle", grid)},
        trained=True,
    ),
    Case("resampler", "merge", fixed(num_queries=8, num_heads=2), trained=True),
    Case("downsample", "merge", fewer=True),
    Case(
        "pixel_shuffle",
        "merge",
        lambda grid: {
            "budgets": reachable("pixel_shuffle", grid),
            "order": "feature_row_column",
        },
        trained=True,
        note="-order",
    ),
    Case(
        "pixel_shuffle",
        "merge",
        lambda grid: {
            "budgets": reachable("pixel_shuffle", grid),
            "order": "column_row_feature",
        },
        trained=True,
        note="-swin",
    ),
    Case("pool", "merge", fewer=True),
    Case("m3", "merge", fewer=True),
    Case("mqt", "merge", fixed(num_queries=16, num_heads=2), trained=True, identity=False),
    Case(
        "mqt",
        "merge",
        fixed(num_queries=9, num_heads=2, keys="content"),
        trained=True,
        identity=False,
        note="-content",
    ),
    Case("molmo_pool", "merge", fixed(num_heads=2), trained=True, identity=False, fewer=True),
    Case(
        "molmo_pool",
        "merge",
        fixed(num_heads=2, query="first", hidden_dim=6),
        trained=True,
        identity=False,
        fewer=True,
        note="-first",
    ),
    Case("position_pool", "merge", fewer=True),
    Case(
        "position_pool",
        "merge",
        fixed(scaled=True),
        identity=False,
        fewer=True,
        note="-scaled",
    ),
    Case("minicpm_merger", "merge", fixed(num_heads=2), trained=True, fewer=True),
    Case(
        "minicpm_merger",
        "merge",
        fixed(num_heads=2, quarter="final"),
        trained=True,
        fewer=True,
        note="-final",
    ),
    Case("random", random=True),
    Case("stride"),
    Case("text_topk", trained=True),
    Case("text_topk", options=fixed(bias="straight_through"), trained=True, note="-straight"),
    Case("text_topk", options=fixed(bias="none", num_heads=2), trained=True, note="-heads"),
    Case("visionselector", options=fixed(dim=6), trained=True),
    Case(
        "visionselector",
        options=fixed(dim=6, soft=3),
        trained=True,
        identity=False,
        note="-soft",
    ),
    Case("mlp", "merge", trained=True, identity=False),
    Case("deco", "merge", trained=True, identity=False, fewer=True),
    Case("c_abstractor", "merge", fixed(depth=1), trained=True, identity=False, fewer=True),
    Case("ldp", "merge", trained=True, identity=False, fewer=True),
    Case("ldpv2", "merge", trained=True, identity=False, fewer=True),
    Case("tokenpacker", "merge", fixed(num_heads=2), trained=True, identity=False, fewer=True),
    Case(
        "tokenpacker",
        "merge",
        fixed(num_heads=2, style="official"),
        trained=True,
        identity=False,
        fewer=True,
        note="-official",
    ),
    Case("perceiver", "merge", fixed(num_queries=8, num_heads=2, depth=1), trained=True),
    Case(
        "perceiver",
        "merge",
        fixed(num_queries=8, num_heads=2, depth=1, style="flamingo"),
        trained=True,
        note="-flamingo",
    ),
    Case("qformer", "merge", fixed(num_queries=8, num_heads=2, depth=1), trained=True),
    Case("fastervlm"),
    Case("visionzip", "mixed"),
    Case("visionzip", "mixed", fixed(merge="mean", contextual=0.5), note="-mean"),
    Case("vispruner", options=fixed(round_size=2)),
    Case("prumerge", options=fixed(neighbours=3)),
    Case("prumerge", "mixed", fixed(extra=True), note="-extra"),
    Case("prumerge", options=fixed(adaptive=True), identity=False, fewer=True, note="-adaptive"),
    Case("prumerge_plus", options=fixed(neighbours=3)),
    Case(
        "prumerge_plus",
        options=fixed(neighbours=3, adaptive=True),
        identity=False,
        fewer=True,
        note="-adaptive",
    ),
    Case("hiprune", options=fixed(alpha=0.8)),
    Case("hiprune", options=fixed(alpha=0.8, border="stop"), note="-stop"),
    Case("divprune"),
    Case("cdpruner"),
    Case("cdpruner", options=fixed(relevance="none"), note="-none"),
    Case("scope"),
    Case("tome", "merge"),
    Case("tome", "merge", internal=(("class_token", True),), note="-cls"),
    Case("tofu", "merge"),
    Case("tofu", internal=(("drops", True),), note="-drops"),
    Case("encoder_cut"),
    *(Case("encoder_cut", options=fixed(score=score), note=f"-{score}") for score in CUTS),
    Case("pixelprune", identity=False, fewer=True),
    Case("pixelprune", options=fixed(tau=0.5), identity=False, fewer=True, note="-tau"),
    Case("ipcv"),
    Case("encoder_exit"),
    Case("fastv"),
    Case("fastv", options=fixed(row="mean"), note="-mean"),
    Case("pyramiddrop"),
    Case("feather", options=fixed(stride=2)),
    Case("v2drop"),
    Case("sparsevlm", "mixed"),
    Case("sparsevlm", options=fixed(version="2.0"), note="-2.0"),
    Case("dart"),
    Case("fitprune"),
]
SQUARE, WIDE = (4, 4), (2, 6)


def budgets_of(case: Case, grid: tuple[int, int]) -> list[int]:
    """On the square grid the full budget and one in the middle, on the other the smallest."""
    found = reachable(case.name, grid, **case.options(grid))
    if case.note or grid == WIDE:
        return found[-1:] if grid == WIDE else []
    return [found[0], found[len(found) // 2]]


TRIPLES = [
    pytest.param(case, grid, budget, id=f"{case}-{grid[0]}x{grid[1]}-{budget}")
    for case in CASES
    for grid in (SQUARE, WIDE)
    for budget in dict.fromkeys(budgets_of(case, grid))
]
FULL = [
    t for t in TRIPLES if t.values[2] == t.values[1][0] * t.values[1][1] and t.values[0].identity
]
SHRINKING = [t for t in TRIPLES if t not in FULL]


def signals_of(inputs) -> Signals:
    """All that a method may look at, from one batch of `batches`."""
    embed, text, mask, seen = inputs
    count = mask.shape[1]
    live = jnp.concatenate([jnp.asarray(mask), seen["live_text"]], axis=1)
    state = DecoderState(
        **{name: seen[name] for name in ("query", "key", "plain_query", "plain_key")},
        live=live,
        prompt=seen["live_text"],
        last=count + seen["live_text"].sum(axis=1) - 1,
        bias=jnp.zeros(live.shape),
        before=seen["before"],
        after=jnp.concatenate([jnp.asarray(embed), seen["text_after"]], axis=1),
        first_visual=seen["before"][:, :count],
        first_text=seen["text_after"],
        first_live=jnp.asarray(mask),
        scale=DEPTH**-0.5,
    )
    return Signals(
        attention_row=seen["attention_row"],
        middle_row=seen["middle_row"],
        keys=seen["keys"],
        text=text,
        hidden=embed,
        pixels=embed,
        decoder=state,
    )


@functools.cache
def compiled(case: Case, grid: tuple[int, int], budget: int, dtype: str):
    """(parameters, jitted function from a batch to (tokens out, gradients))."""
    module = build(case.name, budget=budget, grid=grid, **case.options(grid))
    module = module.clone(**dict(case.internal))

    def forward(params, embed, text, mask, seen):
        tokens = VisualTokens.from_grid(embed, grid, mask=mask)
        signals = signals_of((embed, text, mask, seen))
        out = module.apply(params, tokens, signals, rng=jax.random.key(1))
        for record in (tokens, signals, signals.decoder, out):
            check_fields(record)
        return out

    def loss(params, embed, text, mask, seen):
        out = forward(params, embed, text, mask, seen)
        weight = jnp.cos(jnp.arange(out.embed.size, dtype=jnp.float32)).reshape(out.embed.shape)
        total = jnp.sum(out.embed.astype(jnp.float32) * weight * out.mask[..., None])
        if out.bias is not None:
            total += jnp.sum(jnp.where(out.mask, out.bias, 0) * weight[..., 0])
        return total, out

    batch = sample(grid[0] * grid[1])
    batch = (jnp.asarray(batch[0], dtype), jnp.asarray(batch[1], dtype), *batch[2:])
    tokens = VisualTokens.from_grid(batch[0], grid)
    # Values from NumPy: compiling thirty initialisers would take longer than all the rest.
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens, signals_of(batch)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape) * x.shape[0] ** -0.5, shapes)
    params = jax.tree.map(jnp.float32, params)
    if case.trained:
        return params, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return params, jax.jit(lambda *inputs: ((None, forward(*inputs)), ()))


def run(case, grid, budget, inputs, dtype="float32"):
    """The tokens as NumPy arrays, and the gradients (none for a method without training)."""
    params, function = compiled(case, grid, budget, dtype)
    embed, text, mask, seen = inputs
    (_, out), gradients = function(
        params, jnp.asarray(embed, dtype), jnp.asarray(text, dtype), mask, seen
    )
    return jax.tree.map(np.asarray, out), gradients


def seen_of(rng, num_tokens, mask, levels=1000):
    """What encoder and decoder layers give, with ties if `levels` is small; padding is 0."""
    places = num_tokens + TEXT
    live_text = np.arange(TEXT) < rng.integers(1, TEXT + 1, (BATCH, 1))
    live = np.concatenate([mask, live_text], axis=1)

    def draw(where, *shape):
        values = rng.integers(-levels, levels + 1, (*where.shape, *shape)) / np.float32(levels)
        return np.where(where.reshape(*where.shape, *(1,) * len(shape)), values, 0)

    arrays = {name: draw(live, HEADS, DEPTH) for name in ("query", "plain_query")}
    arrays |= {name: draw(live, 1, DEPTH) for name in ("key", "plain_key")}
    arrays |= {name: abs(draw(mask)) for name in ("attention_row", "middle_row")}
    arrays |= {"keys": draw(mask, HEADS, DEPTH), "before": draw(live, WIDTH)}
    arrays["text_after"] = draw(live_text, WIDTH)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    assert arrays["before"].shape == (BATCH, places, WIDTH)
    return {**arrays, "live_text": live_text}


@st.composite
def batches(draw, num_tokens):
    """(embed, text, mask, seen): few values so that ties are common, any padding."""
    seed = draw(st.integers(0, 2**16))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    rng = np.random.default_rng(seed)
    embed = rng.integers(-levels, levels + 1, (BATCH, num_tokens, WIDTH)).astype(np.float32)
    if draw(st.booleans()):
        embed[:, 1:] = embed[:, :1]  # all tokens of a row are equal
    text = rng.normal(size=(BATCH, TEXT_WIDTH)).astype(np.float32)
    counts = draw(st.lists(st.integers(0, num_tokens), min_size=BATCH, max_size=BATCH))
    mask = np.zeros((BATCH, num_tokens), bool)
    for row, count in enumerate(counts):
        mask[row, rng.permutation(num_tokens)[:count]] = True
    return embed, text, mask, seen_of(rng, num_tokens, mask, levels)


def sample(num_tokens, seed=0):
    """One batch with a full row, a half padded row and a fully padded row."""
    rng = np.random.default_rng(seed)
    mask = np.ones((BATCH, num_tokens), bool)
    mask[1] = rng.permutation(num_tokens) < num_tokens // 2
    mask[2] = False
    embed = rng.normal(size=(BATCH, num_tokens, WIDTH)).astype(np.float32)
    text = rng.normal(size=(BATCH, TEXT_WIDTH)).astype(np.float32)
    return embed, text, mask, seen_of(rng, num_tokens, mask)


def poisoned(inputs, poison):
    """The same batch with `poison` in everything that padding carries."""
    embed, text, mask, seen = inputs
    live = np.concatenate([mask, seen["live_text"]], axis=1)
    of_text = {"text_after"}

    def dirty(name, value):
        where = mask if value.shape[1] == mask.shape[1] else live
        where = seen["live_text"] if name in of_text else where
        hole = ~where.reshape(*where.shape, *(1,) * (value.ndim - 2))
        return np.where(hole, np.float32(poison), value)

    changed = {n: v if n == "live_text" else dirty(n, v) for n, v in seen.items()}
    return dirty("embed", embed), text, mask, changed


def assert_same(actual: VisualTokens, expected: VisualTokens, **tolerance):
    for field in dataclasses.fields(VisualTokens):
        a, e = getattr(actual, field.name), getattr(expected, field.name)
        assert (a is None) == (e is None), field.name
        if a is not None:
            np.testing.assert_allclose(a, e, **tolerance, err_msg=field.name)


def test_every_method_has_a_case():
    # vtw keeps nothing: its one budget is 0, which has tests of its own.
    assert {case.name for case in CASES} == set(names()) - {"vtw"}


EVERY = pytest.mark.parametrize(("case", "grid", "budget"), TRIPLES)


class TestContract:
    @EVERY
    def test_holds_for_any_batch(self, case, grid, budget):
        num_tokens = grid[0] * grid[1]

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
        @given(batches(num_tokens))
        def check(inputs):
            out, gradients = run(case, grid, budget, inputs)
            self.check_shapes(out, budget, num_tokens, np.float32)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
            for row in range(BATCH):
                self.check_ledger(case, out, row, inputs[2][row], grid)

        check()
        assert compiled(case, grid, budget, "float32")[1]._cache_size() == 1

    def check_shapes(self, out, budget, num_tokens, dtype):
        assert out.embed.shape == (BATCH, budget, WIDTH)
        assert out.embed.dtype == dtype
        assert out.position.shape == (BATCH, budget, 2)
        assert out.position.dtype == np.float32
        assert out.size.shape == (BATCH, budget)
        assert out.size.dtype == np.float32
        assert out.mask.shape == (BATCH, budget)
        assert out.mask.dtype == bool
        assert out.source.shape == (BATCH, num_tokens)
        assert out.source.dtype == np.int32
        if out.bias is not None:
            assert out.bias.shape == (BATCH, budget)
            assert out.bias.dtype == np.float32

    def check_ledger(self, case, out, row, real, grid):
        source, kept, size = out.source[row], out.mask[row], out.size[row]
        budget, num_real = len(kept), int(real.sum())
        assert (size[~kept] == 0).all()
        assert (size[kept] > 0).all()
        assert (source >= -1).all()
        assert (source < budget).all()
        assert (source[~real] == -1).all(), "a padded patch has a holder"
        assert kept[source[source >= 0]].all(), "a patch is held by padding"
        if out.bias is not None:
            assert (out.bias[row][~kept] == 0).all()
        if case.kind != "merge" and not case.fewer:
            assert kept.sum() == min(budget, num_real)
        if case.kind == "select":
            assert kept.sum() == size.sum()
            patches = [int(np.flatnonzero(source == t)[0]) for t in np.flatnonzero(kept)]
            assert patches == sorted(patches), "kept tokens are not in source order"
            assert (np.bincount(source[source >= 0], minlength=budget) == kept).all()
            expected = [divmod(p, grid[1]) for p in patches]
            assert out.position[row][kept].tolist() == [list(map(float, e)) for e in expected]
            if budget < len(source):
                assert not kept[num_real:].any(), "padding stands before a real token"
        elif case.kind == "mixed":
            assert size.sum() <= num_real * (1 + 1e-5)
            assert (size[kept] >= 1 - 1e-5).all()
        else:
            assert size.sum() == pytest.approx(num_real, rel=1e-5)
            assert (source[real] >= 0).all(), "a merging method lost a patch"

    @pytest.mark.parametrize(("case", "grid", "budget"), SHRINKING)
    def test_padding_has_no_influence(self, case, grid, budget):
        inputs = sample(grid[0] * grid[1])
        clean, clean_gradients = run(case, grid, budget, inputs)
        for poison in (np.nan, np.inf, 1e30):
            out, gradients = run(case, grid, budget, poisoned(inputs, poison))
            assert_same(out, clean, rtol=0)
            jax.tree.map(np.testing.assert_array_equal, gradients, clean_gradients)
        if case.trained:
            assert not np.asarray(clean_gradients[1])[~inputs[2]].any()

    @EVERY
    def test_rows_do_not_see_each_other(self, case, grid, budget):
        inputs = sample(grid[0] * grid[1])
        order = np.array([2, 0, 1])
        straight, _ = run(case, grid, budget, inputs)
        if case.random:  # a row's draw goes with its place; its contents must not matter to others
            changed = jax.tree.map(np.copy, inputs)
            changed[0][1:], changed[2][1:] = 7.0, True
            other, _ = run(case, grid, budget, changed)
            first = jax.tree.map(lambda x: x[:1], (straight, other))
            assert_same(*first, rtol=0)
        else:
            turned, _ = run(case, grid, budget, jax.tree.map(lambda x: x[order], inputs))
            assert_same(turned, jax.tree.map(lambda x: x[order], straight), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("case", "grid", "budget"), FULL)
    def test_full_budget_is_the_identity(self, case, grid, budget):
        embed, _, mask, _ = inputs = sample(grid[0] * grid[1])
        out, _ = run(case, grid, budget, inputs)
        given_tokens = VisualTokens.from_grid(jnp.asarray(embed), grid, mask=jnp.asarray(mask))
        bias = None if out.bias is None else np.zeros_like(out.bias)
        assert_same(out, given_tokens.replace(bias=bias), rtol=0)


@pytest.mark.parametrize(("case", "grid", "budget"), [t for t in SHRINKING if t.values[1] == WIDE])
def test_bfloat16(case, grid, budget):
    inputs = sample(grid[0] * grid[1])
    out, gradients = run(case, grid, budget, inputs, "bfloat16")
    TestContract().check_shapes(out, budget, grid[0] * grid[1], jnp.bfloat16)
    leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves((out, gradients))]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    for row in range(BATCH):
        TestContract().check_ledger(case, out, row, inputs[2][row], grid)


@pytest.mark.parametrize("case", [c for c in CASES if c.trained], ids=str)
def test_one_checkpoint_serves_every_budget(case):
    shapes = set()
    inputs = sample(16)
    for budget in reachable(case.name, SQUARE, **case.options(SQUARE)):
        module = build(case.name, budget=budget, **case.options(SQUARE))
        tokens = VisualTokens.from_grid(jnp.asarray(inputs[0]), SQUARE)
        params = jax.eval_shape(module.init, jax.random.key(0), tokens, signals_of(inputs))
        shapes.add(str(jax.tree.map(lambda x: x.shape, params)))
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "names")):
            assert len(leaf.names) == len(leaf.value.shape), "a parameter without logical axes"
    assert len(shapes) == 1


@pytest.mark.parametrize("case", [c for c in CASES if c.identity], ids=str)
def test_one_patch(case):
    mask = np.array([[True], [False], [True]])
    embed = np.ones((BATCH, 1, WIDTH), np.float32)
    inputs = (embed, embed[:, 0], mask, seen_of(np.random.default_rng(0), 1, mask))
    tokens = VisualTokens.from_grid(jnp.asarray(embed), (1, 1), mask=jnp.asarray(mask))
    module = build(case.name, budget=1, **case.options((1, 1)))
    out, _ = module.init_with_output(jax.random.key(0), tokens, signals_of(inputs))
    assert out.mask.tolist() == mask.tolist()
    assert out.source.tolist() == [[0], [-1], [0]]
