"""Decoding from caches of every kind, against attention over the whole row in float64."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, platforms
from efficient_vlm.kernels.paged_attention import attention_decode, quantise

PAGE = 128
LENGTHS = np.array([300, 1, 0])
SHAPE = (3, 4, 2, 2, 3 * PAGE, 64, 64)


@pytest.fixture(params=["xla", "tpu"])
def implementation(request):
    """The kernel runs in Pallas' interpreter, the one that raises for reads out of range."""
    if request.param == "xla":
        yield "xla"
        return
    with platforms.interpreted(pltpu.InterpretParams(out_of_bounds_reads="raise")):
        yield "tpu"


def paged(x, rng, size=PAGE):
    """[B, Hk, M, D] as a shuffled pool of pages with pages of nobody, and its table."""
    batch, heads, keys, *rest = x.shape
    pages = keys // size
    cut = np.moveaxis(x.reshape(batch, heads, pages, size, *rest), 2, 1)
    cut = cut.reshape(batch * pages, heads, size, *rest)
    place = rng.permutation(batch * pages + 3)[: batch * pages]
    pool = np.full((batch * pages + 3, *cut.shape[1:]), np.nan, x.dtype)
    pool[place] = cut
    return pool, place.reshape(batch, pages).astype(np.int32)


def expected(q, k, v, **options):
    return cases.by_hand(q, k, v, kv_lengths=LENGTHS, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pages", [False, True])
def test_against_loops(implementation, pages, bias):
    q, k, v = cases.arrays(SHAPE)
    rng = np.random.default_rng(1)
    options = dict(softcap=3.0, scale=0.2)
    if bias:
        options["key_bias"] = rng.normal(size=(3, 3 * PAGE)).astype(np.float32)
    out, lse, _ = expected(q, k, v, **options)
    if pages:
        (k, table), (v, _) = paged(k, np.random.default_rng(2)), paged(v, np.random.default_rng(2))
        table[2] = -1  # A row of no tokens: nothing of its table is looked at.
        options["pages"] = table
    run = jax.jit(
        lambda q, k, v: attention_decode(q, k, v, LENGTHS, implementation=implementation, **options)
    )
    found = run(q, k, v)
    np.testing.assert_allclose(found.out, out, atol=2e-5)
    np.testing.assert_allclose(found.lse, lse, atol=2e-5)


@pytest.mark.parametrize("pages", [False, True])
def test_int8(implementation, pages):
    """Exactly attention to the rounded cache, and near attention to the cache before."""
    q, k, v = cases.arrays(SHAPE)
    (k8, ks), (v8, vs) = (tuple(map(np.asarray, quantise(jnp.asarray(x)))) for x in (k, v))
    out, lse, _ = expected(q, k8 * ks[..., None], v8 * vs[..., None])
    assert np.abs(out - expected(q, k, v)[0]).max() < 0.05
    options = {}
    if pages:
        (k8, table), (v8, _), (ks, _), (vs, _) = (
            paged(x, np.random.default_rng(2)) if x.dtype != np.int8 else
            paged_int8(x) for x in (k8, v8, ks, vs)
        )  # fmt: skip
        options["pages"] = table
    found = attention_decode(
        q, k8, v8, LENGTHS, k_scale=ks, v_scale=vs, implementation=implementation, **options
    )
    np.testing.assert_allclose(found.out, out, atol=2e-5)
    np.testing.assert_allclose(found.lse, lse, atol=2e-5)


def paged_int8(x):
    pool, table = paged(x.astype(np.float32), np.random.default_rng(2))
    return np.nan_to_num(pool, nan=127).astype(np.int8), table


def test_evicted_tokens():
    """A table of what is left, in place of the cache moved together."""
    q, k, v = cases.arrays(SHAPE)
    rng = np.random.default_rng(3)
    kept = np.stack([np.sort(rng.choice(3 * PAGE, 50, replace=False)) for _ in range(3)])
    lengths, bias = np.array([50, 20, 0]), rng.normal(size=(3, 3 * PAGE)).astype(np.float32)
    found = attention_decode(q, k, v, lengths, kept=kept, key_bias=bias, importance=True)
    moved = [np.take_along_axis(x, kept[:, None, :, None], axis=2) for x in (k, v)]
    given = dict(kv_lengths=lengths, key_bias=np.take_along_axis(bias, kept, axis=1))
    weights = np.ones((3, 2), np.float32)
    out, lse, importance = cases.by_hand(q, *moved, importance_weights=weights, **given)
    np.testing.assert_allclose(found.out, out, atol=2e-5)
    np.testing.assert_allclose(found.lse, lse, atol=2e-5)
    np.testing.assert_allclose(found.importance, importance, atol=2e-5)


# Heads, heads of keys, new tokens, keys, head dims; tokens of a page, or 0 for no pages. Blocks of
# the kernel are of up to 512 keys: the last one of 1100 reaches behind the cache, and pages of 640
# and of 1024 have several.
SHAPES = [
    ((8, 1, 1, 700, 128, 128), 0),
    ((4, 4, 3, 1100, 72, 80), 0),
    ((4, 2, 1, 40, 256, 64), 0),
    ((2, 2, 1, 1, 64, 64), 0),
    ((2, 1, 2, 1280, 64, 128), 640),
    ((4, 4, 1, 2048, 80, 80), 1024),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "page"), SHAPES)
def test_shapes_and_dtypes(implementation, shape, page, dtype):
    heads, kv_heads, queries, keys, dim, value_dim = shape
    q, k, v = cases.arrays((2, heads, kv_heads, queries, keys, dim, value_dim))
    q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, k, v))
    lengths = np.array([keys, keys * 2 // 3])
    bias = np.random.default_rng(1).normal(size=(1, keys))
    out, lse, _ = cases.by_hand(q, k, v, kv_lengths=lengths, key_bias=np.tile(bias, (2, 1)))
    table = None
    if page:
        (k, table), (v, _) = (paged(x, np.random.default_rng(2), page) for x in (k, v))
    else:
        for x in (k, v):  # As a cache of which pages are used again.
            x[1, :, lengths[1] :] = np.nan
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    options = dict(pages=table, key_bias=bias, implementation=implementation)
    if implementation == "tpu" and dtype == "float16":  # No matrix unit takes it.
        with pytest.raises(UserError, match="has no float16"):
            attention_decode(q, k, v, lengths, **options)
        return
    # Longer than the cache counts as all of it.
    found = attention_decode(q, k, v, lengths + np.array([5, 0]), **options)
    near = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert found.out.dtype == dtype and found.lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found.out, np.float64), out, atol=near)
    np.testing.assert_allclose(found.lse, lse, atol=2e-5)


def short_of(*arrays):
    """The first 1,000 keys: fewer are plain XLA for every platform."""
    return (x[:, :, :1000] for x in arrays)


def test_gradients_of_a_long_cache():
    """Where programs for a TPU have the kernel, which has none of its own."""
    shape = (1, 4, 2, 1, 1024, 8, 8)
    q, k, v = cases.arrays(shape)
    lengths = np.array([900])

    def loss(function):
        return jax.jit(jax.grad(lambda q, k, v: (function(q, k, v) ** 2).sum(), (0, 1, 2)))

    ours = loss(lambda *x: attention_decode(*x, lengths).out)(q, k, v)
    plain = loss(lambda *x: attention(*x, kv_lengths=lengths, implementation="reference").out)
    for one, two in zip(ours, plain(q, k, v), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    along = jax.jvp(lambda q: attention_decode(q, k, v, lengths).out, (q,), (q,))[1]
    short = jax.jvp(lambda q: attention_decode(q, *short_of(k, v), lengths).out, (q,), (q,))[1]
    np.testing.assert_allclose(along, short, atol=1e-6)


def test_arrays_of_numpy_and_a_traced_table():
    q, k, v = cases.arrays(SHAPE)
    (pool, table), (values, _) = (paged(x, np.random.default_rng(2)) for x in (k, v))
    found = jax.jit(lambda t: attention_decode(q, pool, values, LENGTHS, pages=t).out)(table)
    plain = attention_decode(q, k, v, LENGTHS).out
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_two_parts_of_a_cache_merge_by_their_lse():
    q, k, v = cases.arrays(SHAPE)
    full = np.full(3, 3 * PAGE)
    whole = attention_decode(q, k, v, full)
    left = attention_decode(q, k[:, :, :100], v[:, :, :100], np.full(3, 100))
    right = attention_decode(q, k[:, :, 100:], v[:, :, 100:], full - 100)
    nothing = attention_decode(q, k, v, np.zeros(3, int))
    parts = left, right, nothing
    each = [jnp.where(jnp.isposinf(x.lse), -jnp.inf, x.lse) for x in parts]
    lse = functools.reduce(jnp.logaddexp, each)
    out = sum(jnp.exp(own - lse)[..., None] * x.out for own, x in zip(each, parts))
    np.testing.assert_allclose(lse, whole.lse, atol=1e-5)
    np.testing.assert_allclose(out, whole.out, atol=1e-5)


def test_keys_that_are_not_live(implementation):
    """They hold anything, as do places behind the end of a row: pages are used again."""
    q, k, v = cases.arrays(SHAPE)
    live = np.random.default_rng(4).random((3, 3 * PAGE)) < 0.5
    keep = live & (np.arange(3 * PAGE) < LENGTHS[:, None])
    held = [np.where(keep[:, None, :, None], x, np.nan) for x in (k, v)]
    found = attention_decode(q, *held, LENGTHS, live=live, implementation=implementation)
    bias = np.where(keep, 0, -1e9)
    out, lse, _ = cases.by_hand(q, k, v, key_bias=bias)
    rows = keep.any(axis=1)
    np.testing.assert_allclose(np.asarray(found.out)[rows], out[rows], atol=2e-5)
    assert not np.any(np.asarray(found.out)[~rows])


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("kind", ["contiguous", "pages", "int8"])
def test_new_tokens_see_each_other_causally(implementation, kind, windowed):
    """R drafts, in the cache already, of rows of different lengths: each by a loop of its own."""
    shape = (3, 4, 2, 3, 3 * PAGE, 64, 64)
    q, k, v = cases.arrays(shape)
    rng = np.random.default_rng(5)
    # Before the drafts 297, 5 and no tokens; the last row has one draft, whose others see nothing.
    lengths = np.array([[298, 299, 300], [6, 7, 8], [1, 0, 0]])
    bias = rng.normal(size=(3, 3 * PAGE)).astype(np.float32)
    options, given = dict(key_bias=bias, softcap=3.0), {}
    places = np.stack([rng.permutation(3 * PAGE) / 2 for _ in range(3)]).astype(np.float32)
    after = np.array([[50.0, 60.0, 70.0], [-1.0, 100.0, 0.0], [-1.0, 0.0, 0.0]], np.float32)
    if windowed:
        given = dict(places=places, after=after)
    if kind == "int8":
        (k, ks), (v, vs) = (tuple(map(np.asarray, quantise(jnp.asarray(x)))) for x in (k, v))
        given |= dict(k_scale=ks, v_scale=vs)
        whole = k * ks[..., None], v * vs[..., None]
    else:
        whole = k, v
        for x in (k, v):  # Behind the end of each row may be anything.
            for row, end in enumerate(lengths.max(axis=1)):
                x[row, :, end:] = np.nan
        whole = tuple(map(np.nan_to_num, whole))
    if kind == "pages":
        (k, table), (v, _) = paged(k, np.random.default_rng(2)), paged(v, np.random.default_rng(2))
        given |= dict(pages=table)
    run = functools.partial(attention_decode, implementation=implementation, **options, **given)
    found = jax.jit(run)(q, k, v, lengths)
    for query in range(3):
        live = np.arange(3 * PAGE) < lengths[:, query, None]
        if windowed:
            live &= places > after[:, query, None]
        hidden = dict(options, key_bias=np.where(live, bias, -1e9))
        out, lse, _ = cases.by_hand(q[:, :, query : query + 1], *whole, **hidden)
        some = live.any(axis=1)
        assert some.any()
        ours = np.asarray(found.out)[:, :, query : query + 1], np.asarray(found.lse)[:, :, query]
        np.testing.assert_allclose(ours[0][some], out[some], atol=2e-5)
        np.testing.assert_allclose(ours[1][some], lse[some, :, 0], atol=2e-5)
        assert not ours[0][~some].any() and np.isposinf(ours[1][~some]).all()


def test_importance_of_each_query_s_own_keys():
    q, k, v = cases.arrays((2, 4, 2, 3, 40, 8, 8))
    lengths = np.array([[20, 21, 22], [1, 0, 40]])
    found = attention_decode(q, k, v, lengths, importance=True).importance
    each = [
        attention_decode(q[:, :, i : i + 1], k, v, lengths[:, i], importance=True).importance
        for i in range(3)
    ]
    np.testing.assert_allclose(found, sum(each), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(k_scale=np.zeros((3, 2, 384))), "float32 and k_scale given"),
        (dict(lengths=np.zeros(2)), "[3]"),
        (dict(lengths=np.zeros((3, 4), int)), "[3, 2]"),
        (dict(places=np.zeros((3, 384))), "together"),
        (dict(places=np.zeros((3, 384)), after=np.zeros(3)), "[3, 2]"),
        (dict(kept=np.zeros((3, 4), int), implementation="tpu"), "kept tokens"),
        (dict(implementation="cuda"), "tpu, xla"),
        (dict(key_bias=np.zeros((3, 4))), "[3, 384]"),
        (dict(live=np.zeros(384, bool)), "[3, 384]"),
        (dict(kept=np.zeros((2, 4), int)), "[3, K]"),
        (dict(kept=np.zeros((3, 0), int)), "[3, K]"),
        (dict(pages=np.zeros((3, 0), int)), "[3, T]"),
        (dict(lengths=None), "no lengths"),
        (dict(softcap=np.inf), "above 0"),
    ],
)
def test_mistakes_are_named(change, words):
    q, k, v = cases.arrays(SHAPE)
    given = {"lengths": LENGTHS, **change}
    with pytest.raises(UserError) as error:
        attention_decode(q, k, v, **given)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_mistakes_in_shapes_are_named():
    q, k, v = cases.arrays(SHAPE)
    with pytest.raises(UserError, match="(?s)do not fit.*heads before tokens"):
        attention_decode(q, k, v[..., 0], LENGTHS)
    turned = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    with pytest.raises(UserError, match=r"(?s)\[B, H, R, D\].*x.swapaxes"):
        attention_decode(*turned, LENGTHS)
