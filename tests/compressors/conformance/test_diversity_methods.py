"""divprune, cdpruner and scope against plain loops, and what their docstrings promise."""

import functools

import diversity_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build, select
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError

GRID, WIDTH = (4, 5), 8
NUM_TOKENS = 20
METHODS = [
    ("divprune", {}),
    ("divprune", {"order": "selection"}),
    ("cdpruner", {}),
    ("cdpruner", {"relevance": "positive"}),
    ("cdpruner", {"relevance": "none"}),
    ("scope", {}),
    ("scope", {"alpha": 0.0}),
    ("scope", {"alpha": 2.5, "attention": "column_mean"}),
]


@functools.cache
def compiled(name, budget, options):
    module = build(name, budget=budget, grid=GRID, **dict(options))

    def function(embed, text, attention, mask):
        tokens = VisualTokens.from_grid(embed, GRID, mask=mask)
        return module.apply({}, tokens, Signals(text=text, attention_row=attention))

    return jax.jit(function)


def compress(name, budget, batch, dtype=jnp.float32, **options):
    embed, text, attention, mask = batch
    # What stands in padding must not matter: poison.
    embed = np.where(mask[..., None], embed, np.nan)
    attention = np.where(mask, attention, np.inf)
    function = compiled(name, budget, tuple(options.items()))
    out = function(jnp.asarray(embed, dtype), np.float32(text), np.float32(attention), mask)
    return jax.tree.map(np.asarray, out)


def choose(name, options, cos, embed, text, attention, budget):
    if name == "divprune":
        return loops.divprune(cos, budget)
    if name == "scope":
        return loops.scope(cos, np.float64(attention), options.get("alpha", 1.0), budget)
    sign = {"negative": -1, "positive": 1, "none": 0}[options.get("relevance", "negative")]
    relevance = [sign * loops.cosine(x, np.float64(text)) for x in np.float64(embed)]
    return loops.cdpruner(cos, loops.min_max(relevance), budget)


def check_row(out, row, chosen, embed, budget):
    """`chosen`: patches in the order of the output's slots."""
    kept = len(chosen)
    assert out.mask[row].tolist() == [True] * kept + [False] * (budget - kept)
    assert out.size[row].tolist() == [1.0] * kept + [0.0] * (budget - kept)
    source = np.full(len(embed), -1)
    for slot, patch in enumerate(chosen):
        source[patch] = slot
        assert out.position[row, slot].tolist() == list(divmod(patch, GRID[1]))
        assert (out.embed[row, slot] == embed[patch]).all()
    assert out.source[row].tolist() == source.tolist()
    assert not out.embed[row, kept:].any()
    assert not out.position[row, kept:].any()


@pytest.mark.parametrize(
    ("name", "options", "budget"),
    [(*m, b) for m in METHODS for b in (1, 6, NUM_TOKENS - 1) if not m[1] or b == 6],
    ids=str,
)
def test_agrees_with_the_loop(name, options, budget):
    rows, doubtful = 0, 0
    batches = [loops.hard_batch(NUM_TOKENS, WIDTH, seed) for seed in range(2)]
    for batch in batches:
        out = compress(name, budget, batch, **options)
        for row, (embed, text, attention, mask) in enumerate(zip(*batch, strict=True)):
            real = np.flatnonzero(mask)
            cos = loops.cosines(embed[real])
            arguments = embed[real], text, attention[real], budget
            chosen = choose(name, options, cos, *arguments)
            rows += 1
            if choose(name, options, loops.noisy(cos, row), *arguments) != chosen:
                doubtful += 1
                continue
            chosen = [int(real[i]) for i in chosen]
            if options.get("order") != "selection" or len(real) <= budget:
                chosen = sorted(chosen)
            check_row(out, row, chosen, embed, budget)
    assert doubtful <= rows // 8, "too many cases hang on rounding"


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_full_budget_is_the_identity(name, options):
    batch = loops.hard_batch(NUM_TOKENS, WIDTH, 0)
    out = compress(name, NUM_TOKENS, batch, **options)
    for row, (embed, mask) in enumerate(zip(batch[0], batch[3], strict=True)):
        assert (out.embed[row][mask] == embed[mask]).all()
        assert (out.mask[row] == mask).all()
        assert (out.source[row] == np.where(mask, np.arange(NUM_TOKENS), -1)).all()


@pytest.mark.parametrize(("name", "options"), [m for m in METHODS if not m[1]], ids=str)
def test_bfloat16(name, options):
    embed, text, attention, mask = loops.hard_batch(NUM_TOKENS, WIDTH, 0)
    embed = np.array(jnp.asarray(embed, jnp.bfloat16).astype(jnp.float32))
    batch = embed, text, attention, mask
    half = compress(name, 6, batch, jnp.bfloat16, **options)
    full = compress(name, 6, batch, **options)
    assert half.embed.dtype == jnp.bfloat16
    assert (half.source == full.source).all(), "scores must be float32 whatever the input"
    assert (half.embed.astype(np.float32) == full.embed).all()


@pytest.mark.parametrize(
    ("name", "options"), [m for m in METHODS if not m[1] or m[1].get("alpha") == 0], ids=str
)
def test_equal_tokens_go_to_the_lowest_index(name, options):
    """Of width 1000, so that the order of summation does matter."""
    embed = np.repeat(np.random.default_rng(0).normal(size=(2, 1, 1000)), NUM_TOKENS, axis=1)
    text = np.random.default_rng(1).normal(size=(2, 1000))
    mask = np.ones((2, NUM_TOKENS), bool)
    mask[1, [0, 3]] = False
    attention = np.full((2, NUM_TOKENS), 0.05)
    out = compress(name, 7, (embed, text, attention, mask), **options)
    for row in range(2):
        assert (
            np.flatnonzero(out.source[row] >= 0).tolist() == np.flatnonzero(mask[row])[:7].tolist()
        )


def test_divprune_in_blocks_of_rows(monkeypatch):
    batch = loops.hard_batch(NUM_TOKENS, WIDTH, 0)
    whole = compress("divprune", 6, batch)
    monkeypatch.setattr(select, "NEAREST_BLOCK", 7)
    compiled.cache_clear()
    blocks = compress("divprune", 6, batch)
    compiled.cache_clear()
    assert (whole.source == blocks.source).all()
    counted = select.max_min_flops(NUM_TOKENS, WIDTH, 6)
    assert counted == 2 * NUM_TOKENS * WIDTH * (3 * 7 + 6)


def test_map_dpp_maximises_each_determinant_up_to_the_rank_and_beyond():
    """More tokens than dimensions: still the whole budget, all distinct."""
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(1, 12, 3))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    ones = jnp.ones((1, 12))
    select_all = jax.jit(select.map_dpp, static_argnums=3)
    indices, valid = select_all(jnp.float32(unit), ones, ones > 0, 12)
    assert valid.all()
    assert sorted(indices[0].tolist()) == list(range(12))
    first = indices[0, :3].tolist()
    assert np.linalg.det(unit[0, first] @ unit[0, first].T) > 0.1


def test_cdpruner_follows_the_question():
    """Two groups of tokens, each along another axis: the question decides which one stays."""
    rng = np.random.default_rng(0)
    embed = rng.normal(size=(2, NUM_TOKENS, WIDTH)) * 0.3
    embed[:, :10, 0] += 3
    embed[:, 10:, 1] += 3
    text = np.eye(WIDTH)[[0, 1]]
    batch = embed, text, np.zeros((2, NUM_TOKENS)), np.ones((2, NUM_TOKENS), bool)
    out = compress("cdpruner", 6, batch, relevance="positive")
    share = [(out.source[row, :10] >= 0).sum() for row in range(2)]
    assert share[0] > 4 > 2 > share[1]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
@pytest.mark.parametrize("budget", [5, NUM_TOKENS])
def test_flops(name, options, budget):
    module = build(name, budget=budget, **options, grid=GRID)
    tokens = VisualTokens.from_grid(jnp.zeros((1, NUM_TOKENS, WIDTH)), GRID)
    signals = Signals(text=jnp.zeros((1, WIDTH)), attention_row=jnp.zeros((1, NUM_TOKENS)))
    counted = traced_flops(lambda t, s: module.apply({}, t, s), tokens, signals)
    assert counted == module.flops(NUM_TOKENS, WIDTH, WIDTH)


def test_no_gradient_but_through_the_kept_tokens():
    embed, text, _, mask = loops.hard_batch(NUM_TOKENS, WIDTH, 0)

    def loss(embed, text):
        tokens = VisualTokens.from_grid(embed, GRID, mask=mask)
        out = build("cdpruner", budget=6).apply({}, tokens, Signals(text=text))
        return out.embed.sum(), out.source

    (by_embed, by_text), source = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.where(mask[..., None], embed, jnp.nan), text
    )
    assert (by_embed == (source >= 0)[..., None]).all()
    assert not by_text.any()


def test_declarations():
    assert build("cdpruner", budget=4).needs == {"text"}
    assert build("cdpruner", budget=4, relevance="none").needs == frozenset()
    assert not build("cdpruner", budget=4, relevance="none").text_guided
    assert build("cdpruner", budget=4, relevance="none").clone().needs == frozenset()
    assert build("scope", budget=4).intermediates() == {"attention_row": "cls_row/-1"}
    other = build("scope", budget=4, attention="mean_query", layer=2)
    assert other.intermediates() == {"attention_row": "mean_query_row/2"}
    for name in ("divprune", "cdpruner", "scope"):
        assert build(name, budget=4).position_policy == "reindex"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("divprune", {"order": "sort"}, "compressor.order"),
        ("cdpruner", {"relevance": "cosine"}, "compressor.relevance"),
        ("scope", {"alpha": -1.0}, "compressor.alpha"),
        ("scope", {"alpha": "1"}, "compressor.alpha"),
        ("scope", {"attention": "clss"}, "compressor.attention"),
        ("scope", {"layer": 1.5}, "compressor.layer"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, budget=4, **options)


def test_bad_calls():
    tokens = VisualTokens.from_grid(jnp.ones((1, NUM_TOKENS, WIDTH)), GRID)
    with pytest.raises(UserError, match="width 3, but the tokens have 8"):
        build("cdpruner", budget=4).apply({}, tokens, Signals(text=jnp.ones((1, 3))))
    with pytest.raises(UserError, match="signals.text"):
        build("cdpruner", budget=4).apply({}, tokens)
    with pytest.raises(UserError, match="signals.attention_row"):
        build("scope", budget=4).apply({}, tokens)
    with pytest.raises(UserError, match="cannot give 21"):
        build("divprune", budget=21).apply({}, tokens)
