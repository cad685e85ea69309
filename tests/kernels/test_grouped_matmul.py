"""Grouped matmul: every form against the definition, and the form each platform gets."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from efficient_vlm.costs.compiled import hlo
from efficient_vlm.kernels import aot, aot_gpu
from efficient_vlm.kernels import grouped_matmul as gm
from efficient_vlm.kernels.attention.platforms import interpreted

SIZES = {
    "balanced": [10, 10, 10, 10],
    "empty groups": [0, 37, 0, 3],
    "all in one": [0, 0, 40, 0],
    "single rows": [1, 38, 1, 0],
    "small groups at the end": [35, 1, 1, 1, 0, 1, 1],
}


def case(sizes, inner=12, outer=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows, groups = sum(sizes), len(sizes)
    lhs = rng.normal(size=(rows, inner)).astype(dtype)
    rhs = rng.normal(size=(groups, inner, outer)).astype(dtype)
    return lhs, rhs, np.array(sizes, np.int32)


def by_hand(lhs, rhs, sizes):
    """float64, row by row."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([row.astype(np.float64) @ rhs[g] for row, g in zip(lhs, group, strict=True)])


def tiled(lhs, cotangent, sizes, dtype):
    """The TPU's kernel in Pallas' interpreter, the one that raises for reads out of range."""
    with interpreted(pltpu.InterpretParams(out_of_bounds_reads="raise")):
        return gm._tiled_outer(lhs, cotangent, sizes, dtype)


FORMS = {
    "entry": gm.grouped_matmul,
    "blocked": gm._blocked,
    "ragged": gm._ragged,
    "side by side": gm._side_by_side,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forward(form, sizes):
    lhs, rhs, sizes = case(sizes)
    np.testing.assert_allclose(
        form(*map(jnp.asarray, (lhs, rhs, sizes))), by_hand(lhs, rhs, sizes), atol=1e-5
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gradients(sizes):
    """Against autodiff of the definition."""
    lhs, rhs, sizes = case(sizes)
    weight = np.random.default_rng(1).normal(size=(len(lhs), rhs.shape[2])).astype(np.float32)

    def loss(function):
        return lambda a, b: (function(a, b, jnp.asarray(sizes)) * weight).sum()

    ours = jax.grad(loss(gm.grouped_matmul), (0, 1))(lhs, rhs)
    theirs = jax.grad(loss(gm.grouped_matmul_reference), (0, 1))(lhs, rhs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_many_rows_cross_block_borders():
    lhs, rhs, sizes = case([300, 1, 129, 128, 0, 511], inner=8, outer=4)
    np.testing.assert_allclose(
        gm.grouped_matmul(lhs, rhs, jnp.asarray(sizes)), by_hand(lhs, rhs, sizes), atol=1e-5
    )


def test_bfloat16_accumulates_in_float32():
    lhs, rhs, sizes = case([64, 64], inner=512, outer=4)
    low = gm.grouped_matmul(
        jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16), jnp.asarray(sizes)
    )
    assert low.dtype == jnp.bfloat16
    exact = by_hand(
        np.asarray(jnp.asarray(lhs, jnp.bfloat16), np.float32),
        np.asarray(jnp.asarray(rhs, jnp.bfloat16), np.float32),
        sizes,
    )
    # One rounding of the result, not one per product: half an ulp is 2^-9 of the value.
    np.testing.assert_allclose(np.asarray(low, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_form_is_chosen_at_lowering(platform):
    """A program lowered on this CPU host for another platform gets that platform's form."""
    lhs, rhs, sizes = case([10, 30])
    traced = jax.jit(gm.grouped_matmul).trace(lhs, rhs, sizes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == (platform == "tpu")
    gradient = jax.jit(jax.grad(lambda r: gm.grouped_matmul(lhs, r, sizes).sum()))
    text = gradient.trace(rhs).lower(lowering_platforms=(platform,)).as_text()
    assert ("tgmm" in text) == (platform == "tpu")


def test_what_belongs_to_no_group_stays_where_it_is():
    """NaN behind the last group; blocks reach there, and into the rows of other groups."""
    lhs, rhs, sizes = case([5, 0, 41, 3])
    behind = np.full((30, lhs.shape[1]), np.nan, np.float32)
    found = gm._side_by_side(*map(jnp.asarray, (np.concatenate([lhs, behind]), rhs, sizes)), 2)
    np.testing.assert_allclose(found[: len(lhs)], by_hand(lhs, rhs, sizes), atol=1e-5)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(len(lhs) + 30, 8)), jnp.float32)
    whole = jnp.asarray(np.concatenate([lhs, behind]))
    outer = gm._side_by_side_outer(whole, weight, jnp.asarray(sizes), room=2)
    plain = gm._side_by_side_outer(whole[: len(lhs)], weight[: len(lhs)], jnp.asarray(sizes))
    np.testing.assert_allclose(outer, plain, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("form", ["blocked", "tiled", "side by side"])
@pytest.mark.parametrize("shape", [(64, 64, 128), (300, 256, 256)])
def test_nan_behind_the_last_group_is_in_no_gradient(form, which, shape):
    """Of rows, or of their cotangents; nor is that of a group in its neighbour's."""
    rows, inner, outer = shape
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(rows, n)).astype(np.float32) for n in (inner, outer)]
    given[which][23:] = np.nan
    for sizes in ([10, 13], [23, rows - 23]):
        x, g = map(jnp.asarray, given)
        found = OUTER[form](x, g, jnp.asarray(sizes, jnp.int32), jnp.float32)
        np.testing.assert_allclose(found[0], x[: sizes[0]].T @ g[: sizes[0]], atol=1e-4)
        assert np.isfinite(found[1]).all() == (sum(sizes) == 23)


@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, 0), (None, 0, None)])
def test_vmap(batched):
    """One problem after the other, gradients as well, in a program."""
    lhs, rhs, sizes = (np.stack([x, x[::-1]]) for x in case([4, 0, 6]))
    given = [x if axis == 0 else x[0] for x, axis in zip((lhs, rhs, sizes), batched)]

    def gradients(lhs, rhs, sizes):
        return jax.grad(lambda a, b: (gm.grouped_matmul(a, b, sizes) ** 2).sum(), (0, 1))(lhs, rhs)

    found = jax.jit(jax.vmap(gradients, batched))(*given)
    for i in range(2):
        own = [x[i] if axis == 0 else x for x, axis in zip(given, batched)]
        for one, two in zip(found, gradients(*map(jnp.asarray, own)), strict=True):
            np.testing.assert_allclose(one[i], two, atol=1e-4)


OUTER = {
    "blocked": gm._blocked_outer,
    "tiled": tiled,
    "side by side": gm._side_by_side_outer,
}


@pytest.mark.parametrize("rows", [0, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [*SIZES.values(), [300, 1, 129, 128, 0, 511], [0, 0]])
@pytest.mark.parametrize("form", OUTER.values(), ids=OUTER.keys())
def test_gradients_of_matrices(form, sizes, dtype, rows):
    """float64, group by group; with rows behind the last group that belong to none."""
    rng = np.random.default_rng(3)
    shapes = (sum(sizes) + rows or 8, 130), (sum(sizes) + rows or 8, 40)
    lhs, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    found = form(lhs, cotangent, jnp.asarray(sizes, jnp.int32), jnp.dtype(dtype))
    ends = np.cumsum([0, *sizes])
    x, g = np.asarray(lhs, np.float64), np.asarray(cotangent, np.float64)
    exact = [x[a:b].T @ g[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert found.dtype == dtype
    near = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=near, atol=1e-4)


def test_tiles_of_very_many_rows(monkeypatch):
    """Larger ones, for the kernel's lists are not right for any number of them."""
    monkeypatch.setattr(gm, "_MOST_TILES", 2)
    sizes = [100, 0, 500, 3, 210]
    rng = np.random.default_rng(0)
    lhs, cotangent = (rng.normal(size=(sum(sizes), 8)).astype(np.float32) for _ in range(2))
    ends = np.cumsum([0, *sizes])
    exact = [lhs[a:b].T @ cotangent[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    found = tiled(*map(jnp.asarray, (lhs, cotangent)), jnp.asarray(sizes, jnp.int32), jnp.float32)
    np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("tiles", [700, 1023, gm._MOST_TILES])
def test_lists_of_the_kernel_are_right_up_to_the_most_tiles(tiles):
    """Which tiles each group visits, for a group that starts in each of the last ones."""
    rows = tiles * gm._TILE_ROWS

    @jax.jit
    def lists(sizes):
        return make_group_metadata(
            **dict(group_sizes=sizes, m=rows, tm=gm._TILE_ROWS),
            **dict(start_group=jnp.int32(0), num_nonzero_groups=3, visit_empty_groups=True),
        )

    for tile in (*range(1, tiles, 50), *range(tiles - 12, tiles)):
        start = tile * gm._TILE_ROWS + 5
        (_, groups, visited), count = lists(jnp.asarray([start, 0, rows - start], jnp.int32))
        found = list(zip(groups[:count].tolist(), visited[:count].tolist(), strict=True))
        assert [t for g, t in found if g == 0] == [*range(tile + 1)]
        assert [t for g, t in found if g == 2] == [*range(tile, tiles)]


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
needs_gpu = pytest.mark.skipif(not aot_gpu.installed(), reason="needs the extra aot-gpu")


@pytest.mark.parametrize(
    ("compiled", "most"),
    [
        pytest.param(aot.compile_for_tpu, 1.0, marks=needs_libtpu, id="tpu"),
        # Whole blocks; sixteen times with `ragged_dot`.
        pytest.param(aot_gpu.compile_for_gpu, 1.5, marks=needs_gpu, id="gpu"),
    ],
)
@pytest.mark.parametrize("wanted", [0, 1])
def test_work(compiled, most, wanted):
    """Forward and each gradient: 2 M K N, however many groups there are, if they are balanced."""
    rows, inner, outer, groups = 1024, 128, 256, 16

    def loss(lhs, rhs, sizes):
        return (gm.grouped_matmul(lhs, rhs, sizes).astype(jnp.float32) ** 2).sum()

    shapes = (rows, inner), (groups, inner, outer)
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    given.append(jax.ShapeDtypeStruct((groups,), jnp.int32))
    program = compiled(jax.grad(loss, wanted), *given)
    least = 2 * 2 * rows * inner * outer
    assert least <= hlo.costs(program.as_text()).flops <= most * least
