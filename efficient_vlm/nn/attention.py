"""Attention layers, and the attention rows that compressors read."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Float32, Int, Real

from efficient_vlm.errors import unknown
from efficient_vlm.kernels.attention import Mask, mask_rows, visible
from efficient_vlm.kernels.attention import attention as dot_product_attention
from efficient_vlm.nn import kv_cache
from efficient_vlm.nn.linear import Dtype, Linear, together
from efficient_vlm.nn.norms import make_norm
from efficient_vlm.nn.rotary import axial, rotate
from efficient_vlm.shapes import Array

# Queries of every segment of the row attend to keys of this one: the visual tokens.
SHARED_SEGMENT = 0
PADDING_SEGMENT = -1

# Parameters that prefix tuning adds: keys and values [n, Hkv, Dh] that every query sees.
PREFIX = ("prefix_key", "prefix_value")

_NEGATIVE = -1e30  # Finite: a row without live keys gives a mean instead of NaN.


def attention_rows(
    q: Float[Array, "B S H Dh"],
    k: Float[Array, "B Skv Hkv Dh"],
    index: Int[Array, "B R"],
    key_mask: Bool[Array, "B T"],
    scale: float,
    softcap: float | None = None,
    key_bias: Float[Array, "B Skv"] | None = None,
    mask: Mask | None = None,
) -> Float32[Array, "B R T"]:
    """Attention of a few queries to the first keys, recomputed next to the fused attention.

    Args:
      q: [B, S, H, Dh]; k: [B, Skv, Hkv, Dh].
      index: int [B, R], indices of the queries.
      key_mask: bool [B, T], which of the first T keys the softmax runs over.
      scale, softcap, key_bias: those of the layer's own attention.
      mask: likewise; a query that attends to none of the keys (in a layer with a window) gets a
        row over all of them.

    Returns:
      float32 [B, R, T], softmax over those keys, mean over heads.
    """
    count = key_mask.shape[1]
    rows = jnp.take_along_axis(q, index[:, :, None, None], axis=1).astype(jnp.float32)
    keys = jnp.repeat(k[:, :count].astype(jnp.float32), q.shape[2] // k.shape[2], axis=2)
    logits = scale * jnp.einsum("brhd,bthd->bhrt", rows, keys)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :count]
    live = key_mask[:, None]
    if mask is not None:
        masked = live & visible(mask_rows(mask, index))[..., :count]
        live = jnp.where(masked.any(axis=-1, keepdims=True), masked, live)
    logits = jnp.where(live[:, None], logits, _NEGATIVE)
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)


QK_NORMS = ("none", "head", "full")


class Attention(nn.Module):
    """Multi-head attention with grouped keys, optional QK-norm and rotary positions.

    Attributes:
      width: output width.
      qk_norm: norm of queries and keys: False or "none"; True or "head", each head separately with
        one scale for all heads; "full", all heads as one vector (OLMo2).
      qk_scale: multiplies the usual 1/sqrt(Dh). QK-norm bounds the logits by qk_scale * sqrt(Dh),
        and small heads need a value above 1 to attend to one token among many.
      logit_scale: multiplies the logits instead of qk_scale / sqrt(Dh).
      softcap: see `dot_product_attention`.
      rope, local_rope: see `rotary.rotate`; the second is for layers called with `local`.
      axial_theta: base of rotary positions over rows and columns, see `rotary.axial`.
      norm, norm_epsilon: of the QK-norm, see `norms.make_norm`.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool | str = False
    qk_scale: float = 1.0
    logit_scale: float | None = None
    softcap: float | None = None
    rope: Mapping[str, Any] | None = None
    local_rope: Mapping[str, Any] | None = None
    axial_theta: float | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    out_scale: float = 1.0
    dtype: Dtype = jnp.float32

    def setup(self):
        def heads(count: int, axis: str):
            shape, axes = (count, self.head_dim), (axis, "head_dim")
            return Linear(("embed",), shape, axes, dtype=self.dtype, bias=self.qkv_bias)

        self.query = heads(self.num_heads, "heads")
        self.key = heads(self.num_kv_heads, "kv_heads")
        self.value = heads(self.num_kv_heads, "kv_heads")
        if self.normalises != "none":
            axis = "head_dim" if self.normalises == "head" else "heads"
            fields = dict(axis=axis, dtype=self.dtype)
            self.query_norm = make_norm(self.norm, self.norm_epsilon, **fields)
            self.key_norm = make_norm(self.norm, self.norm_epsilon, **fields)
        self.out = Linear(
            ("heads", "head_dim"),
            (self.width,),
            ("embed",),
            self.out_scale,
            self.dtype,
            self.out_bias,
        )

    @property
    def normalises(self) -> str:
        """`qk_norm` as a word."""
        kind = {False: "none", True: "head"}.get(self.qk_norm, self.qk_norm)
        if kind not in QK_NORMS:
            raise unknown("qk_norm", str(kind), QK_NORMS)
        return kind

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        if self.logit_scale is not None:
            return self.logit_scale
        return self.qk_scale * self.head_dim**-0.5

    def queries(
        self,
        x: Float[Array, "B S D"],
        positions: Real[Array, "B S *axes"] | None,
        local: Any = False,
    ) -> tuple[Float[Array, "B S H Dh"], Float[Array, "B S H Dh"]]:
        """Queries with and without rotary positions."""
        return self._as_queries(self._project(x, "query")[0], positions, local)

    def _as_queries(self, q, positions, local):
        q = q if self.normalises == "none" else self._normalised(self.query_norm, q)
        return self._rotate(q, positions, local), q

    def keys(
        self,
        x: Float[Array, "B S D"],
        positions: Real[Array, "B S *axes"] | None,
        local: Any = False,
    ) -> tuple[Float[Array, "B S Hkv Dh"], Float[Array, "B S Hkv Dh"]]:
        """Keys with and without rotary positions."""
        return self._as_keys(self._project(x, "key")[0], positions, local)

    def _as_keys(self, k, positions, local):
        k = k if self.normalises == "none" else self._normalised(self.key_norm, k)
        return self._rotate(k, positions, local), k

    def _project(self, x: jax.Array, *names: str) -> list[jax.Array]:
        """The named projections of x [B, S, D], each [B, S, heads, Dh]."""
        linears = dict(query=self.query, key=self.key, value=self.value)
        if self.query.joined is not None:
            names_of_all = tuple(linears)
            parts = together(x, *linears.values())
            return [parts[names_of_all.index(name)] for name in names]
        return [linears[name](x) for name in names]

    def _normalised(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        if self.normalises == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _rotate(self, x: jax.Array, positions: jax.Array | None, local: Any) -> jax.Array:
        if positions is None:
            return x
        if self.axial_theta is not None:
            return axial(x, positions, self.axial_theta)
        if self.rope is None:
            return x
        return rotate(x, positions, self.rope, self.local_rope, local)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Real[Array, "B S *axes"] | None = None,
        *,
        mask: Mask | None = None,
        key_bias: Float[Array, "B Skv"] | None = None,
        cache: kv_cache.LayerCache | None = None,
        slots: kv_cache.Slots | None = None,
        local: Any = False,
        context: Float[Array, "B Skv D"] | None = None,
        context_positions: Real[Array, "B Skv *axes"] | None = None,
    ) -> tuple[Float[Array, "B S width"], dict[str, Any]]:
        """Self-attention of x, or attention of x to a cache into which it is written first, or to
        a context.

        Args:
          x: [B, S, D].
          positions: [B, S], or [B, S, axes], rotary positions; None where there are none.
          mask: which keys are seen, see `kernels.attention.make_mask`.
          key_bias: float [B, Skv].
          cache: see `kv_cache.LayerCache`, of Skv slots.
          slots: where in the cache the S tokens go; None for an empty cache, into whose first
            slots they are written while they see only each other.
          local: bool, static or traced, whether `local_rope` holds.
          context, context_positions: what gives keys and values in place of x, without a cache.

        Returns:
          [B, S, D], and {"query" [B, S, H, Dh], "key" [B, S, Hkv, Dh], both also as "plain_..."
          without rotary positions; "lse" float32 [B, H, S], "mask" and "key_bias" of the attention}
          with "cache": what came in, with the S tokens written, or None.
        """
        if context is None:
            q, k, v = self._project(x, "query", "key", "value")
        else:
            (q,), (k, v) = self._project(x, "query"), self._project(context, "key", "value")
        q, plain_q = self._as_queries(q, positions, local)
        k, plain_k = self._as_keys(k, positions if context is None else context_positions, local)
        inner = {"query": q, "key": k, "plain_query": plain_q, "plain_key": plain_k}
        inner |= {"mask": mask, "key_bias": key_bias, "cache": cache}
        if self.is_initializing():
            # Attention itself has no parameters, and takes long to trace: shapes are enough.
            inner["lse"] = jnp.zeros((q.shape[0], *q.shape[2:0:-1]), jnp.float32)
            return self.out(q), inner
        options = dict(mask=mask, key_bias=key_bias, scale=self.scale, softcap=self.softcap)
        if slots is not None:
            inner["cache"] = cache = kv_cache.write(cache, k, v, slots)
            q = q.swapaxes(1, 2).astype(self.dtype)
            out, lse = kv_cache.attend(cache, q, slots, **options)
        else:
            if cache is not None:
                inner["cache"] = kv_cache.fill(cache, k, v)
            q, k, v = (x.swapaxes(1, 2).astype(self.dtype) for x in (q, k, v))
            out, lse, _ = dot_product_attention(q, k, v, **options)
        out, inner["lse"] = self._prefixed(q, out, lse)
        return self.out(out.swapaxes(1, 2)), inner

    def _prefixed(
        self, q: jax.Array, out: jax.Array, lse: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Attention [B, H, S, Dh] and its lse [B, H, S] as if PREFIX stood among the keys.

        A softmax over two groups is a mean of theirs, weighted by their sums (arXiv 2110.04366,
        section 3.1). The prefix has no positions.
        """
        keys, values = (self.get_variable("params", name) for name in PREFIX)
        if keys is None:
            return out, lse
        keys, values = (
            jnp.repeat(part.astype(jnp.float32), self.num_heads // self.num_kv_heads, axis=1)
            for part in (keys, values)
        )
        logits = self.scale * jnp.einsum("bhsd,nhd->bhsn", q.astype(jnp.float32), keys)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        own = jax.nn.logsumexp(logits, axis=-1)
        lse = jnp.where(jnp.isfinite(lse), lse, _NEGATIVE)
        total = jnp.logaddexp(lse, own)
        prefix = jnp.einsum("bhsn,nhd->bhsd", jax.nn.softmax(logits, axis=-1), values)
        mixed = out * jnp.exp(lse - total)[..., None] + prefix * jnp.exp(own - total)[..., None]
        return mixed.astype(out.dtype), total
