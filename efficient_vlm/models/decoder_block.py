"""One layer of the decoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from efficient_vlm.models.attention import Attention, attention_rows
from efficient_vlm.models.layers import Dtype, RMSNorm
from efficient_vlm.models.moe import MoE, SwiGLU


@struct.dataclass
class LayerInputs:
    """What every layer of a run gets beside the hidden states [B, S, D].

    Attributes:
      positions: [B, S], rotary positions.
      mask: bool [B, S, Skv].
      key_bias: float32 [B, Skv], added to the logits of each key.
      live: bool [B, S], places that hold a token (the router counts no others).
      write_index: see `attention.Attention`.
      probe: (int [B, R], bool [B, T]), rows whose attention to T visual keys is wanted, or None.
    """

    positions: jax.Array
    mask: jax.Array
    key_bias: jax.Array
    live: jax.Array
    write_index: jax.Array | None = None
    probe: tuple[jax.Array, jax.Array] | None = None


class DecoderBlock(nn.Module):
    """Pre-norm attention, then SwiGLU or a mixture of experts."""

    attention: Mapping[str, Any]
    mlp_dim: int
    moe: Mapping[str, Any] | None
    dtype: Dtype

    def setup(self):
        self.attention_norm = RMSNorm(dtype=self.dtype)
        self.attend = Attention(**self.attention, dtype=self.dtype, name="attention")
        self.mlp_norm = RMSNorm(dtype=self.dtype)
        out_scale = self.attention["out_scale"]
        if self.moe is None:
            self.feed_forward = SwiGLU(self.mlp_dim, out_scale, self.dtype, name="mlp")
        else:
            self.feed_forward = MoE(**self.moe, out_scale=out_scale, dtype=self.dtype, name="moe")

    def __call__(self, x: jax.Array, inputs: LayerInputs, cache: tuple | None):
        """One layer over x [B, S, D].

        Args:
          x: hidden states.
          inputs: what is the same for all layers.
          cache: keys and values of this layer, see `attention.Attention`, or None.

        Returns:
          x behind the layer, and a pair: (cache, router statistics, attention of the probed rows),
          and what its attention saw: query, key, plain_query, plain_key.
        """
        y, inner = self.attend(
            self.attention_norm(x),
            inputs.positions,
            mask=inputs.mask,
            key_bias=inputs.key_bias,
            cache=cache,
            write_index=inputs.write_index,
        )
        x = nn.with_logical_constraint(x + y, ("batch", None, "embed"))
        cache = inner.pop("cache")
        looks = None
        if inputs.probe is not None:
            query, key = inner["query"], inner["key"]
            looks = attention_rows(query, key, *inputs.probe, self.attend.scale)
        y, stats = self.mlp_norm(x), {}
        if self.moe is None:
            y = self.feed_forward(y)
        else:
            y, stats = self.feed_forward(y, inputs.live)
        x = nn.with_logical_constraint(x + y, ("batch", None, "embed"))
        return x, ((cache, stats, looks), inner)

    def look(self, x: jax.Array, positions: jax.Array, last: jax.Array) -> dict[str, jax.Array]:
        """Keys of all places and the query of one place a row, as this layer would make them.

        The queries have the shape of all places, zero but for `last`: only that row is computed.
        """
        y = self.attention_norm(x)
        key, plain_key = self.attend.keys(y, positions)
        row = jnp.take_along_axis(y, last[:, None, None], axis=1)
        queries = self.attend.queries(row, jnp.take_along_axis(positions, last[:, None], axis=1))
        rows = jnp.arange(x.shape[0])
        query, plain_query = (
            jnp.zeros((*x.shape[:2], *q.shape[2:]), q.dtype).at[rows, last].set(q[:, 0])
            for q in queries
        )
        return dict(query=query, key=key, plain_query=plain_query, plain_key=plain_key)
