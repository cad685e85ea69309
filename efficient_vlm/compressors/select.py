"""Selections: which K of T tokens to keep, with K static. Pure functions.

Each returns a `Selection`: distinct real tokens first, then invalid slots if a row has fewer than K
real tokens. The order depends on the method; `fold` restores source order.

`max_min`, `map_dpp` and `coverage` are greedy: K steps over vectors of length T, for all rows of a
batch at once, without gradients. Their scores are float32 sums, so the scores of equal tokens may
differ by rounding: scores within `TIE` of the best are ties, which the lowest index wins.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

# Indices of the kept tokens, int32, and which of these slots are valid.
Selection = tuple[Int[Array, "B K"], Bool[Array, "B K"]]

TIE = 1e-5
NEAREST_BLOCK = 512  # Rows of the similarity matrix that `max_min` holds at a time.


def top_k(
    scores: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    k: int,
    count: Int[Array, " B"] | None = None,
) -> Selection:
    """The k best real tokens; ties go to the lowest index, -0.0 equals 0.0, and NaN of either sign
    counts as the worst score (`kernels.ordering`).

    Args:
      scores: float32 [B, T].
      mask: bool [B, T].
      k: static, at most T.
      count: int [B], for rows that keep fewer than k; None for k.
    """
    values, indices = ordering.top_k(scores, k, mask)
    valid = values > -jnp.inf
    return indices, valid if count is None else valid & (jnp.arange(k) < count[:, None])


def stride(mask: Bool[Array, "B T"], k: int) -> Selection:
    """k tokens, evenly spaced in raster order over the real tokens of each row.

    Of r real tokens the j-th kept one has rank floor((j + 1/2) r / k), the middle of the j-th of k
    equal parts. All are kept if r <= k.

    Args:
      mask: bool [B, T].
      k: static, at most T.
    """
    real = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    slot = jnp.arange(k, dtype=jnp.int32)[None, :]
    rank = jnp.where(real > k, (2 * slot + 1) * real // (2 * k), slot)
    real_first = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    return jnp.take_along_axis(real_first, rank, axis=1), slot < real


def max_min(unit: Float[Array, "B T D"], mask: Bool[Array, "B T"], k: int) -> Selection:
    """Greedy max-min diversity with the distance 1 - cos.

    The first token is the one with the most distant nearest neighbour; each further token is the
    one farthest from its nearest chosen token (DivPrune, arXiv 2503.02175, Algorithm 1).

    Args:
      unit: float32 [B, T, D], tokens of length 1; zeros for padding.
      mask: bool [B, T].
      k: static, at most T.

    Returns:
      (indices, valid) in the order of the choice.
    """
    unit = jax.lax.stop_gradient(unit)

    def update(step, distance, index):
        to_new = 1.0 - _cosines(unit, index)
        return jnp.where(step == 0, to_new, jnp.minimum(distance, to_new))

    return _greedy(k, mask, _nearest_other(unit, mask), lambda distance: distance, update, TIE, 0.0)


def max_min_flops(num_tokens: int, width: int, k: int) -> int:
    """Matmul FLOPs of `max_min` for one image."""
    blocks, block = _blocks(num_tokens)
    return 2 * num_tokens * width * (blocks * block + k)


def map_dpp(
    unit: Float[Array, "B T D"], quality: Float[Array, "B T"], mask: Bool[Array, "B T"], k: int
) -> Selection:
    """Greedy MAP inference of the determinantal point process L = diag(q) S diag(q), S = cosines.

    Each step takes the token that increases det L of the chosen set by the largest factor,
    q_i^2 rho_i, where rho_i is the squared length of token i's component orthogonal to the span of
    the chosen tokens. One new row of a Cholesky factor of S per step updates it (Chen et al., arXiv
    1709.05135, Algorithm 1; they factor L, whose factor is the same with columns scaled by q, and
    divide by 0 where q is 0). A rho below `TIE` counts as 0, and a token with rho 0 adds no row.
    Scores that differ by less than TIE^2, which includes all with q below `TIE`, are ties.

    Args:
      unit: float32 [B, T, D], tokens of length 1; zeros for padding.
      quality: float32 [B, T], q, at least 0.
      mask: bool [B, T].
      k: static, at most T.

    Returns:
      (indices, valid) in the order of the choice.
    """
    unit, quality = jax.lax.stop_gradient((unit, quality))
    batch, num_tokens, _ = unit.shape
    left = (jnp.sum(jnp.square(unit), axis=-1) > 0.5).astype(jnp.float32)
    factor = jnp.zeros((batch, k, num_tokens), jnp.float32)

    def update(step, state, index):
        left, factor = state
        pivot = jnp.take_along_axis(left, index[:, None], axis=1)
        column = jnp.take_along_axis(factor, index[:, None, None], axis=2)[..., 0]
        explained = jnp.einsum("bk,bkt->bt", column, factor, precision=jax.lax.Precision.HIGHEST)
        row = (_cosines(unit, index) - explained) * jax.lax.rsqrt(jnp.maximum(pivot, TIE))
        row = jnp.where(pivot > 0, row, 0.0)
        left = left - jnp.square(row)
        return jnp.where(left < TIE, 0.0, left), factor.at[:, step].set(row)

    def scores(state):
        return jnp.square(quality) * state[0]

    return _greedy(k, mask, (left, factor), scores, update, TIE**2, TIE)


def map_dpp_flops(num_tokens: int, width: int, k: int) -> int:
    """Matmul FLOPs of `map_dpp` for one image."""
    return 2 * k * num_tokens * (width + k)


def coverage(
    unit: Float[Array, "B T D"], weight: Float[Array, "B T"], mask: Bool[Array, "B T"], k: int
) -> Selection:
    """Greedy weighted coverage.

    Token i is covered to c_i = max(0, max over chosen s of cos(i, s)); each step takes the token j
    with the largest weight_j * sum_i max(0, cos(i, j) - c_i) (SCOPE, arXiv 2510.24214). An increase
    of c_i by less than `TIE` is ignored.

    Args:
      unit: float32 [B, T, D], tokens of length 1; zeros for padding.
      weight: float32 [B, T], at least 0.
      mask: bool [B, T].
      k: static, at most T.

    Returns:
      (indices, valid) in the order of the choice.
    """
    unit, weight = jax.lax.stop_gradient((unit, weight))
    # Every step needs all pairs, so the matrix is kept: T^2 floats per image.
    cosine = jnp.einsum("btd,bsd->bts", unit, unit, precision=jax.lax.Precision.HIGHEST)

    def scores(covered):
        rise = cosine - covered[:, None, :]
        return weight * jnp.sum(jnp.where(rise > TIE, rise, 0.0), axis=-1)

    def update(step, covered, index):
        del step
        new = jnp.take_along_axis(cosine, index[:, None, None], axis=1)[:, 0]
        return jnp.maximum(covered, new)

    return _greedy(k, mask, jnp.zeros_like(weight), scores, update, 0.0, TIE)


def _greedy(
    k: int,
    mask: Bool[Array, "B T"],
    state: Any,
    scores: Callable[[Any], jax.Array],
    update: Callable[[jax.Array, Any, jax.Array], Any],
    absolute: float,
    relative: float,
) -> Selection:
    """k times: takes the best unchosen real token, then calls `update(step, state, its index)`.

    Scores of at least best - absolute - relative * |best| are ties, which the lowest index wins.
    NaN counts as the worst score.
    """
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]

    def step(t, carry):
        state, free, indices, valid = carry
        value = ordering.comparable(scores(state), free)
        best = jnp.max(value, axis=1, keepdims=True)
        tied = free & (value >= best - absolute - relative * jnp.abs(best))
        index = jnp.argmax(tied, axis=1).astype(jnp.int32)
        indices = indices.at[:, t].set(index)
        valid = valid.at[:, t].set(jnp.any(free, axis=1))
        return update(t, state, index), free & (columns != index[:, None]), indices, valid

    shape = (mask.shape[0], k)
    empty = (state, mask, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    return jax.lax.fori_loop(0, k, step, empty)[2:]


def _cosines(unit: Float[Array, "B T D"], index: Int[Array, " B"]) -> Float[Array, "B T"]:
    """Cosines of all tokens with token `index`."""
    one = jnp.take_along_axis(unit, index[:, None, None], axis=1)[:, 0]
    return jnp.einsum("btd,bd->bt", unit, one, precision=jax.lax.Precision.HIGHEST)


def _blocks(num_tokens: int) -> tuple[int, int]:
    blocks = -(-num_tokens // NEAREST_BLOCK)
    return blocks, -(-num_tokens // blocks)


def _nearest_other(unit: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Distance of each token to the nearest other real one, 3 if it is alone.

    Computed in blocks of rows, so that a large grid does not need the whole T x T matrix.
    """
    batch, num_tokens, width = unit.shape
    blocks, block = _blocks(num_tokens)
    rows = jnp.pad(unit, ((0, 0), (0, blocks * block - num_tokens), (0, 0)))
    rows = rows.reshape(batch, blocks, block, width).transpose(1, 0, 2, 3)
    columns = jnp.arange(num_tokens)

    def nearest(numbered):
        number, part = numbered
        cosine = jnp.einsum("brd,btd->brt", part, unit, precision=jax.lax.Precision.HIGHEST)
        itself = (number * block + jnp.arange(block))[:, None] == columns
        other = mask[:, None, :] & ~itself[None]
        return 1.0 - jnp.max(jnp.where(other, cosine, -2.0), axis=-1)

    distance = jax.lax.map(nearest, (jnp.arange(blocks), rows))
    return distance.transpose(1, 0, 2).reshape(batch, -1)[:, :num_tokens]
