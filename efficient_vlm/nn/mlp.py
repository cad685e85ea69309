"""Feed-forward layers and named activations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from efficient_vlm.errors import unknown
from efficient_vlm.nn.linear import Dtype, Linear, together
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu_tanh": nn.gelu,
    "gelu_erf": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def activate(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of this name; UserError with the closest name if it is unknown."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def feed_forward(
    x: Float[Array, "B S D"], act: Callable, down: Linear, up: Linear, gate: Linear | None = None
) -> Float[Array, "B S features"]:
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202), or down(act(up(x))) without a gate.

    Args:
      x: [B, S, D].
      act: the activation.
      down, up, gate: the products.
    """
    if gate is None:
        hidden = act(up(x))
    else:
        gated, linear = together(x, gate, up)
        hidden = act(gated) * linear
    return down(constrain(hidden, "batch", "tokens", "activation_mlp"))


class FeedForward(nn.Module):
    """`feed_forward` as a module."""

    mlp_dim: int
    out_scale: float = 1.0
    dtype: Dtype = jnp.float32
    gated: bool = True
    activation: str = "silu"
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        shape = x.shape[-1], self.mlp_dim, self.gated, self.out_scale
        products = mlp_products(*shape, dtype=self.dtype, bias=self.bias)
        return feed_forward(x, activate(self.activation), **products)


def mlp_products(
    width: int, mlp_dim: int, gated: bool, out_scale: float, **fields: Any
) -> dict[str, Linear | None]:
    """The products of `feed_forward`, as children of the module whose compact method calls this.

    Args:
      width: D.
      mlp_dim: inner width.
      gated: whether to include the gate.
      out_scale: `Linear.scale` of the last product.
      **fields: dtype and bias of all products.
    """
    wide = ("embed",), (mlp_dim,), ("mlp",)
    gate = Linear(*wide, name="gate", **fields) if gated else None
    up = Linear(*wide, name="up", **fields)
    down = Linear(("mlp",), (width,), ("embed",), scale=out_scale, name="down", **fields)
    return dict(down=down, up=up, gate=gate)
