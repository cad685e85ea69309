"""The types every compressor speaks: VisualTokens and Signals, and their two book-keepers.

Notation: B images, T tokens now, N patches of the source grid, D width. One invariant runs through
all methods: `source` says where each patch went, `size` how many patches a token stands for.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from efficient_vlm.compressors import grids
from efficient_vlm.kernels.attention import Mask
from efficient_vlm.shapes import Array


@flax.struct.dataclass
class VisualTokens:
    """A batch of visual tokens, real or padding.

    Attributes:
      embed: [B, T, D], any float dtype.
      position: float32 [B, T, 2], (row, column) in patch units of the source grid; the
        size-weighted mean for merged tokens.
      size: float32 [B, T], how many patches the token stands for; 0 for padding.
      mask: bool [B, T], True for real tokens.
      source: int32 [B, N], for each patch the index of the token that holds it, -1 if no token does
        (dropped, or the patch itself was padding).
      bias: float32 [B, T] to add to the attention logits of these tokens as keys, or None.
    """

    embed: Float[Array, "B T D"]
    position: Float[Array, "B T 2"]
    size: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    source: Int[Array, "B N"]
    bias: Float[Array, "B T"] | None = None

    @classmethod
    def from_grid(
        cls,
        embed: Float[Array, "B T D"],
        grid: grids.Grid,
        source_grid: grids.Grid | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> "VisualTokens":
        """Tokens of an encoder that ran on `grid`.

        Args:
          embed: [B, h*w, D] in raster order.
          grid: (h, w).
          source_grid: (H, W) of the image before it was resized, at least `grid`; None if it was
            not. A token then covers H*W / (h*w) patches, its position is the mean of the patches
            it covers, weighted by the covered area, and each patch belongs to the token that covers
            most of it.
          mask: bool [B, h*w], None for all real.

        Raises:
          ValueError: the shapes do not fit.
        """
        fine, coarse = tuple(source_grid or grid), tuple(grid)
        batch, num_tokens, _ = embed.shape
        if num_tokens != coarse[0] * coarse[1]:
            raise ValueError(f"embed has {num_tokens} tokens, the grid {coarse} another number")
        if fine[0] < coarse[0] or fine[1] < coarse[1]:
            raise ValueError(f"source_grid {fine} is smaller than the grid {coarse}")
        if mask is None:
            mask = jnp.ones((batch, num_tokens), bool)
        centres = []
        for f, c in zip(fine, coarse, strict=True):
            cover = grids.overlap(f, c)
            centres.append(cover @ np.arange(f) / cover.sum(axis=1))
        position = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
        covered = fine[0] * fine[1] / num_tokens
        holder = jnp.asarray(grids.holders(fine, coarse))
        held = mask if fine == coarse else mask[:, holder]
        return cls(
            embed=embed,
            position=jnp.broadcast_to(jnp.asarray(position, jnp.float32), (batch, num_tokens, 2)),
            size=jnp.where(mask, jnp.float32(covered), 0.0),
            mask=mask,
            source=jnp.where(held, holder, -1),
        )


@flax.struct.dataclass
class DecoderState:
    """What a method inside the decoder sees: the layer before the cut (or the one behind it).

    S = T + L places: T visual tokens (padding included), then L text tokens. What a method does not
    read is never computed.

    Attributes:
      query, key: [B, S, H, Dh] and [B, S, Hkv, Dh] of that layer, with rotary positions.
      plain_query, plain_key: the same before rotary positions.
      live: bool [B, S], places that hold a token.
      prompt: bool [B, L], text tokens before the answer: the only ones that may judge.
      last: int [B], place in 0..S-1 of the last prompt token.
      bias: float32 [B, S], added to the logits of each key.
      before: [B, S, D], hidden states that entered the layer.
      after: [B, S, D], those that left it; the visual part is the `embed` of the tokens.
      first_visual, first_text: [B, N, D] and [B, L, D], what entered the decoder's first layer.
      first_live: bool [B, N], which of the first visual tokens are real.
      mask: which keys each place sees in that layer; None for all places up to its own.
      lse: float32 [B, H, S], logarithm of the sum of exponentials of the logits of that layer; None
        where it was not computed.
      scale: static, multiplies the logits.
      softcap: static, of the logits, see `kernels.attention`.
      bidirectional: static, whether visual tokens see all visual tokens or only earlier ones.
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
    """What a compressor may look at beside the tokens; only what it declares in `needs` is set.

    Attributes:
      attention_row: float32 [B, N], attention that each patch receives in the encoder; whose, and
        in which layer, is said by the compressor's `intermediates`.
      middle_row: the same of a second layer.
      keys: [B, N, H, Dh], attention keys of an encoder layer, heads apart.
      text: [B, Dt], one embedding of the instruction per row.
      hidden: [B, N, D], features of a second encoder layer.
      decoder: what methods inside the decoder see.
    """

    attention_row: Float[Array, "B N"] | None = None
    middle_row: Float[Array, "B N"] | None = None
    keys: Float[Array, "B N H Dh"] | None = None
    text: Float[Array, "B Dt"] | None = None
    hidden: Float[Array, "B N D"] | None = None
    decoder: DecoderState | None = None


NO_SIGNALS = Signals()


def zero_padding(tokens: VisualTokens) -> VisualTokens:
    """Zeroes all that padding carries: not even a NaN there can reach a value or a gradient."""
    mask = tokens.mask
    return tokens.replace(
        embed=jnp.where(mask[..., None], tokens.embed, 0),
        position=jnp.where(mask[..., None], tokens.position, 0),
        size=jnp.where(mask, tokens.size, 0),
        bias=None if tokens.bias is None else jnp.where(mask, tokens.bias, 0),
    )


def remap(source: Int[Array, "B N"], holder: Int[Array, "B T"]) -> Int[Array, "B N"]:
    """Follows patches through one more step.

    Args:
      source: int32 [B, N], patch -> token before the step, -1 for none.
      holder: int32 [B, T], token before -> token after the step, -1 for dropped.

    Returns:
      int32 [B, N], patch -> token after the step.
    """
    after = jnp.take_along_axis(holder, jnp.maximum(source, 0), axis=1)
    return jnp.where(source >= 0, after, -1)


def take(
    tokens: VisualTokens, indices: Int[Array, "B K"], valid: Bool[Array, "B K"]
) -> VisualTokens:
    """Keeps the tokens at `indices` and drops the others.

    Args:
      tokens: T tokens a row.
      indices: int32 [B, K] in any order, distinct where valid.
      valid: bool [B, K]; the other slots become padding (zeros, size 0), after the valid ones.

    Returns:
      K tokens a row in source order, whatever the order of `indices`.
    """
    num_tokens, kept = tokens.mask.shape[1], indices.shape[1]
    valid = valid & jnp.take_along_axis(tokens.mask, indices, axis=1)
    # T is past every real index, so one sort gives source order with the padding last.
    slots = jnp.sort(jnp.where(valid, indices, num_tokens), axis=1)
    rows = jnp.arange(slots.shape[0])[:, None]
    holder = jnp.full((slots.shape[0], num_tokens), -1, jnp.int32)
    holder = holder.at[rows, slots].set(jnp.arange(kept, dtype=jnp.int32), mode="drop")
    index = jnp.minimum(slots, num_tokens - 1)

    def gather(x):
        return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

    return zero_padding(
        VisualTokens(
            embed=gather(tokens.embed),
            position=gather(tokens.position),
            size=gather(tokens.size),
            mask=slots < num_tokens,
            source=remap(tokens.source, holder),
            bias=None if tokens.bias is None else gather(tokens.bias),
        )
    )


def weighted_means(
    tokens: VisualTokens, sums: Callable[[jax.Array], jax.Array]
) -> dict[str, Shaped[Array, "B K *C"] | None]:
    """The fields of tokens merged by a linear map: size-weighted means, summed sizes, mask.

    Args:
      tokens: T tokens a row.
      sums: function from float32 [B, T, C] to [B, K, C], adding up the members of each new token.

    Returns:
      embed (in the dtype of the input), position, size, mask and bias of the K tokens; a token
      without real members is padding (zeros).
    """
    tokens = zero_padding(tokens)
    weight = tokens.size[..., None]
    total = sums(weight)
    real = total > 0
    divisor = jnp.where(real, total, 1.0)

    def mean(x):
        return jnp.where(real, sums(x.astype(jnp.float32) * weight) / divisor, 0.0)

    bias = tokens.bias
    return {
        "embed": mean(tokens.embed).astype(tokens.embed.dtype),
        "position": mean(tokens.position),
        "size": total[..., 0],
        "mask": real[..., 0],
        "bias": None if bias is None else mean(bias[..., None])[..., 0],
    }


def merge(tokens: VisualTokens, assignment: Int[Array, "B T"], num_out: int) -> VisualTokens:
    """Merges tokens by assignment: size-weighted means of embed and position, sizes summed.

    The sums are a one-hot matrix product in float32: differentiable, without a scatter, and exact
    for the sizes.

    Args:
      tokens: T tokens a row.
      assignment: int32 [B, T], the new token of each token, -1 to drop it.
      num_out: K, static. New tokens without real members are padding, and stay in their place.
    """
    assignment = jnp.where(tokens.mask, assignment, -1)
    member = jax.nn.one_hot(assignment, num_out, dtype=jnp.float32, axis=1)  # -1 is all zeros.

    def sums(x):
        return jnp.einsum("bkt,btc->bkc", member, x, precision=jax.lax.Precision.HIGHEST)

    return VisualTokens(
        **weighted_means(tokens, sums), source=remap(tokens.source, assignment.astype(jnp.int32))
    )
