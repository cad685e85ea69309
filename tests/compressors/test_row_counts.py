"""What methods inside the decoder leave of a row depends on its own tokens, not on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.compressors import Signals, VisualTokens, build, fold, grids
from efficient_vlm.errors import UserError

LAYERS, MOST = 6, 40
METHODS = {
    "fastv": [dict(layer=1, keep=0.5), dict(layer=1, keep=7), dict(layer=1, budget=7)],
    "dart": [dict(layer=1)],
    "pyramiddrop": [{}, dict(layers=(1, 2), keep=(0.5, 0.45)), dict(layers=(1, 2), keep=(9, 4))],
    "v2drop": [{}, dict(layers=(1, 2), keep=(0.6, 0.5))],
    "sparsevlm": [
        {},
        dict(budget=20),
        dict(version="2.0", budget=30),
        dict(layers=(1, 2), keep=(0.6, 0.3)),
        dict(layers=(1, 2), keep=(8, 4), recycle=0.0),
    ],
    "fitprune": [{}, dict(rate=0.4, schedule="geometric"), dict(counts=(0.9, 0.5, 0.4, 0.3, 0.1))],
    "feather": [dict(stride=0), dict(stride=0, keep=12)],
}


def alone(method, total):
    """Layer -> tokens behind it, of a row that has no neighbours."""
    stages = method.stages(LAYERS, total)
    left, counts = total, {}
    by_layer = {stage.layer: stage.module.budget for stage in stages}
    for layer in range(1, LAYERS):
        counts[layer] = left = by_layer.get(layer, left)
    return counts


def beside(stages, total):
    left, counts = total, {}
    by_layer = {stage.layer: stage.module.row_counts(MOST)[total] for stage in stages}
    for layer in range(1, LAYERS):
        counts[layer] = left = by_layer.get(layer, left)
    return counts


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in METHODS.items() for options in several],
    ids=str,
)
def test_of_every_length(name, options):
    """In a batch of rows of up to 40 tokens each keeps what the same method keeps of it alone."""
    method = build(name, parent=None, **options)
    stages = method.clone(uneven=True).stages(LAYERS, MOST)
    assert stages
    for total in range(1, MOST + 1):
        # `request.capped`: a count above the tokens of a row is all of them.
        own = {k: _capped(v, total) for k, v in options.items() if k in _COUNTS}
        try:
            found = alone(build(name, parent=None, **{**options, **own}), total)
        except UserError:  # A mean of tokens that a row so short cannot have.
            assert name == "sparsevlm" and options.get("budget", total // 3) < 3 * total
            continue
        assert beside(stages, total) == found
        for stage in stages:
            assert stage.module.row_counts(MOST)[total] <= stage.module.budget


_COUNTS = ("budget", "keep", "counts")


def _capped(value, most):
    if isinstance(value, tuple):
        return tuple(_capped(v, most) for v in value)
    return min(value, most) if isinstance(value, int) else value


def test_full_rows_have_the_stages_that_they_had():
    """Published schedules and the ledger speak of full rows."""
    stages = build("sparsevlm", budget=192, parent=None).stages(32, 576)
    assert [stage.module.budget for stage in stages] == [309, 204, 113]
    for stage in stages:
        assert stage.module.row_counts(576)[576] == stage.module.budget


@pytest.mark.parametrize("budget", [1, 6, 7, 29])
def test_cells_of_a_picture_in_a_padded_grid(budget):
    """`pool` of pictures of every size in the corner of one grid, by the cells of each alone."""
    grid = (5, 6)
    sizes = [(h, w) for h in range(1, 6) for w in range(1, 7)]
    places = [np.arange(30).reshape(grid)[:h, :w].reshape(-1) for h, w in sizes]
    embed = np.full((30, 30, 2), np.nan, np.float32)
    for row, place in enumerate(places):
        embed[row, place] = np.random.default_rng(row).normal(size=(len(place), 2))
    mask = ~np.isnan(embed[..., 0])

    @jax.jit
    def pooled(embed, mask):
        tokens = VisualTokens.from_grid(embed, grid, mask=mask, uneven=True)
        return build("pool", budget=budget, grid=grid).apply({}, tokens)

    found = jax.tree.map(np.asarray, pooled(embed, mask))
    for row, (size, place) in enumerate(zip(sizes, places, strict=True)):
        count = min(budget, len(place))
        shares = grids.cover(size, grids.bands(size, count))  # Its columns sum to 1.
        assert found.mask[row].tolist() == [slot < count for slot in range(budget)]
        means = shares @ embed[row, place] / shares.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.embed[row, :count], means, atol=1e-5)
        np.testing.assert_allclose(found.size[row, :count], shares.sum(axis=1), rtol=1e-5)
        assert found.source[row, place].tolist() == grids.most(shares).tolist()
        assert (np.delete(found.source[row], place) == -1).all()


def test_a_row_within_the_budget_is_not_merged():
    """prumerge adds neighbours to what it keeps; where it keeps all it changes nothing."""
    rng = np.random.default_rng(0)
    embed = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    mask = jnp.arange(6) < jnp.array([[6], [4]])
    signals = Signals(
        attention_row=jnp.ones((2, 6)), keys=jnp.asarray(rng.normal(size=(2, 6, 1, 4)))
    )
    tokens = VisualTokens.from_grid(embed, (1, 6), mask=mask)
    out = jax.jit(build("prumerge", budget=4, extra=True).apply)({}, tokens, signals)
    np.testing.assert_array_equal(out.embed[1], embed[1, :4])
    assert not np.array_equal(out.embed[0, :3], embed[0, :3])


def test_the_logarithm_of_sizes_has_gradients():
    """log 0 of padding is hidden by masks, but 0 times its gradient is NaN."""
    tokens = VisualTokens.from_grid(jnp.ones((1, 4, 2)), (2, 2), mask=jnp.arange(4)[None] < 3)
    pooled = fold.pool(tokens, (2, 2), (1, 2))
    sizes = pooled.replace(size=jnp.array([[3.0, 0.0]]), mask=jnp.array([[True, False]]))

    def loss(size):
        bias = sizes.replace(size=size).log_sizes()
        return jnp.sum(jnp.where(sizes.mask, jax.nn.softmax(bias), 0.0)), bias

    slope, bias = jax.grad(loss, has_aux=True)(sizes.size)
    np.testing.assert_allclose(bias, [[np.log(3.0), 0.0]], rtol=1e-6)
    # d/ds of s / (s + 1), the padding having bias 0.
    np.testing.assert_allclose(slope, [[1 / 16, 0.0]], rtol=1e-5)
