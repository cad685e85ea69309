"""visionzip, fastervlm, vispruner, prumerge(_plus), hiprune against loops over tokens."""

import attention_method_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build
from efficient_vlm.compressors.between import vispruner
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError

GRID, WIDTH, HEADS = (4, 6), 8, 2
N = GRID[0] * GRID[1]
KINDS = ("random", "ties", "equal", "duplicates", "outliers")


def draw(kind, seed, rows=6):
    """Arrays of `rows` images, from all real to none real; padding holds NaN."""
    rng = np.random.default_rng(seed)
    embed = rng.normal(size=(rows, N, WIDTH))
    keys = rng.normal(size=(rows, N, HEADS, WIDTH // HEADS))
    row, middle = rng.random((2, rows, N)) / N
    if kind == "ties":  # entries of +-1 have equal lengths, so cosines are multiples of 1/4 or 1/8
        embed = rng.choice([-1.0, 1.0], embed.shape)
        keys = np.repeat(rng.choice([-1.0, 1.0], (rows, N, 1, WIDTH // HEADS)), HEADS, axis=2)
        row, middle = rng.integers(0, 3, (2, rows, N)) / 64
    if kind == "equal":
        embed, keys = embed[:, :1] + np.zeros((1, N, 1)), keys[:, :1] + np.zeros((1, N, 1, 1))
        row, middle = np.full((2, rows, N), 1 / 32)
    if kind == "duplicates":
        twin = rng.integers(0, 6, (rows, N))
        pool = rng.choice([-1.0, 1.0], (rows, 6, WIDTH))
        embed = np.take_along_axis(pool, twin[..., None], axis=1)
        half = np.tile(pool[..., : WIDTH // HEADS], (1, 1, HEADS))
        keys = np.take_along_axis(half, twin[..., None], axis=1).reshape(keys.shape)
        row = np.take_along_axis(rng.integers(0, 9, (rows, 6)) / 64, twin, axis=1)
    if kind == "outliers":
        row = np.exp(2 * rng.normal(size=(rows, N)))
        row /= row.sum(axis=1, keepdims=True)
    real = np.array([N, N - 1, N // 2, 5, 1, 0])[:rows]
    mask = np.argsort(rng.random((rows, N)), axis=1) < real[:, None]
    arrays = {"embed": embed, "keys": keys, "row": row, "middle": middle}
    for name, value in arrays.items():
        shape = mask.shape + (1,) * (value.ndim - 2)
        arrays[name] = np.where(mask.reshape(shape), value, np.nan).astype(np.float32)
    arrays["mask"] = mask
    arrays["size"] = np.where(mask, rng.integers(1, 4, (rows, N)), 0).astype(np.float32)
    return arrays


def compiled(name, budget, **options):
    module = build(name, budget=budget, grid=GRID, **options)

    def forward(arrays):
        tokens = VisualTokens.from_grid(arrays["embed"], GRID, mask=arrays["mask"])
        tokens = tokens.replace(size=arrays["size"])
        signals = Signals(
            attention_row=arrays["row"], middle_row=arrays["middle"], keys=arrays["keys"]
        )
        return module.apply({}, tokens, signals)

    return jax.jit(forward)


def check(out, arrays, expected_of, budget):
    out = jax.tree.map(np.asarray, out)
    for b in range(len(arrays["mask"])):
        case = {k: v[b] for k, v in arrays.items()}
        expected = expected_of(case)
        assert len(expected) <= budget
        count = len(expected)
        assert out.mask[b].tolist() == [True] * count + [False] * (budget - count)
        source = np.full(N, -1)
        for slot, token in enumerate(expected):
            source[token["members"]] = slot
            sizes = np.float64(case["size"][token["members"]])
            places = np.array([divmod(i, GRID[1]) for i in token["members"]], float)
            np.testing.assert_allclose(out.embed[b, slot], token["embed"], rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(out.size[b, slot], sizes.sum(), rtol=1e-6)
            mean = (sizes[:, None] * places).sum(axis=0) / sizes.sum()
            np.testing.assert_allclose(out.position[b, slot], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(out.source[b], source)
        for field in (out.embed, out.size, out.position):
            assert not field[b, count:].any()


def drive(name, budget, loop, options, kinds=KINDS, seeds=2):
    forward = compiled(name, budget, **options)
    for kind in kinds:
        for seed in range(seeds):
            arrays = draw(kind, seed)
            check(forward(arrays), arrays, loop, budget)
    assert forward._cache_size() == 1


@pytest.mark.parametrize("budget", [1, 9])
def test_fastervlm(budget):
    drive("fastervlm", budget, lambda case: loops.fastervlm(case, budget), {})


@pytest.mark.parametrize(
    ("budget", "contextual", "options"),
    [
        (1, 0, {}),
        (2, 1, {}),
        (N - 1, 4, {}),
        (9, 5, {"contextual": 5}),
        (9, 5, {"contextual": 0.5, "merge": "mean"}),
        (7, 7, {"contextual": 7}),
    ],
)
def test_visionzip(budget, contextual, options):
    merge = options.get("merge", "published")
    drive(
        "visionzip",
        budget,
        lambda case: loops.visionzip(case, budget, contextual, merge),
        options,
    )


def test_visionzip_splits_its_budget_as_published():
    split = {t: build("visionzip", budget=t).num_contextual() for t in (64, 128, 192)}
    assert split == {64: 10, 128: 20, 192: 30}


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (1, {}),
        (9, {"round_size": 3}),
        (12, {"important": 0.0, "round_size": 2}),
        (6, {"important": 1.0}),
        (N - 1, {}),
    ],
)
def test_vispruner(budget, options):
    drive("vispruner", budget, lambda case: loops.vispruner(case, budget, **options), options)


def test_vispruner_rounds_at_the_published_geometry():
    for budget in (32, 64, 128, 192):  # N - T_imp listed, 8 fewer in each round
        listed = 576 - budget // 2
        assert vispruner.num_rounds(listed, budget // 2, 8) == -(-(576 - budget) // 8)


PRUMERGE = [
    ("prumerge", 1, {}),
    ("prumerge", 9, {"neighbours": 4, "extra": True}),
    ("prumerge", 3, {"adaptive": True, "neighbours": 5}),
    ("prumerge", N, {"adaptive": True, "extra": True}),
    ("prumerge", N - 1, {"neighbours": 2, "weights": "normalised"}),
    ("prumerge_plus", 1, {"neighbours": 3}),
    ("prumerge_plus", 9, {"share": 0.5, "extra": True, "weights": "normalised"}),
    ("prumerge_plus", N - 1, {"neighbours": 0}),
    ("prumerge_plus", 5, {"adaptive": True, "extra": True, "neighbours": 5}),
    ("prumerge_plus", N, {"adaptive": True}),
]


@pytest.mark.parametrize(("name", "budget", "options"), PRUMERGE)
def test_prumerge(name, budget, options):
    plain = {"near" if k == "neighbours" else k: v for k, v in options.items()}

    def loop(case):
        return loops.prumerge(case, budget, plus=name == "prumerge_plus", **plain)

    drive(name, budget, loop, options)


@pytest.mark.parametrize(
    ("border", "budget", "alpha"),
    [("wrap", 9, 0.1), ("wrap", 10, 0.5), ("stop", 10, 0.5), ("wrap", 3, 1.0), ("stop", 23, 0.8)],
)
def test_hiprune(border, budget, alpha):
    drive(
        "hiprune",
        budget,
        lambda case: loops.hiprune(case, budget, GRID, alpha, border),
        {"alpha": alpha, "border": border},
    )


METHODS = {
    "fastervlm": {},
    "visionzip": {"head_dim": WIDTH // HEADS},
    "vispruner": {},
    "prumerge": {"neighbours": 4, "extra": True},
    "prumerge_plus": {"neighbours": 4},
    "hiprune": {"alpha": 0.6},
}
EACH = pytest.mark.parametrize("name", METHODS)


@EACH
def test_full_budget_is_the_identity_and_signals_are_checked(name):
    arrays = draw("random", 0)
    tokens = VisualTokens.from_grid(arrays["embed"], GRID, mask=arrays["mask"])
    module = build(name, budget=N, grid=GRID)
    full = {"attention_row": 0, "middle_row": 0, "keys": 0}
    assert module.apply({}, tokens, Signals(**full)) is tokens
    for missing in module.needs:
        with pytest.raises(UserError, match=missing):
            module.apply({}, tokens, Signals(**{k: v for k, v in full.items() if k != missing}))


@EACH
def test_bfloat16_and_gradients_behind_padding(name):
    arrays = draw("random", 1)
    module = build(name, budget=7, grid=GRID, **METHODS[name])

    @jax.jit
    @jax.value_and_grad
    def loss(embed, keys):
        tokens = VisualTokens.from_grid(embed, GRID, mask=arrays["mask"])
        signals = Signals(attention_row=arrays["row"], middle_row=arrays["middle"], keys=keys)
        out = module.apply({}, tokens, signals)
        assert out.embed.dtype == embed.dtype
        return jnp.sum(jnp.square(out.embed.astype(jnp.float32)))

    bf16 = jnp.bfloat16
    value, gradient = loss(jnp.asarray(arrays["embed"], bf16), jnp.asarray(arrays["keys"], bf16))
    assert np.isfinite(value)
    gradient = np.asarray(gradient, np.float32)
    assert np.isfinite(gradient).all()
    assert not gradient[~arrays["mask"]].any()
    assert gradient[arrays["mask"]].any()


@EACH
@pytest.mark.parametrize("budget", [1, 7, N])
def test_flops_are_those_of_the_traced_program(name, budget):
    variants = [METHODS[name]]
    if name == "visionzip":
        variants += [{**METHODS[name], "merge": "mean"}, {"contextual": 0}]
    if name.startswith("prumerge"):
        variants += [{"adaptive": True}, {"neighbours": 0}]
    for options in variants:
        module = build(name, budget=budget, grid=GRID, **options)
        tokens = VisualTokens.from_grid(jnp.zeros((1, N, WIDTH)), GRID)
        signals = Signals(
            attention_row=jnp.zeros((1, N)),
            middle_row=jnp.zeros((1, N)),
            keys=jnp.zeros((1, N, HEADS, WIDTH // HEADS)),
        )
        counted = traced_flops(lambda t, s, m=module: m.apply({}, t, s), tokens, signals)
        assert module.flops(N, WIDTH) == counted, options


def test_what_is_asked_of_the_encoder():
    def asked(name, **options):
        return build(name, budget=4, **options).intermediates()

    assert asked("fastervlm") == {"attention_row": "cls_row/-1"}
    assert asked("vispruner", attention="mean_query", layer=3) == {
        "attention_row": "mean_query_row/3"
    }
    assert asked("visionzip", layer=-2) == {"attention_row": "cls_row/-2", "keys": "keys/-2"}
    assert asked("prumerge") == {"attention_row": "cls_row_full/-1", "keys": "keys/-1"}
    assert asked("prumerge_plus", attention="column_mean") == {
        "attention_row": "column_mean/-1",
        "keys": "keys/-1",
    }
    assert asked("hiprune") == {"attention_row": "column_mean/-1", "middle_row": "column_mean/9"}
    for name in METHODS:
        module = build(name, budget=4)
        assert module.position_policy == "reindex"
        assert set(module.intermediates()) == module.needs


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("fastervlm", "attention", "clss"),
        ("fastervlm", "layer", 1.5),
        ("fastervlm", "layer", True),
        ("visionzip", "contextual", -1),
        ("visionzip", "contextual", 1.0),
        ("visionzip", "contextual", True),
        ("visionzip", "merge", "sum"),
        ("visionzip", "head_dim", 0),
        ("vispruner", "important", 1.5),
        ("vispruner", "important", "half"),
        ("vispruner", "round_size", 0),
        ("prumerge", "adaptive", 1),
        ("prumerge", "extra", "yes"),
        ("prumerge", "weights", "mean"),
        ("prumerge", "neighbours", -1),
        ("prumerge_plus", "share", 2),
        ("hiprune", "alpha", -0.1),
        ("hiprune", "border", "clamp"),
        ("hiprune", "middle_layer", 1.5),
        ("hiprune", "middle_layer", "9"),
    ],
)
def test_wrong_options(name, field, value):
    with pytest.raises(UserError, match=rf"compressor\.{field}"):
        build(name, budget=4, **{field: value})


def test_a_budget_below_the_merged_tokens_names_what_can_be_reached():
    tokens = VisualTokens.from_grid(jnp.zeros((1, N, WIDTH)), GRID)
    with pytest.raises(UserError, match="5 to 24"):
        build("visionzip", budget=4, contextual=5, grid=GRID).apply({}, tokens, Signals())
