"""Attention over the whole map of N x M, by definition and plain autodiff: the oracle.

Float64 in float64. Also what small problems use everywhere, where a map costs less than its parts.
"""

import jax
import jax.numpy as jnp

from efficient_vlm.kernels.attention.mask import NEGATIVE, Mask, visible

__all__ = ["attend", "rows"]


def attend(q, k, v, key_bias, mask: Mask | None, weights, *, scale, softcap):
    """(out, lse, importance); see `attention`. `weights` [B, N] or None."""
    logits = _logits(q, k, key_bias, scale, softcap)
    live = None
    if mask is not None:
        seen = visible(mask)[:, None]
        logits = jnp.where(seen, logits, NEGATIVE)
        live = seen.any(axis=-1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    batch, heads, queries, keys = logits.shape
    # Gradients of probabilities leave the range of float16.
    kind = v.dtype if v.dtype != jnp.float16 else logits.dtype
    mixed = probabilities.astype(kind).reshape(batch, v.shape[1], -1, keys)
    out = jnp.matmul(mixed, v.astype(kind)).reshape(batch, heads, queries, -1).astype(v.dtype)
    lse = jax.nn.logsumexp(logits, axis=-1)
    if live is not None:
        out = jnp.where(live[..., None], out, 0)
        lse = jnp.where(live, lse, jnp.inf)
        probabilities = jnp.where(live[..., None], probabilities, 0)
    if weights is None:
        return out, lse, None
    return out, lse, jnp.einsum("bi,bhij->bj", weights, probabilities) / heads


def rows(q, k, key_bias, mask: Mask | None, lse, weights, *, scale, softcap):
    """Importance from R rows whose lse is known: q [B, H, R, D], lse [B, H, R], weights [B, R]."""
    logits = _logits(q, k, key_bias, scale, softcap)
    if mask is not None:
        logits = jnp.where(visible(mask)[:, None], logits, NEGATIVE)
    probabilities = jnp.exp(logits - lse[..., None])
    return jnp.einsum("bi,bhij->bj", weights, probabilities) / q.shape[1]


def _logits(q, k, key_bias, scale, softcap):
    """[B, H, N, M], float32 or float64, in front of the mask."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # N x D numbers to scale, not N x M; but bfloat16 would round them.
    early = q.dtype == exact
    # Queries that share keys are one matrix: plain batched products, which every backend has.
    q = (q * jnp.asarray(scale, q.dtype) if early else q).reshape(batch, kv_heads, -1, dim)
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=exact)
    logits = logits.reshape(batch, heads, queries, keys)
    logits = logits if early else logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if key_bias is None else logits + key_bias[:, None, None].astype(exact)
