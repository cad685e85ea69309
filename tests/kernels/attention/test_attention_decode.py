"""Decoding from caches of every kind, against attention over the whole row in float64."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention_decode, platforms, quantise

PAGE = 128
LENGTHS = np.array([300, 1, 0])
SHAPE = (3, 4, 2, 2, 3 * PAGE, 64, 64)


@pytest.fixture(params=["xla", "tpu"])
def implementation(request):
    """The kernel runs in Pallas' interpreter."""
    if request.param == "xla":
        yield "xla"
        return
    with platforms.interpreted(True):
        yield "tpu"


def paged(x, rng):
    """[B, Hk, M, D] as a shuffled pool of pages with pages of nobody, and its table."""
    batch, heads, keys, *rest = x.shape
    pages = keys // PAGE
    cut = np.moveaxis(x.reshape(batch, heads, pages, PAGE, *rest), 2, 1)
    cut = cut.reshape(batch * pages, heads, PAGE, *rest)
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


def test_two_parts_of_a_cache_merge_by_their_lse():
    q, k, v = cases.arrays(SHAPE)
    full = np.full(3, 3 * PAGE)
    whole = attention_decode(q, k, v, full)
    left = attention_decode(q, k[:, :, :100], v[:, :, :100], np.full(3, 100))
    right = attention_decode(q, k[:, :, 100:], v[:, :, 100:], full - 100)
    lse = jnp.logaddexp(left.lse, right.lse)
    parts = (jnp.exp(x.lse - lse)[..., None] * x.out for x in (left, right))
    np.testing.assert_allclose(lse, whole.lse, atol=1e-5)
    np.testing.assert_allclose(sum(parts), whole.out, atol=1e-5)


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(k_scale=np.zeros((3, 2, 384))), "float32 and k_scale given"),
        (dict(lengths=np.zeros(2)), "[3]"),
        (dict(kept=np.zeros((3, 4), int), implementation="tpu"), "kept tokens"),
        (dict(implementation="cuda"), "tpu, xla"),
        (dict(key_bias=np.zeros((3, 4))), "[3, 384]"),
        (dict(live=np.zeros(384, bool)), "[3, 384]"),
        (dict(kept=np.zeros((2, 4), int)), "[3, K]"),
    ],
)
def test_mistakes_are_named(change, words):
    q, k, v = cases.arrays(SHAPE)
    given = {"lengths": LENGTHS, **change}
    with pytest.raises(UserError) as error:
        attention_decode(q, k, v, **given)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3
