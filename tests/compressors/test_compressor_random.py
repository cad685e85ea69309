"""`random` against the distribution that it claims."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.compressors import VisualTokens, build


def test_random_is_uniform_without_replacement():
    """8192 rows with 9 real tokens of 12, 4 kept: all tokens and pairs equally often."""
    rows, real = 8192, [0, 1, 3, 4, 5, 7, 8, 10, 11]
    mask = np.zeros((rows, 12), bool)
    mask[:, real] = True
    tokens = VisualTokens.from_grid(jnp.ones((rows, 12, 1)), (3, 4), mask=jnp.asarray(mask))
    out = jax.jit(build("random", budget=4).apply)({}, tokens)
    kept = (np.asarray(out.source) >= 0).astype(int)[:, real]
    assert (kept.sum(axis=1) == 4).all()
    pairs = kept.T @ kept
    for count, chance in [(np.diag(pairs), 4 / 9), (pairs[np.triu_indices(9, 1)], 12 / 72)]:
        error = (count - rows * chance) / math.sqrt(rows * chance * (1 - chance))
        assert np.abs(error).max() < 4.5, "a token or pair is favoured"
        assert np.mean(error**2) < 2, "the counts vary more than chance"


def test_random_follows_its_key():
    tokens = VisualTokens.from_grid(jnp.ones((2, 64, 1)), (8, 8))
    apply = jax.jit(build("random", budget=8).apply)

    def source(key, apply=apply):
        return np.asarray(apply({}, tokens, rng=key).source)

    first = source(jax.random.key(5))
    assert (first == source(jax.random.key(5))).all()
    assert (first != source(jax.random.key(6))).any()
    assert (first[0] != first[1]).any(), "rows draw alike"
    assert (source(None) == source(jax.random.key(0))).all()
    assert (source(None, jax.jit(build("random", budget=8, seed=5).apply)) == first).all()
