"""What a compressor may read beside the tokens: Signals, with B images, N patches, D channels."""

import flax
from jaxtyping import Bool, Float, Int

from efficient_vlm.kernels.attention import Mask
from efficient_vlm.shapes import Array


@flax.struct.dataclass
class DecoderState:
    """The input of a method inside the decoder: the layer before the cut, or the one after it.

    S = T + L positions: T visual tokens (padding included), then L text tokens. Fields that a
    method does not read are never computed.

    Attributes:
      query, key: [B, S, H, Dh] and [B, S, Hkv, Dh] of that layer, with rotary positions.
      plain_query, plain_key: the same before rotary positions.
      live: bool [B, S], positions that hold a token.
      prompt: bool [B, L], text tokens before the answer, the only ones that may score.
      last: int [B], index 0..S-1 of the last prompt token.
      bias: float32 [B, S], added to the logits of each key.
      before: [B, S, D], inputs of the layer.
      after: [B, S, D], its outputs; the visual part is the `embed` of the tokens.
      first_visual, first_text: [B, N, D] and [B, L, D], inputs of the decoder's first layer.
      first_live: bool [B, N], which of the first visual tokens are real.
      mask: keys that each position attends to in that layer; None for all up to itself.
      lse: float32 [B, H, S], log-sum-exp of that layer's logits; None if it was not computed.
      scale: static, multiplies the logits.
      softcap: static, of the logits, see `kernels.attention`.
      bidirectional: static, whether visual tokens attend to all visual tokens or earlier ones only.
    """

    query: Float[Array, "B S H Dh"]
    key: Float[Array, "B S Hkv Dh"]
    plain_query: Float[Array, "B S H Dh"]
    plain_key: Float[Array, "B S Hkv Dh"]
    live: Bool[Array, "B S"]
    prompt: Bool[Array, "B L"]
    last: Int[Array, " B"]
    bias: Float[Array, "B S"]
    before: Float[Array, "B S D"]
    after: Float[Array, "B S D"]
    first_visual: Float[Array, "B N D"]
    first_text: Float[Array, "B L D"]
    first_live: Bool[Array, "B N"]
    mask: Mask | None = None
    lse: Float[Array, "B H S"] | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)
    bidirectional: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Signals:
    """Further inputs of a compressor; only those that it declares in `needs` are set.

    Attributes:
      attention_row: float32 [B, N], attention that each patch receives in the encoder; the
        compressor's `intermediates` name the query and the layer.
      middle_row: the same from a second layer.
      keys: [B, N, H, Dh], attention keys of an encoder layer, one vector per head.
      text: [B, Dt], one embedding of the instruction per row.
      hidden: [B, N, D], features of a second encoder layer.
      pixels: [B, N, C], normalised pixels of each patch.
      decoder: input of methods inside the decoder.
    """

    attention_row: Float[Array, "B N"] | None = None
    middle_row: Float[Array, "B N"] | None = None
    keys: Float[Array, "B N H Dh"] | None = None
    text: Float[Array, "B Dt"] | None = None
    hidden: Float[Array, "B N D"] | None = None
    pixels: Float[Array, "B N C"] | None = None
    decoder: DecoderState | None = None


NO_SIGNALS = Signals()
