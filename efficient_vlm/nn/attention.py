"""Attention, its masks and rotary positions, and the rows of it that compressors look at."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.errors import unknown
from efficient_vlm.kernels.attention import Mask, mask_rows, visible
from efficient_vlm.kernels.attention import attention as dot_product_attention
from efficient_vlm.nn import kv_cache
from efficient_vlm.nn.layers import Dtype, Linear, fused_product, make_norm
from efficient_vlm.nn.rotary import axial, rotate

# Keys of this segment are seen by the queries of every segment of the row: the visual tokens.
SHARED_SEGMENT = 0
PADDING_SEGMENT = -1

_NEGATIVE = -1e30  # finite, so that a row with no live key gives a mean and never NaN


def attention_rows(
    q: jax.Array,
    k: jax.Array,
    index: jax.Array,
    key_mask: jax.Array,
    scale: float,
    softcap: float | None = None,
    key_bias: jax.Array | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """Attention of a few queries to the first keys, recomputed beside the fused attention.

    Args:
      q: [B, S, H, Dh]; k: [B, Skv, Hkv, Dh].
      index: int [B, R], which queries.
      key_mask: bool [B, T], which of the first T keys count; the others are left out.
      scale, softcap, key_bias [B, Skv]: of the layer's own attention.
      mask: likewise; a query that sees none of the keys, as in a layer with a window, looks at all.

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
    seen = key_mask[:, None]
    if mask is not None:
        near = seen & visible(mask_rows(mask, index))[..., :count]
        seen = jnp.where(near.any(axis=-1, keepdims=True), near, seen)
    logits = jnp.where(seen[:, None], logits, _NEGATIVE)
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)


QK_NORMS = ("none", "head", "full")


class Attention(nn.Module):
    """Multi-head attention with grouped keys, optional QK-norm and rotary positions.

    Attributes:
      width: of the result.
      qk_norm: normalise queries and keys: False or "none"; True or "head", each head by itself
        with one scale for all heads; "full", all heads as one vector (OLMo2).
      qk_scale: multiplies the usual 1/sqrt(Dh). With QK-norm the logits are bounded by
        qk_scale * sqrt(Dh), and a value above 1 is what lets small heads look up one token among
        many.
      logit_scale: multiplies the logits in place of qk_scale / sqrt(Dh).
      softcap: see `dot_product_attention`.
      rope, local_rope: see `rotary.rotate`; the second for layers that are called with `local`.
      axial_theta: base of rotary positions over rows and columns, see `rotary.axial`.
      norm, norm_epsilon: of the QK-norm, see `layers.make_norm`.
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
        """What the logits are multiplied by."""
        if self.logit_scale is not None:
            return self.logit_scale
        return self.qk_scale * self.head_dim**-0.5

    def queries(
        self, x: jax.Array, positions: jax.Array | None, local: Any = False
    ) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> queries [B, S, H, Dh] with and without rotary positions."""
        q = self._project(x, "query")
        q = q if self.normalises == "none" else self._normalised(self.query_norm, q)
        return self._rotate(q, positions, local), q

    def keys(
        self, x: jax.Array, positions: jax.Array | None, local: Any = False
    ) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> keys [B, S, Hkv, Dh] with and without rotary positions."""
        k = self._project(x, "key")
        k = k if self.normalises == "none" else self._normalised(self.key_norm, k)
        return self._rotate(k, positions, local), k

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        """Queries, keys or values; all three are one product where `stack.fuse` joined them."""
        if "query_key_value" not in self.variables.get("params", {}):
            return getattr(self, name)(x)
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        order = ("query", "key", "value").index(name)
        start = sum(counts[:order]) * self.head_dim
        all_three = fused_product(self, "query_key_value", x)
        part = all_three[..., start : start + counts[order] * self.head_dim]
        return part.reshape(*x.shape[:-1], counts[order], self.head_dim)

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
        x: jax.Array,
        positions: jax.Array | None = None,
        *,
        mask: Mask | None = None,
        key_bias: jax.Array | None = None,
        cache: kv_cache.LayerCache | None = None,
        slots: kv_cache.Slots | None = None,
        local: Any = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends from x [B, S, D] to itself, or to a cache that x is first written into.

        Args:
          x: [B, S, D].
          positions: [B, S], or [B, S, axes], rotary positions; None where there are none.
          mask: which keys are seen, see `kernels.attention.make_mask`.
          key_bias: float [B, Skv].
          cache: see `kv_cache.LayerCache`, of Skv slots.
          slots: where in the cache the S tokens go; None for an empty cache, into whose first
            slots they are written while they see only each other.
          local: bool, static or traced, whether `local_rope` holds.

        Returns:
          [B, S, D], and {"query" [B, S, H, Dh], "key" [B, S, Hkv, Dh], both also as "plain_..."
          without rotary positions; "lse" float32 [B, H, S], "mask" and "key_bias" of the attention}
          with "cache": what came in, with the S tokens written, or None.
        """
        q, plain_q = self.queries(x, positions, local)
        k, plain_k = self.keys(x, positions, local)
        v = self._project(x, "value")
        inner = {"query": q, "key": k, "plain_query": plain_q, "plain_key": plain_k}
        inner |= {"mask": mask, "key_bias": key_bias, "cache": cache}
        options = dict(mask=mask, key_bias=key_bias, scale=self.scale, softcap=self.softcap)
        if slots is not None:
            inner["cache"] = cache = kv_cache.write(cache, k, v, slots)
            q = q.swapaxes(1, 2).astype(self.dtype)
            out, inner["lse"] = kv_cache.attend(cache, q, slots, **options)
        else:
            if cache is not None:
                inner["cache"] = kv_cache.fill(cache, k, v)
            q, k, v = (x.swapaxes(1, 2).astype(self.dtype) for x in (q, k, v))
            out, inner["lse"], _ = dot_product_attention(q, k, v, **options)
        return self.out(out.swapaxes(1, 2)), inner
