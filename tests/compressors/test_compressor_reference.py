"""Every method against a plain float64 loop written from its definition."""

import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build

WIDTH, TEXT_WIDTH = 8, 6
FIELDS = ("embed", "position", "size", "mask", "source", "bias")


def batch(grid, seed, rows=4):
    """Real tokens: all, most, few, none. float32 arrays embed, text and bool mask."""
    rng = np.random.default_rng(seed)
    num_tokens = grid[0] * grid[1]
    mask = rng.random((rows, num_tokens)) < np.array([[1.1], [0.7], [0.2], [-1.0]])[:rows]
    embed = rng.normal(size=(rows, num_tokens, WIDTH)).astype(np.float32)
    return embed, rng.normal(size=(rows, TEXT_WIDTH)).astype(np.float32), mask


def apply(name, grid, inputs, budget, params=None, **options):
    """(output as NumPy, float64 parameters)."""
    embed, text, mask = inputs
    module = build(name, budget=budget, grid=grid, **options)
    tokens = VisualTokens.from_grid(jnp.asarray(embed), grid, mask=jnp.asarray(mask))
    signals = Signals(text=jnp.asarray(text))
    params = params or parameters(module, tokens, signals)
    out = jax.jit(module.apply)({"params": params}, tokens, signals)
    return jax.tree.map(np.asarray, out), {k: np.float64(v) for k, v in params.items()}


def parameters(module, tokens, signals):
    """Random float32 parameters of the right shapes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, signals)
    rng = np.random.default_rng(3)

    def draw(x):
        return (rng.normal(size=x.shape) * x.shape[0] ** -0.5).astype(np.float32)

    return jax.tree.map(draw, nn.unbox(shapes).get("params", {}))


def assert_row(out, row, expected):
    for field in FIELDS:
        if field in expected:
            actual = getattr(out, field)[row]
            np.testing.assert_allclose(
                actual, expected[field], rtol=2e-5, atol=2e-5, err_msg=f"{field}, row {row}"
            )


def blank(budget, num_tokens, width=WIDTH):
    return {
        "embed": np.zeros((budget, width)),
        "position": np.zeros((budget, 2)),
        "size": np.zeros(budget),
        "mask": np.zeros(budget, bool),
        "source": np.full(num_tokens, -1),
    }


def kept(embed, mask, grid, chosen, budget):
    """The row that holds the patches `chosen`, in source order."""
    row = blank(budget, len(mask))
    for slot, patch in enumerate(sorted(chosen)):
        row["embed"][slot] = embed[patch]
        row["position"][slot] = (patch // grid[1], patch % grid[1])
        row["size"][slot], row["mask"][slot] = 1, True
        row["source"][patch] = slot
    return row


def area_mean(embed, mask, grid, cells):
    """Area resampling by cutting every patch into equal crumbs, each wholly inside one cell."""
    row = blank(cells[0] * cells[1], len(mask))
    (h, w), (ch, cw) = grid, cells
    area = np.zeros((ch * cw, h * w))
    for y in range(h * ch):  # ch crumbs to a patch, h crumbs to a cell
        for x in range(w * cw):
            area[(y // h) * cw + x // w, (y // ch) * w + x // cw] += 1
    area /= ch * cw
    for cell in range(ch * cw):
        for patch in range(h * w):
            if mask[patch] and area[cell, patch]:
                row["mask"][cell] = True
                row["size"][cell] += area[cell, patch]
                row["embed"][cell] += area[cell, patch] * np.float64(embed[patch])
                row["position"][cell] += area[cell, patch] * np.array(divmod(patch, w))
        if row["mask"][cell]:
            row["embed"][cell] /= row["size"][cell]
            row["position"][cell] /= row["size"][cell]
    for patch in np.flatnonzero(mask):
        row["source"][patch] = max(range(ch * cw), key=lambda c: (round(area[c, patch], 9), -c))
    return row


@pytest.mark.parametrize(
    ("name", "grid", "budget", "cells"),
    [
        ("average_pool", (6, 6), 9, (3, 3)),
        ("average_pool", (6, 6), 1, (1, 1)),
        ("average_pool", (4, 6), 6, (2, 3)),
        ("average_pool", (2, 6), 4, (2, 2)),  # 1 x 3 cells: no square ones give 4
        ("downsample", (4, 4), 4, (2, 2)),
        ("downsample", (4, 4), 9, (3, 3)),
        ("downsample", (5, 5), 4, (2, 2)),
        ("downsample", (7, 7), 36, (6, 6)),
        ("downsample", (4, 6), 6, (2, 3)),
        ("pool", (6, 6), 9, (3, 3)),
        ("pool", (4, 4), 6, (2, 3)),  # bands of equal cells: area resampling
    ],
)
def test_grid_means(name, grid, budget, cells):
    inputs = embed, _, mask = batch(grid, seed=budget)
    out, _ = apply(name, grid, inputs, budget)
    for row in range(len(mask)):
        assert_row(out, row, area_mean(embed[row], mask[row], grid, cells))


@pytest.mark.parametrize(("grid", "side"), [((4, 4), 2), ((4, 4), 4), ((2, 6), 2)])
@pytest.mark.parametrize("features", [None, 5])
def test_pixel_shuffle(grid, side, features):
    inputs = embed, _, mask = batch(grid, seed=side)
    cells = (grid[0] // side, grid[1] // side)
    out, params = apply("pixel_shuffle", grid, inputs, cells[0] * cells[1], features=features)
    kernel = params[f"kernel_{side}x{side}"]
    for row in range(len(mask)):
        expected = area_mean(embed[row], mask[row], grid, cells)
        expected["embed"] = np.zeros((cells[0] * cells[1], features or WIDTH))
        for cell in range(cells[0] * cells[1]):
            top, left = cell // cells[1] * side, cell % cells[1] * side
            channels = []
            for dy in range(side):
                for dx in range(side):
                    patch = (top + dy) * grid[1] + left + dx
                    channels.extend(embed[row, patch] if mask[row, patch] else np.zeros(WIDTH))
            expected["embed"][cell] = np.array(channels) @ kernel
        assert_row(out, row, expected)


def test_pixel_shuffle_changes_the_width_at_the_full_budget():
    inputs = embed, _, mask = batch((2, 2), seed=0)
    out, params = apply("pixel_shuffle", (2, 2), inputs, 4, features=5)
    real = np.where(mask[..., None], np.float64(embed), 0)
    np.testing.assert_allclose(out.embed, real @ params["kernel_1x1"], atol=1e-5)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def resampled(embed, mask, grid, budget, heads, params):
    row, real = blank(budget, len(mask)), np.flatnonzero(mask)
    depth = WIDTH // heads
    position = np.array([divmod(p, grid[1]) for p in real], float).reshape(-1, 2)
    x = np.float64(embed[real])
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    code = np.zeros_like(x)
    quarter = WIDTH // 4
    for n, (r, c) in enumerate(position):
        for i in range(quarter):
            w = 10000 ** (-i / quarter)
            code[n, i], code[n, quarter + i] = math.sin(r * w), math.cos(r * w)
            code[n, 2 * quarter + i], code[n, 3 * quarter + i] = math.sin(c * w), math.cos(c * w)
    keys, values = (x + code) @ params["resampler_key"], x @ params["resampler_value"]
    live = min(budget, len(real))
    attention = np.zeros((live, len(real)))
    for t in range(live):
        query = params["queries"][t] @ params["resampler_query"]
        mixed = np.zeros(WIDTH)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            a = softmax(keys[:, part] @ query[part] / math.sqrt(depth))
            mixed[part] = a @ values[:, part]
            attention[t] += a / heads
        row["embed"][t] = params["queries"][t] + mixed @ params["resampler_out"]
        row["position"][t] = attention[t] @ position
        row["mask"][t] = True
    for n, patch in enumerate(real):
        row["size"][:live] += attention[:, n] / attention[:, n].sum()
        row["source"][patch] = int(np.argmax(attention[:, n]))
    return row


@pytest.mark.parametrize(("grid", "budget", "heads"), [((4, 4), 6, 2), ((2, 6), 1, 1)])
def test_resampler(grid, budget, heads):
    inputs = embed, _, mask = batch(grid, seed=1)
    out, params = apply("resampler", grid, inputs, budget, num_queries=7, num_heads=heads)
    for row in range(len(mask)):
        assert_row(out, row, resampled(embed[row], mask[row], grid, budget, heads, params))


def test_resampler_queries_are_nested():
    grid = (4, 4)
    inputs = batch(grid, seed=2)
    long, params = apply("resampler", grid, inputs, 7, num_queries=7)
    short, _ = apply("resampler", grid, inputs, 3, params, num_queries=7)
    np.testing.assert_allclose(short.embed, long.embed[:, :3], atol=1e-6)


@pytest.mark.parametrize("budget", [1, 3, 5, 11, 15])
def test_stride(budget):
    grid = (4, 4)
    inputs = embed, _, mask = batch(grid, seed=budget)
    out, _ = apply("stride", grid, inputs, budget)
    for row in range(len(mask)):
        real = np.flatnonzero(mask[row])
        chosen = list(real)
        if len(real) > budget:
            middles = [(j + Fraction(1, 2)) * len(real) / budget for j in range(budget)]
            chosen = [real[math.floor(m)] for m in middles]
        assert_row(out, row, kept(embed[row], mask[row], grid, chosen, budget))


def relevance(embed, text, params, heads):
    """Scores of every token of one row."""

    def normal(v):
        v = np.float64(v)
        return v / np.sqrt((v**2).mean() + 1e-6)

    query = (normal(text) @ params["query"]).reshape(heads, -1)
    scores = []
    for token in embed:
        key = (normal(token) @ params["key"]).reshape(heads, -1)
        each = [query[h] @ key[h] / math.sqrt(len(key[h])) for h in range(heads)]
        scores.append(each[0] if heads == 1 else math.log(sum(map(math.exp, each)) / heads))
    return np.array(scores)


@pytest.mark.parametrize("bias", ["add", "straight_through", "none"])
@pytest.mark.parametrize(("heads", "dim"), [(1, None), (2, 10)])
def test_text_topk(bias, heads, dim):
    grid, budget = (4, 4), 5
    inputs = embed, text, mask = batch(grid, seed=heads)
    options = {"bias": bias, "num_heads": heads, "dim": dim}
    out, params = apply("text_topk", grid, inputs, budget, **options)
    assert (out.bias is None) == (bias == "none")
    for row in range(len(mask)):
        scores = relevance(embed[row], text[row], params, heads)
        assert np.diff(np.sort(scores)).min() > 1e-5, "the case must not hang on rounding"
        best = sorted(np.flatnonzero(mask[row]), key=lambda p: -scores[p])[:budget]
        expected = kept(embed[row], mask[row], grid, best, budget)
        if bias != "none":
            expected["bias"] = np.zeros(budget)
        # A row within the budget is what it is alone, at its full budget: nothing is added.
        if bias == "add" and mask[row].sum() > budget:
            expected["bias"][: len(best)] = scores[sorted(best)]
        assert_row(out, row, expected)


@pytest.mark.parametrize(
    ("bias", "budget"), [("add", 5), ("straight_through", 5), ("add", 16), ("straight_through", 16)]
)
def test_text_topk_gradient_is_that_of_the_scores(bias, budget):
    """Central differences of the float64 scores of the kept tokens, whatever the bias's value."""
    grid = (4, 4)
    embed, text, mask = batch(grid, seed=4, rows=2)
    module = build("text_topk", budget=budget, bias=bias)
    tokens = VisualTokens.from_grid(jnp.asarray(embed), grid, mask=jnp.asarray(mask))
    signals = Signals(text=jnp.asarray(text))
    variables = parameters(module, tokens, signals)
    weight = np.random.default_rng(0).normal(size=(2, 16)) * mask  # per patch

    def total(params):
        out = module.apply({"params": params}, tokens, signals)
        each = jnp.take_along_axis(out.bias, jnp.maximum(out.source, 0), axis=1)
        return jnp.sum(jnp.where(out.source >= 0, each * weight, 0)), out

    gradient, out = jax.jit(jax.grad(total, has_aux=True))(variables)
    weight = np.where(np.asarray(out.source) >= 0, weight, 0)
    params = {k: np.float64(v) for k, v in variables.items()}
    for name, place in (("query", (1, 2)), ("key", (3, 0)), ("key", (7, 5))):
        values = []
        for step in (1e-5, -1e-5):
            moved = {k: v.copy() for k, v in params.items()}
            moved[name][place] += step
            values.append(sum(weight[b] @ relevance(embed[b], text[b], moved, 1) for b in (0, 1)))
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(gradient[name][place], slope, rtol=1e-3, atol=1e-5)
