"""Attention of a few queries to separate keys, for projectors and compressors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32

from efficient_vlm.shapes import Array


class Attended(NamedTuple):
    """Result of `cross_attention`.

    Attributes:
      values: [..., Q, H, D] in the dtype of the values.
      weights: float32 [..., H, Q, K], rows summing to 1.
      logits: float32 [..., H, Q, K], before the softmax.
    """

    values: Float[Array, "*rows Q H D"]
    weights: Float32[Array, "*rows H Q K"]
    logits: Float32[Array, "*rows H Q K"]


def cross_attention(
    q: Float[Array, "*#rows Q H D"],
    k: Float[Array, "*rows K H D"],
    v: Float[Array, "*rows K H D"],
    live: Bool[Array, "*#rows K"],
    bias: Float[Array, "*rows K"] | None = None,
) -> Attended:
    """Scaled dot-product attention (arXiv 1706.03762, eq. 1) that also returns its weights.

    Args:
      q: [..., Q, H, D], or [Q, H, D] for the same queries everywhere.
      k, v: [..., K, H, D].
      live: bool [..., K], real keys. Without any, the result is the mean of all values.
      bias: float32 [..., K], added to the logits of each key.
    """
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias[..., None, None, :]
    # A finite floor: without live keys the softmax is uniform instead of NaN.
    logits = jnp.where(live[..., None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    values = jnp.einsum("...hqk,...khd->...qhd", weights.astype(v.dtype), v)
    return Attended(values, weights, logits)


def window_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K H D"],
    v: Float[Array, "B T K H D"],
    live: Bool[Array, "#B T K"],
    bias: Float[Array, "B T K"] | None = None,
) -> Float[Array, "B T H D"]:
    """Attention of one query per window of keys.

    Args: see `cross_attention`; each of T windows has K keys of its own.
    """
    return cross_attention(q[:, :, None], k, v, live, bias).values[:, :, 0]
