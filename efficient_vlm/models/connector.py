"""From the encoder's width to the decoder's, and how a compressor with fresh weights starts."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.nn.linear import Dtype, Linear, logical
from efficient_vlm.nn.mlp import activate
from efficient_vlm.nn.norms import make_norm


class Connector(nn.Module):
    """Encoder width to decoder width: one product, or with `hidden_dim` two and a GELU between.

    With `identity` there is none: the compressor is the projector (mlp, deco, ldpv2, ...) and gives
    the decoder's width itself (its option `features`), or the model has a `projector`.

    Attributes:
      features: channels of the result.
      hidden_dim: channels between two products; None for one product.
      identity: whether there is no product at all, see above.
      activation: between them.
      bias: whether products have biases.
      norm, norm_epsilon: in front of the first product: "rms", "rms_plus1", "layernorm" or None for
        none, and what is added to the variance.
      dtype: of activations, that of the model.
    """

    features: int
    hidden_dim: int | None = None
    identity: bool = False
    activation: str = "gelu_tanh"
    bias: bool = False
    norm: str | None = None
    norm_epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.identity:
            if x.shape[-1] != self.features:
                raise UserError(
                    f"model.connector.identity: the tokens have width {x.shape[-1]}, the decoder "
                    f"{self.features}",
                    fix=f"set model.compressor.features={self.features}, or identity=False",
                )
            return x
        fields = dict(dtype=self.dtype, bias=self.bias)
        if self.norm is not None:
            norm = dict(axis="vision", dtype=self.dtype, name="norm")
            x = make_norm(self.norm, self.norm_epsilon, **norm)(x)
        if self.hidden_dim is not None:
            x = Linear(("vision",), (self.hidden_dim,), ("mlp",), name="up", **fields)(x)
            x = activate(self.activation)(x)
        axis = "vision" if self.hidden_dim is None else "mlp"
        return Linear((axis,), (self.features,), ("embed",), name="out", **fields)(x)


class PooledStart(nn.Module):
    """Pooled tokens plus a gate, at first 0, times what a compressor with fresh weights makes.

    At first the decoder gets means of tokens that it knows; the gate opens as far as that helps
    (ReZero, arXiv 2003.04887). Positions, sizes and `source` are those of `pool`.

    Attributes:
      grid: of the tokens in front of the compressor.
    """

    grid: tuple[int, int]

    @nn.compact
    def __call__(self, before: VisualTokens, made: VisualTokens) -> VisualTokens:
        """T tokens in front of the compressor, and the K that it made of them."""
        budget, pooled = made.mask.shape[1], before
        if made.embed.shape[-1] != before.embed.shape[-1]:
            raise UserError(
                f"model.compressor.features: {made.embed.shape[-1]}, but the tokens have "
                f"{before.embed.shape[-1]} channels",
                fix="leave it out, or set model.pooled_start=False",
            )
        if budget < before.mask.shape[1]:
            pool = compressors.build("pool", budget=budget, grid=self.grid, parent=None)
            pooled = pool.apply({}, before)
        gate = self.param("gate", logical(nn.initializers.zeros, None), (1,)).astype(jnp.float32)
        more = jnp.where(made.mask[..., None], made.embed, 0).astype(jnp.float32)
        embed = pooled.embed.astype(jnp.float32) + gate * more
        embed = jnp.where(pooled.mask[..., None], embed, 0).astype(before.embed.dtype)
        return pooled.replace(embed=embed)
