"""Norms and products that all models share. All parameters carry logical axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.errors import unknown

Dtype = jnp.dtype | str


def logical(init, *axes: str | None):
    """`init` with logical axis names attached, for rules to map onto a mesh."""
    return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) over the last axis, in float32.

    The result is multiplied by `offset` + scale; Gemma stores the scale minus one (offset 1).
    """

    axis: str = "embed"
    epsilon: float = 1e-6
    offset: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", logical(init, self.axis), x.shape[-1:], jnp.float32)
        scale = scale + self.offset if self.offset else scale
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) over the last axis, in float32."""

    axis: str = "embed"
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), shape, jnp.float32)
        bias = self.param("bias", logical(nn.initializers.zeros, self.axis), shape, jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale + bias).astype(self.dtype)


NORMS = ("rms", "rms_plus1", "layernorm")


def make_norm(kind: str, epsilon: float = 1e-6, **fields: Any) -> nn.Module:
    """The norm called "rms", "rms_plus1" (Gemma: times 1 + scale) or "layernorm"."""
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "layernorm":
        return LayerNorm(epsilon=epsilon, **fields)
    return RMSNorm(epsilon=epsilon, offset=1.0 if kind == "rms_plus1" else 0.0, **fields)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu_tanh": nn.gelu,
    "gelu_erf": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def activate(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of this name; UserError with the nearest one if there is none."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def product(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> jax.Array:
    """x [..., K] times kernel [K, F], computed in `dtype`: [..., F].

    Where the kernel is stored in bfloat16, which no parameter in training is, a CPU is asked for
    float32 and rounds: XLA's products with a result in bfloat16 are several times slower there.
    """
    x, stored, kernel = x.astype(dtype), kernel.dtype, kernel.astype(dtype)
    if not stored == kernel.dtype == jnp.bfloat16:
        return x @ kernel
    return jax.lax.platform_dependent(x, kernel, cpu=_product_on_cpu, default=jnp.matmul)


# XLA's CPU takes the slow way for one row even so; eight take as long as two.
_LEAST_ROWS = 8


def _product_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count == 1:
        rows = jnp.pad(rows, ((0, _LEAST_ROWS - 1), (0, 0)))
    y = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)[:count]
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


class Linear(nn.Module):
    """A product over the last `len(inputs)` axes of x, and a bias if asked for.

    Attributes:
      inputs: logical names of the contracted axes.
      features: sizes of the new axes.
      outputs: logical names of the new axes.
      scale: standard deviation of the initial kernel times sqrt(fan-in).
      bias: whether a bias, at first zero, is added.
    """

    inputs: Sequence[str | None]
    features: Sequence[int]
    outputs: Sequence[str | None]
    scale: float = 1.0
    dtype: Dtype = jnp.float32
    bias: bool = False

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
        y = product(x.reshape(-1, size), kernel.reshape(size, -1), self.dtype)
        y = y.reshape(*rows, *self.features)
        if self.bias:
            init = logical(nn.initializers.zeros, *self.outputs)
            y = y + self.param("bias", init, self.features, jnp.float32).astype(self.dtype)
        return y


def fused_product(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """x [..., D] times several kernels that `stack.fuse` put side by side: [..., all of them].

    XLA sees equal calls as one, so each of the parts may ask for it.
    """
    weights = module.variables["params"][name]
    y = product(x, weights["kernel"], module.dtype)
    return y + weights["bias"].astype(module.dtype) if "bias" in weights else y
