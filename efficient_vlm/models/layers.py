"""Norms and products that all models share. All parameters carry logical axes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Dtype = jnp.dtype | str


def logical(init, *axes: str | None):
    """`init` with logical axis names attached, for rules to map onto a mesh."""
    return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) over the last axis, in float32."""

    axis: str = "embed"
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", logical(nn.initializers.ones, self.axis), x.shape[-1:], jnp.float32
        )
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(self.dtype)


class Linear(nn.Module):
    """A product over the last `len(inputs)` axes of x; no bias.

    Attributes:
      inputs: logical names of the contracted axes.
      features: sizes of the new axes.
      outputs: logical names of the new axes.
      scale: standard deviation of the initial kernel times sqrt(fan-in).
    """

    inputs: Sequence[str | None]
    features: Sequence[int]
    outputs: Sequence[str | None]
    scale: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = x.shape[-len(self.inputs) :]
        init = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "normal",
            in_axis=tuple(range(len(contracted))),
            out_axis=tuple(range(len(contracted), len(contracted) + len(self.features))),
        )
        kernel = self.param(
            "kernel",
            logical(init, *self.inputs, *self.outputs),
            (*contracted, *self.features),
            jnp.float32,
        )
        # As one product of two matrices: the CPU backend's gradients of a product over a stack of
        # matrices cost twice as much.
        rows = x.shape[: x.ndim - len(contracted)]
        size = math.prod(contracted)
        y = x.astype(self.dtype).reshape(-1, size) @ kernel.astype(self.dtype).reshape(size, -1)
        return y.reshape(*rows, *self.features)
