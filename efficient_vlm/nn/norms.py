"""Normalisation over the last axis, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Float32

from efficient_vlm.errors import unknown
from efficient_vlm.nn.linear import Dtype, logical
from efficient_vlm.shapes import Array


def rms_normalised(
    x: Float[Array, "*batch D"], epsilon: float = 1e-6
) -> Float32[Array, "*batch D"]:
    """x divided by its root mean square (arXiv 1910.07467, eq. 4), in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def layer_normalised(
    x: Float[Array, "*batch D"], epsilon: float = 1e-5
) -> Float32[Array, "*batch D"]:
    """x shifted and scaled to mean 0 and variance 1 (arXiv 1607.06450, eq. 3), in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale, in float32.

    The factor is `offset` + scale; Gemma stores the scale minus one (offset 1).
    """

    axis: str = "embed"
    epsilon: float = 1e-6
    offset: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", logical(init, self.axis), x.shape[-1:], jnp.float32)
        scale = scale + self.offset if self.offset else scale
        return (rms_normalised(x, self.epsilon) * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with a learned scale and bias, in float32."""

    axis: str = "embed"
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), shape, jnp.float32)
        bias = self.param("bias", logical(nn.initializers.zeros, self.axis), shape, jnp.float32)
        return (layer_normalised(x, self.epsilon) * scale + bias).astype(self.dtype)


NORMS = ("rms", "rms_plus1", "layernorm")


def make_norm(kind: str, epsilon: float = 1e-6, **fields: Any) -> nn.Module:
    """The norm called "rms", "rms_plus1" (Gemma: times 1 + scale) or "layernorm"."""
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "layernorm":
        return LayerNorm(epsilon=epsilon, **fields)
    return RMSNorm(epsilon=epsilon, offset=1.0 if kind == "rms_plus1" else 0.0, **fields)
