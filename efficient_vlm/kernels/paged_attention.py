"""Attention of a few new queries to a cache: contiguous or paged, complete or pruned, int8."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Int8, Real

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels.attention import checks
from efficient_vlm.kernels.attention.api import AttentionResult
from efficient_vlm.kernels.attention.mask import NEGATIVE
from efficient_vlm.kernels.attention.parts import decode_on_mesh
from efficient_vlm.kernels.attention.platforms import only_on
from efficient_vlm.kernels.manual import alike
from efficient_vlm.shapes import Array

__all__ = ["attention_decode", "quantise"]

# A contiguous cache with fewer keys is one product in any implementation.
_FEW_KEYS = 1024
# All queries of a key head, and their logits, are in the memory of a TPU core at the same time.
_MOST_ROWS, _MOST_QUERY_BYTES = 2048, 2**20


def attention_decode(
    q: Float[Array, "B H R D"],
    k: Float[Array, "rows Hk S D"] | Int8[Array, "rows Hk S D"],
    v: Float[Array, "rows Hk S Dv"] | Int8[Array, "rows Hk S Dv"],
    lengths: Int[Array, " B"] | Int[Array, "B R"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "#B M"] | None = None,
    pages: Int[Array, "B T"] | None = None,
    kept: Int[Array, "B K"] | None = None,
    k_scale: Float[Array, "rows Hk S"] | None = None,
    v_scale: Float[Array, "rows Hk S"] | None = None,
    live: Bool[Array, "#B M"] | None = None,
    places: Real[Array, "#B M"] | None = None,
    after: Real[Array, "B R"] | None = None,
    importance: bool = False,
    implementation: str | None = None,
) -> AttentionResult:
    """Each query attends to the cache of its row up to `lengths`, or to a window of that.

    For inference: gradients are those of plain XLA, with whole maps and gathered pages.

    Without `pages` the cache is k, v [B, Hk, M, D]. With `pages` it is a pool of pages of S tokens,
    [P, Hk, S, D], and token t of row b is token t % S of page pages[b, t // S]; M = T S for T pages
    per row. On a TPU pages of 128, 256, ... tokens are read in place; otherwise the pages of a row
    are gathered first.

    Args:
      q: [B, H, R, D], R new tokens of each row.
      k, v: as above; int8 with k_scale and v_scale, else in the dtype of q.
      lengths: int32 [B], tokens in the cache, or in `kept`, that all R queries attend to; or
        [B, R], one length per query, so that new tokens that are in the cache already attend to
        each other causally. Clipped to the size of the cache.
      scale, softcap: see `attention`.
      key_bias: float [B, M] or [1, M], by index in the row.
      pages: int32 [B, T], or None.
      kept: int32 [B, K], for a cache with evicted tokens: indices in the row of the tokens that are
        left, in the first `lengths` of K entries; None for all tokens.
      k_scale, v_scale: float32, the shape of k and v without D: a token's key is k * k_scale.
      live: bool [B, M] or [1, M], by index in the row: visible keys; None for all.
      places, after: [B, M] or [1, M], by index in the row, and [B, R]: windows, in which a query
        attends only to keys with `places` above its `after`; None for both without windows.
      importance: whether to return the attention that each key receives: mean over heads, sum over
        the R queries (which eviction accumulates), [B, M], or [B, K] with `kept`.
      implementation: "xla", "tpu" (whole pages of 128 tokens or more, no `kept`), or None for the
        best one where the program runs.

    Returns:
      out [B, H, R, Dv] in the dtype of q, lse float32 [B, H, R] (float64 for float64 queries),
      importance or None. Parts a and b of a cache are merged by their lse, with weights
      exp(lse_a - lse) and exp(lse_b - lse), lse = logaddexp(lse_a, lse_b); replace the +inf of an
      empty part by -inf first.

    Raises:
      UserError: shapes that do not fit, or an implementation that cannot serve this.
    """
    q, k, v, k_scale, v_scale = checks.arrays(q, k, v, k_scale, v_scale)
    lengths, pages, kept, key_bias, live = checks.arrays(lengths, pages, kept, key_bias, live)
    places, after = checks.arrays(places, after)
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
        # Entries of the table after the end of a row may have any value.
        pages = jnp.clip(pages, 0, len(k) - 1)
    limits = None
    if lengths.ndim == 2:
        limits, lengths = lengths, lengths.max(axis=1)
    window = None
    if after is not None:
        places, after = (x.astype(jnp.float32) for x in (places, after))
        window = jnp.broadcast_to(places, (len(q), keys)), after
    args = alike(q, k, v, lengths, pages, columns, k_scale, v_scale, limits, window)
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


def _plain(
    *args: Any, kept: jax.Array | None, importance: bool, scale: float, softcap: float | None
) -> AttentionResult:
    """The same in plain XLA; the pages of a row, or its kept tokens, are gathered."""
    q, k, v, lengths, pages, columns, k_scale, v_scale, limits, window = args
    exact = columns.dtype

    def rows(x):
        """The rows of the cache as [B, Hk, M, ...], pages and kept tokens gathered."""
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
    places, after = window or (None, None)
    if kept is not None:
        columns, places = (
            None if x is None else jnp.take_along_axis(x, kept, axis=1) for x in (columns, places)
        )
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    # Queries that share keys form one matrix. The scale of a token multiplies a whole column of
    # logits or weights, so nothing of the size of the cache is dequantised.
    packed = q.reshape(batch, kv_heads, -1, dim).astype(exact)
    s = jnp.einsum("bhgd,bhmd->bhgm", packed, k.astype(exact), precision="highest") * scale
    s = s if k_scale is None else s * k_scale[:, :, None]
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    limits = lengths[:, None] if limits is None else limits
    seen = (columns > 0.5 * NEGATIVE)[:, None] & (jnp.arange(keys) < limits[..., None])
    if after is not None:
        seen &= places[:, None] > after[..., None]
    # [B, R or 1, M] for the queries of a key head, which are packed head by head.
    seen = jnp.tile(seen, (1, heads // kv_heads if seen.shape[1] > 1 else 1, 1))[:, None]
    s = jnp.where(seen, s + columns[:, None, None], NEGATIVE)
    top = s.max(axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(s - top), 0)
    total = p.sum(axis=-1, keepdims=True)
    some = total != 0  # NaN stays one.
    p = p / jnp.where(some, total, 1)
    mixed = p if v_scale is None else jnp.where(seen, p * v_scale[:, :, None], 0)
    # Hidden slots may hold NaN, and 0 times NaN is NaN.
    values = jnp.where(seen.any(axis=2)[..., None], v.astype(exact), 0)
    out = jnp.einsum("bhgm,bhmd->bhgd", mixed, values, precision="highest")
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), jnp.inf)[..., 0]
    shape = (batch, heads, queries)
    received = p.sum(axis=(1, 2)) / heads if importance else None
    return AttentionResult(out.reshape(*shape, -1).astype(q.dtype), lse.reshape(shape), received)


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
        return f"{rows} queries of a key head (at most {most} of this width)"
    return None


def quantise(
    x: Float[Array, "*batch D"],
) -> tuple[Int8[Array, "*batch D"], Float[Array, "*batch"]]:
    """[..., D] -> int8 [..., D] and float32 [...], one scale per token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    safe = jnp.where(scale > 0, scale, 1)
    return jnp.round(x / safe[..., None]).astype(jnp.int8), scale
