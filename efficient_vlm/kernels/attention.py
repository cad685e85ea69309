"""Softmax attention with grouped keys: the one entry behind every attention layer.

The form is chosen when the program is lowered, not when it is traced, as in `grouped_matmul`:

  TPU, GPU   plain batched products over the whole matrix of logits.
  CPU        tiles: one batch row, one key head and a block of queries at a time, so that logits
             stay in the cache. XLA's batched products on a CPU are several times slower than the
             same products one by one, which are as fast as a library's.

Problems of a few logits (decoding, small models) take the plain form everywhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["attention", "attention_reference"]

_NEGATIVE = -1e30  # finite, so that a row with no live key gives a mean and never NaN

# Logits of one tile: 2 MiB. Smaller tiles make the products inefficient, larger ones leave the
# cache (measured from 64 to 1024 queries of 1024 keys).
_TILE_LOGITS = 2**19
# Below this many logits in all, or of one head, a loop costs more than it saves.
_FEW_LOGITS = 2**20
_FEW_LOGITS_OF_HEAD = 2**16


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention; logits and softmax in float32.

    The backward pass computes the logits again: between the passes only the arguments are kept.
    Differentiable in q, k, v and key_bias, in reverse mode.

    Args:
      q: [B, Sq, H, Dh].
      k, v: [B, Skv, Hkv, Dh], H a multiple of Hkv.
      scale: multiplies the logits.
      mask: bool [B, Sq, Skv], or with 1 for any of the three; True where a key is seen. A row that
        sees no key gets the mean of all values.
      key_bias: float [B, Skv], or [1, Skv], added to the logits of a key.
      softcap: logits l become softcap * tanh(l / softcap) before bias and mask (arXiv 2408.00118).

    Returns:
      [B, Sq, H, Dh] in the dtype of v.
    """
    batch, queries, heads, _ = q.shape
    scale, softcap = float(scale), None if softcap is None else float(softcap)
    of_head = queries * k.shape[1]
    if queries == 1 or of_head < _FEW_LOGITS_OF_HEAD or batch * heads * of_head <= _FEW_LOGITS:
        return attention_reference(q, k, v, mask, key_bias, scale=scale, softcap=softcap)
    return _attention(scale, softcap, q, k, v, mask, key_bias)


def attention_reference(q, k, v, mask=None, key_bias=None, *, scale, softcap=None) -> jax.Array:
    """The same over the whole matrix of logits, by plain autodiff."""
    batch, queries, heads, dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    groups = heads // kv_heads
    # Heads first, and the queries that share keys as one matrix: plain batched products, which
    # every backend has, forward and backward (on a CPU twice as fast as leaving it to einsum).
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, queries, kv_heads, groups, dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * queries, dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, queries, keys)
    bias = None if key_bias is None else key_bias[:, None, None]
    logits = _adjusted(logits, None if mask is None else mask[:, None], bias, softcap)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.matmul(weights.reshape(batch, kv_heads, groups * queries, keys), v)
    out = out.reshape(batch, kv_heads, groups, queries, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, dim)


def _adjusted(logits, mask, bias, softcap):
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask, logits, _NEGATIVE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, softcap, q, k, v, mask, key_bias):
    tiled, plain = _forms(scale, softcap)
    return lax.platform_dependent(q, k, v, mask, key_bias, cpu=tiled, default=plain)


def _forward(scale, softcap, *args):
    return _attention(scale, softcap, *args), args


def _backward(scale, softcap, args, cotangent):
    q, k, v, mask, key_bias = args

    def gradient(form):
        def pull(q, k, v, mask, key_bias, cotangent):
            given = (q, k, v, key_bias)
            return jax.vjp(lambda q, k, v, bias: form(q, k, v, mask, bias), *given)[1](cotangent)

        return pull

    tiled, plain = map(gradient, _forms(scale, softcap))
    *found, d_bias = lax.platform_dependent(*args, cotangent, cpu=tiled, default=plain)
    return *found, None, d_bias


_attention.defvjp(_forward, _backward)


def _forms(scale, softcap):
    options = dict(scale=scale, softcap=softcap)
    return (functools.partial(form, **options) for form in (_tiled, attention_reference))


# --- CPU -----------------------------------------------------------------------------------------


def _tiled(q, k, v, mask, key_bias, *, scale, softcap):
    """`attention_reference` by loops over key heads (of all batch rows) and blocks of queries."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    blocks = -(-groups * queries * keys // _TILE_LOGITS)
    block = -(-queries // blocks)
    blocks = -(-queries // block)
    short = blocks * block - queries

    # One loop over batch rows and heads together: nested loops copy whole rows (15 % slower).
    q = jnp.pad(q, ((0, 0), (0, short), (0, 0), (0, 0)))
    q = q.reshape(batch, blocks, block, kv_heads, groups, dim).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(-1, blocks, groups, block, dim)
    k, v = (x.transpose(0, 2, 1, 3).reshape(-1, keys, dim) for x in (k, v))
    mask = None if mask is None else jnp.asarray(mask)  # NumPy takes no traced index.
    if mask is not None and mask.shape[1] != 1:
        mask = jnp.pad(mask, ((0, 0), (0, short), (0, 0))).reshape(len(mask), blocks, block, -1)
    if key_bias is not None:
        key_bias = jnp.repeat(jnp.broadcast_to(key_bias, (batch, keys)), kv_heads, axis=0)

    # Nothing of a tile is kept for the backward pass.
    tile = jax.checkpoint(functools.partial(_tile, scale=scale, softcap=softcap))

    def head(item):
        index, q, k, v, bias = item
        seen = mask
        if mask is not None:
            seen = mask[index // kv_heads if len(mask) > 1 else 0]
        if seen is None or seen.ndim == 2:
            return _loop(lambda rows: tile(rows, k, v, seen, bias), q)
        return _loop(lambda rows: tile(rows[0], k, v, rows[1], bias), (q, seen))

    out = _loop(head, (jnp.arange(batch * kv_heads), q, k, v, key_bias))
    out = out.reshape(batch, kv_heads, blocks, groups, block, dim).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(batch, blocks * block, heads, dim)[:, :queries]


def _tile(q, k, v, mask, bias, *, scale, softcap):
    """q [groups, block, Dh], k and v [Skv, Dh], mask [block, Skv], bias [Skv]; float32 inside."""
    groups, block, dim = q.shape
    q, k, x = (a.astype(jnp.float32) for a in (q * jnp.asarray(scale, q.dtype), k, v))
    logits = jnp.matmul(q.reshape(-1, dim), k.T).reshape(groups, block, -1)
    logits = _adjusted(logits, mask, bias, softcap)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    # Divided behind the product, where there are fewer numbers.
    out = jnp.matmul(weights.reshape(groups * block, -1), x).reshape(q.shape)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _loop(function, items):
    """`lax.map`, without a loop for a single item."""
    if len(jax.tree.leaves(items)[0]) > 1:
        return lax.map(function, items)
    return function(jax.tree.map(lambda x: x[0], items))[None]
