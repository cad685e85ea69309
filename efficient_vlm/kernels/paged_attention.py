"""Attention of a few new queries to a cache: contiguous or in pages, whole or thinned out, int8."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels.attention import checks
from efficient_vlm.kernels.attention.api import AttentionResult
from efficient_vlm.kernels.attention.mask import NEGATIVE
from efficient_vlm.kernels.attention.parts import decode_on_mesh
from efficient_vlm.kernels.attention.platforms import only_on
from efficient_vlm.kernels.manual import alike

__all__ = ["attention_decode", "quantise"]

# A shorter contiguous cache is one product either way.
_FEW_KEYS = 1024
# All queries of a head of keys are in the memory of a TPU's core at once, with their logits.
_MOST_ROWS, _MOST_QUERY_BYTES = 2048, 2**20


def attention_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: jax.Array | None = None,
    pages: jax.Array | None = None,
    kept: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    live: jax.Array | None = None,
    places: jax.Array | None = None,
    after: jax.Array | None = None,
    importance: bool = False,
    implementation: str | None = None,
) -> AttentionResult:
    """Each query sees the cache of its row up to `lengths`, or in a window the last part of that.

    Made for inference: gradients are those of plain XLA, with whole maps and gathered pages.

    Without `pages` the cache is k, v [B, Hk, M, D]. With them it is a pool of pages of S tokens,
    [P, Hk, S, D], and token t of row b is token t % S of page pages[b, t // S]; M = T S for T
    pages a row. On a TPU pages of 128, 256, ... tokens are read from where they are; in all other
    cases those of a row are gathered first.

    Args:
      q: [B, H, R, D], R new tokens of each row.
      k, v: as above; int8 with k_scale and v_scale, else in the dtype of q.
      lengths: int32 [B], tokens of the cache, or of `kept`, that all R queries see; or [B, R],
        those that each of them sees: new tokens that are in the cache already see each other
        causally so. More than there are count as all.
      scale, softcap: see `attention`.
      key_bias: float [B, M] or [1, M], by place in the row.
      pages: int32 [B, T], or None.
      kept: int32 [B, K], places in the row of the tokens that are left, in the first `lengths` of
        the K, for a cache from which tokens were evicted; None for all.
      k_scale, v_scale: float32, the shape of k and v without D: a token's key is k * k_scale.
      live: bool [B, M] or [1, M], by place in the row; keys that are seen; None for all.
      places, after: float [B, M] or [1, M], by place in the row, and [B, R]: a query sees no key
        whose `places` is not above its `after`, as in a window over tokens that stand elsewhere
        than they lie; None for both without one.
      importance: whether to give the attention that each key receives: mean over heads, sum over
        the R queries (what eviction adds up), [B, M], or [B, K] with `kept`.
      implementation: "xla", "tpu" (whole pages of 128 tokens or more, no `kept`), or None for the
        best one where the program runs.

    Returns:
      out [B, H, R, Dv] in the dtype of q, lse float32 [B, H, R] (of float64 queries float64),
      importance or None. The lse is what merges the parts of a cache: weights exp(lse_a - lse) and
      exp(lse_b - lse) with lse = logaddexp(lse_a, lse_b), for which a +inf, of a part that has
      nothing, is made -inf.

    Raises:
      UserError: shapes that do not fit, or an implementation that cannot serve this.
    """
    q, k, v, k_scale, v_scale = checks.arrays(q, k, v, k_scale, v_scale)
    told = (lengths, pages, kept, key_bias, live, places, after)
    lengths, pages, kept, key_bias, live, places, after = checks.arrays(*told)
    checks.decode(q, k, v, lengths, pages, k_scale, v_scale)
    keys = k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
    checks.columns(len(q), keys, key_bias=key_bias, live=live, places=places, kept=kept)
    checks.windows(q, places, after)
    softcap = checks.cap(softcap, "attention_decode")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scale = checks.number("scale", scale, "attention_decode")
    exact = jnp.promote_types(q.dtype, jnp.float32)

    if implementation not in (None, "xla", "tpu"):
        raise unknown("implementation", str(implementation), ("xla", "tpu"))
    if problem := _unserved_by_tpu(q, k, v, pages, kept, importance):
        if implementation == "tpu":
            raise UserError(
                f"attention_decode: implementation 'tpu' has no {problem}",
                allowed="xla",
                fix="implementation='xla', or None for the best one",
            )
        implementation = "xla"
    columns = jnp.zeros((1, keys), exact) if key_bias is None else key_bias.astype(exact)
    columns = jnp.broadcast_to(columns, (len(q), keys))
    if live is not None:
        columns = jnp.where(live, columns, NEGATIVE)
    options = dict(scale=scale, softcap=softcap)
    if pages is not None:
        # Places of a table behind the end of a row may hold anything.
        pages = jnp.clip(pages, 0, len(k) - 1)
    limits = None
    if lengths.ndim == 2:
        limits, lengths = lengths, lengths.max(axis=1)
    if after is not None:
        places, after = (jnp.asarray(x, jnp.float32) for x in (places, after))
        places = jnp.broadcast_to(places, (len(q), keys))
    args = alike(q, k, v, lengths, pages, columns, k_scale, v_scale, limits, places, after)
    q, kept = args[0], alike(kept, q)[0]
    plain = functools.partial(_plain, kept=kept, importance=importance, **options)
    part = functools.partial(_kernel, **options)

    def kernel(*args) -> AttentionResult:
        return AttentionResult(*decode_on_mesh(part, *args))

    if implementation == "tpu":
        return kernel(only_on("tpu", q), *args[1:])
    if implementation == "xla" or (pages is None and keys < _FEW_KEYS):
        return plain(*args)
    chosen = jax.custom_jvp(lambda *args: lax.platform_dependent(*args, tpu=kernel, default=plain))
    chosen.defjvp(lambda args, along: (chosen(*args), jax.jvp(plain, args, along)[1]))
    return chosen(*args)


def _kernel(*args, **options):
    from efficient_vlm.kernels.attention.tpu.decode import decode

    return *decode(*args, **options), None


def _plain(q, k, v, lengths, pages, columns, k_scale, v_scale, limits, places, after, **options):
    """The same in plain XLA; the pages of a row, or its kept tokens, are gathered."""
    kept, importance, scale, softcap = map(options.get, ("kept", "importance", "scale", "softcap"))
    exact = columns.dtype

    def rows(x):
        """[B, Hk, M, ...] of what is read."""
        if x is None:
            return None
        if pages is not None:
            x = jnp.moveaxis(x[pages], 2, 1)  # [B, Hk, T, S, ...]
            x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        if kept is None:
            return x
        at = kept.reshape(len(kept), 1, -1, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, at, axis=2)

    k, v, k_scale, v_scale = map(rows, (k, v, k_scale, v_scale))
    if kept is not None:
        columns, places = (
            None if x is None else jnp.take_along_axis(x, kept, axis=1) for x in (columns, places)
        )
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    # Queries that share keys are one matrix. The scales of a token multiply whole columns of
    # logits and of weights: nothing of the size of the cache is dequantised.
    packed = q.reshape(batch, kv_heads, -1, dim).astype(exact)
    s = jnp.einsum("bhgd,bhmd->bhgm", packed, k.astype(exact), precision="highest") * scale
    s = s if k_scale is None else s * k_scale[:, :, None]
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    seen = (columns > 0.5 * NEGATIVE)[:, None]
    seen &= jnp.arange(keys) < (lengths[:, None] if limits is None else limits)[..., None]
    if after is not None:
        seen &= places[:, None] > after[..., None]
    # [B, 1, R, M], or 1 for all R; the queries of a head of keys are its heads' one by one.
    seen = jnp.tile(seen, (1, heads // kv_heads if seen.shape[1] > 1 else 1, 1))[:, None]
    s = jnp.where(seen, s + columns[:, None, None], NEGATIVE)
    top = s.max(axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(s - top), 0)
    total = p.sum(axis=-1, keepdims=True)
    some = total != 0  # NaN stays one.
    p = p / jnp.where(some, total, 1)
    mixed = p if v_scale is None else jnp.where(seen, p * v_scale[:, :, None], 0)
    # What absent places hold may be anything.
    values = jnp.where(seen.any(axis=2)[..., None], v.astype(exact), 0)
    out = jnp.einsum("bhgm,bhmd->bhgd", mixed, values, precision="highest")
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), jnp.inf)[..., 0]
    shape = (batch, heads, queries)
    found = p.sum(axis=(1, 2)) / heads if importance else None
    return AttentionResult(out.reshape(*shape, -1).astype(q.dtype), lse.reshape(shape), found)


def _unserved_by_tpu(q, k, v, pages, kept, importance) -> str | None:
    """The feature that the kernel lacks for this call, or None."""
    if kept is not None:
        return "kept tokens (whole pages only)"
    if importance:
        return "importance"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype}"
    if pages is not None and k.shape[2] % 128:
        return f"pages of {k.shape[2]} tokens (multiples of 128)"
    rows, width = q.shape[2] * (q.shape[1] // k.shape[1]), q.shape[3] + v.shape[3]
    most = min(_MOST_ROWS, _MOST_QUERY_BYTES // (width * q.dtype.itemsize))
    if rows > most:
        return f"{rows} queries of a head of keys (at most {most} of this width)"
    return None


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> int8 [..., D] and float32 [...], a scale for each token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    safe = jnp.where(scale > 0, scale, 1)
    return jnp.round(x / safe[..., None]).astype(jnp.int8), scale
