"""Attention over the whole N x M map, by definition and with plain autodiff: the oracle.

Float64 inputs are computed in float64. Small problems use it everywhere, because there the whole
map costs less than working in blocks.
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
        allowed = visible(mask)[:, None]
        logits = jnp.where(allowed, logits, NEGATIVE)
        live = allowed.any(axis=-1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    batch, heads, queries, keys = logits.shape
    # Gradients of probabilities exceed the range of float16.
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
    """Importance from R queries with known lse: q [B, H, R, D], lse [B, H, R], weights [B, R]."""
    logits = _logits(q, k, key_bias, scale, softcap)
    if mask is not None:
        logits = jnp.where(visible(mask)[:, None], logits, NEGATIVE)
    probabilities = jnp.exp(logits - lse[..., None])
    return jnp.einsum("bi,bhij->bj", weights, probabilities) / q.shape[1]


def _logits(q, k, key_bias, scale, softcap):
    """Logits [B, H, N, M], float32 or float64, before masking."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # Scaling q is cheaper than scaling the map, but would round in bfloat16.
    early = q.dtype == exact
    # Queries of heads that share keys form one matrix: plain batched products, fast everywhere.
    q = (q * jnp.asarray(scale, q.dtype) if early else q).reshape(batch, kv_heads, -1, dim)
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=exact)
    logits = logits.reshape(batch, heads, queries, keys)
    logits = logits if early else logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if key_bias is None else logits + key_bias[:, None, None].astype(exact)
