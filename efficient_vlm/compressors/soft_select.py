"""A selection that can be learnt: the differentiable top-K of VisionSelector. Pure functions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32

from efficient_vlm.compressors import select
from efficient_vlm.shapes import Array

__all__ = ["hard_top_k", "soft_top_k"]

# Halvings of a bracket that holds the threshold: more than the bits of a float32.
_HALVINGS = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def soft_top_k(
    scores: Float[Array, "B T"], mask: Bool[Array, "B T"], k: int
) -> Float32[Array, "B T"]:
    """p = sigmoid(scores + t), with t for each row such that p sums to k over its real tokens.

    VisionSelector (arXiv 2510.16598). Bisection finds t in [logit(k / r) - max s, logit(k / r) -
    min s] of the r real tokens, between which the sum passes k. Implicit differentiation of the
    condition gives, with v = p (1 - p) and g the gradient of p,

        g_s = v g - v sum(v g) / sum(v).

    Args:
      scores: finite where `mask` is True.
      mask: real tokens.
      k: static, at least 1.

    Returns:
      1 for the tokens of a row that has no more than k, 0 for padding. The further the scores lie
      apart, the closer it is to `hard_top_k`.
    """
    return _soft(scores, mask, k)


def hard_top_k(
    scores: Float[Array, "B T"], mask: Bool[Array, "B T"], k: int
) -> Float32[Array, "B T"]:
    """1 for the k tokens that `select.top_k` keeps, 0 for all others; without a gradient."""
    scores = jax.lax.stop_gradient(scores)
    indices, valid = select.top_k(scores, mask, min(k, mask.shape[1]))
    chosen = jax.nn.one_hot(indices, mask.shape[1], dtype=jnp.float32)
    return jnp.sum(jnp.where(valid[..., None], chosen, 0.0), axis=1)


def _soft(scores, mask, k):
    scores = scores.astype(jnp.float32)
    real = jnp.sum(mask, axis=1, keepdims=True)
    share = k / jnp.maximum(real, k + 1).astype(jnp.float32)
    middle = jnp.log(share) - jnp.log1p(-share)
    low = middle - jnp.max(jnp.where(mask, scores, -jnp.inf), axis=1, keepdims=True, initial=-1e30)
    high = middle - jnp.min(jnp.where(mask, scores, jnp.inf), axis=1, keepdims=True, initial=1e30)

    def halve(_, bracket):
        low, high = bracket
        t = low + (high - low) / 2
        total = jnp.sum(jnp.where(mask, jax.nn.sigmoid(scores + t), 0.0), axis=1, keepdims=True)
        return jnp.where(total < k, t, low), jnp.where(total < k, high, t)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    soft = jax.nn.sigmoid(scores + low + (high - low) / 2)
    return jnp.where(mask, jnp.where(real > k, soft, 1.0), 0.0)


def _forward(scores, mask, k):
    p = _soft(scores, mask, k)
    return p, (p, scores[:0])


def _backward(k, kept, gradient):
    p, like = kept
    v = p * (1 - p)
    total = jnp.sum(v, axis=1, keepdims=True)
    mean = jnp.sum(v * gradient, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return (v * (gradient - mean)).astype(like.dtype), None


soft_top_k.defvjp(_forward, _backward)
