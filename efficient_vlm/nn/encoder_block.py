"""One layer of the vision encoder."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Real

from efficient_vlm.kernels.attention import Mask
from efficient_vlm.nn.attention import Attention
from efficient_vlm.nn.linear import Dtype, logical
from efficient_vlm.nn.mlp import activate, feed_forward, mlp_products
from efficient_vlm.nn.norms import make_norm
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import constrain


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, bidirectional.

    Attributes: see `ViT`; `rope_theta` is the `axial_theta` of `attention.Attention`.
    """

    width: int
    num_heads: int
    mlp_dim: int
    qk_norm: bool | str
    qk_scale: float
    dtype: Dtype
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    mlp_gated: bool = False
    bias: bool = False
    qkv_bias: bool | None = None
    layer_scale: bool = False
    rope_theta: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key_bias: Float[Array, "B S"] | None = None,
        merge: Callable[[jax.Array, dict], jax.Array] | None = None,
        positions: Real[Array, "B S *axes"] | None = None,
        mask: Mask | None = None,
        context: Float[Array, "B Skv D"] | None = None,
        context_positions: Real[Array, "B Skv *axes"] | None = None,
    ) -> tuple[Float[Array, "B merged D"], dict[str, Any]]:
        """The new states and the inputs of attention.

        `merge` acts between attention and MLP; `context` gives keys and values in place of x.
        """
        norm = functools.partial(make_norm, self.norm, self.norm_epsilon, dtype=self.dtype)
        first = norm(name="attention_norm")
        keys = dict(key_bias=key_bias, mask=mask)
        if context is not None:
            keys |= dict(context=first(context), context_positions=context_positions)
        y, inner = Attention(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            axial_theta=self.rope_theta,
            qkv_bias=self.bias if self.qkv_bias is None else self.qkv_bias,
            out_bias=self.bias,
            out_scale=0.5,
            dtype=self.dtype,
            name="attention",
        )(first(x), positions, **keys)
        x = constrain(x, "batch", "tokens", None)
        x = x + self._scaled("attention_scale", y)
        if merge is not None:
            x = merge(x, inner)
        normed, shape = norm(name="mlp_norm")(x), (self.width, self.mlp_dim, self.mlp_gated, 0.5)
        products = mlp_products(*shape, dtype=self.dtype, bias=self.bias)
        y = feed_forward(normed, activate(self.activation), **products)
        x = constrain(x + self._scaled("mlp_scale", y), "batch", "tokens", None)
        return x, inner

    def _scaled(self, name: str, y: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return y
        init = logical(nn.initializers.constant(0.1), "embed")
        return y * self.param(name, init, (self.width,), jnp.float32).astype(self.dtype)
