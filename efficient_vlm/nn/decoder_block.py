"""One layer of the decoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Bool, Float, Int, Real

from efficient_vlm.kernels.attention import Mask, choose
from efficient_vlm.nn.attention import Attention, attention_rows
from efficient_vlm.nn.kv_cache import Slots
from efficient_vlm.nn.linear import Dtype
from efficient_vlm.nn.mlp import FeedForward
from efficient_vlm.nn.moe import MoE
from efficient_vlm.nn.norms import make_norm
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import constrain

# Where a layer normalises: the inputs of its sublayers; their outputs (OLMo2); both (Gemma2); or
# once, the common input of attention and feed-forward (Phi).
NORM_LAYOUTS = ("pre", "post", "sandwich", "parallel")


@struct.dataclass
class LayerInputs:
    """Inputs that all layers of a run share, besides the hidden states.

    Attributes:
      positions: [B, S] or [B, S, axes], rotary positions.
      mask: keys that each query attends to, see `kernels.attention.make_mask`.
      key_bias: float32 [B, Skv], added to the logits of each key.
      live: bool [B, S], positions that hold a token (the router counts only these).
      slots: see `attention.Attention`.
      probe: (int [B, R], bool [B, T]), rows whose attention to T visual keys is returned, or None.
      local_mask: replaces `mask` in local layers; None without them.
    """

    positions: Real[Array, "B S *axes"]
    mask: Mask
    key_bias: Float[Array, "B Skv"]
    live: Bool[Array, "B S"]
    slots: Slots | None = None
    probe: tuple[Int[Array, "B R"], Bool[Array, "B T"]] | None = None
    local_mask: Mask | None = None

    def mask_of(self, local: Any) -> Mask:
        """The mask of a local or global layer; `local` is a bool, static or traced."""
        return self.mask if self.local_mask is None else choose(local, self.local_mask, self.mask)


class DecoderBlock(nn.Module):
    """Attention, then a feed-forward layer or a mixture of experts, with norms around them.

    Attributes:
      attention: fields of `attention.Attention`.
      mlp: fields of `mlp.FeedForward`; not used with `moe`.
      moe: fields of `moe.MoE`, or None.
      norm, norm_epsilon: see `norms.make_norm`.
      norm_layout: one of NORM_LAYOUTS.
    """

    attention: Mapping[str, Any]
    mlp: Mapping[str, Any]
    moe: Mapping[str, Any] | None
    dtype: Dtype
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_layout: str = "pre"

    def setup(self):
        def norm():
            return make_norm(self.norm, self.norm_epsilon, dtype=self.dtype)

        layout = self.norm_layout
        if layout != "post":
            self.attention_norm = norm()
        if layout in ("post", "sandwich"):
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.attend = Attention(**self.attention, dtype=self.dtype, name="attention")
        if layout in ("pre", "sandwich"):
            self.mlp_norm = norm()
        if self.moe is None:
            self.feed_forward = FeedForward(**self.mlp, dtype=self.dtype, name="mlp")
        else:
            out_scale = self.attention["out_scale"]
            self.feed_forward = MoE(**self.moe, out_scale=out_scale, dtype=self.dtype, name="moe")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        inputs: LayerInputs,
        cache: tuple | None,
        local: Any = False,
    ) -> tuple[Float[Array, "B S D"], tuple[tuple, dict[str, Any]]]:
        """Applies the layer.

        Args:
          x: hidden states.
          inputs: those that all layers share.
          cache: keys and values of this layer, see `attention.Attention`, or None.
          local: bool, static or traced, whether this is a local layer.

        Returns:
          The new hidden states, and a pair: (cache, router statistics, attention of the probed
          rows), and the inputs of attention: query, key, plain_query, plain_key, mask, lse.
        """
        mask = inputs.mask_of(local)
        entered = self._entering(x)
        y, inner = self.attend(
            entered,
            inputs.positions,
            mask=mask,
            key_bias=inputs.key_bias,
            cache=cache,
            slots=inputs.slots,
            local=local,
        )
        if self.norm_layout in ("post", "sandwich"):
            y = self.attention_post_norm(y)
        x = constrain(x + y, "batch", "tokens", None)
        cache = inner.pop("cache")
        inner = {
            name: inner[name]
            for name in ("query", "key", "plain_query", "plain_key", "mask", "lse")
        }
        looks = None
        if inputs.probe is not None:
            own = (self.attend.scale, self.attend.softcap, inputs.key_bias, mask)
            looks = attention_rows(inner["query"], inner["key"], *inputs.probe, *own)
        y, stats = x, {}
        if self.norm_layout in ("pre", "sandwich"):
            y = self.mlp_norm(x)
        elif self.norm_layout == "parallel":
            y = entered
        if self.moe is None:
            y = self.feed_forward(y)
        else:
            y, stats = self.feed_forward(y, inputs.live)
        if self.norm_layout in ("post", "sandwich"):
            y = self.mlp_post_norm(y)
        x = constrain(x + y, "batch", "tokens", None)
        return x, ((cache, stats, looks), inner)

    def _entering(self, x: jax.Array) -> jax.Array:
        return x if self.norm_layout == "post" else self.attention_norm(x)

    def look(
        self,
        x: Float[Array, "B S D"],
        positions: Real[Array, "B S *axes"],
        last: Int[Array, " B"],
        local: Any = False,
    ) -> dict[str, Float[Array, "B S _ Dh"]]:
        """Keys of all positions and one query per row, as this layer would compute them.

        Queries have the shape of all positions and are zero except at `last`, the only row that is
        computed.
        """
        y = self._entering(x)
        key, plain_key = self.attend.keys(y, positions, local)
        rows = jnp.arange(x.shape[0])
        row, position = y[rows, last][:, None], positions[rows, last][:, None]
        queries = self.attend.queries(row, position, local)
        query, plain_query = (
            jnp.zeros((*x.shape[:2], *q.shape[2:]), q.dtype).at[rows, last].set(q[:, 0])
            for q in queries
        )
        return dict(query=query, key=key, plain_query=plain_query, plain_key=plain_key)
