"""Scores of sparsevlm: words that rate, and the part of attention due to rotary positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.compressors.in_decoder.rows import judges
from efficient_vlm.compressors.signals import DecoderState
from efficient_vlm.shapes import Array

# Least value by which attention is divided, relative to the largest rotary bias.
FLOOR = 0.05


def raters(state: DecoderState) -> Bool[Array, "B L"]:
    """Words of the prompt with more than the mean relevance of its words."""
    count = state.live.shape[1] - state.prompt.shape[1]
    asked = judges(state, visual=False)[:, count:]
    visual = jnp.where(state.first_live[..., None], state.first_visual, 0).astype(jnp.float32)
    text = jnp.where(asked[..., None], state.first_text, 0).astype(jnp.float32)
    logits = jnp.einsum("bnd,bld->bnl", visual, text, precision=jax.lax.Precision.HIGHEST)
    # A finite floor: without a prompt the softmax is uniform, and there are no raters.
    share = jax.nn.softmax(jnp.where(asked[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    share = jnp.sum(jnp.where(state.first_live[..., None], share, 0.0), axis=1)
    share = jnp.where(asked, share, 0.0)
    words = jnp.maximum(jnp.sum(asked, axis=1, keepdims=True), 1)
    mean = jnp.sum(share, axis=1, keepdims=True) / words
    # Equal words differ in relevance by rounding, which must not select among them.
    above = asked & (share > mean * (1 + 1e-5))
    return jnp.where(jnp.any(above, axis=1, keepdims=True), above, asked)


def turns(state: DecoderState, fraction: float) -> Float[Array, "B S angles"]:
    """Cosine and sine of the rotation of each channel pair, float32 [B, S, pairs * 2].

    The state holds no positions, so they are derived from queries and keys with and without rotary
    positions, whose channels i and i + pairs rotate together. A pair that is 0 in all heads counts
    as not rotated.
    """
    pairs = int(state.query.shape[-1] * fraction) // 2

    def halves(query, key):
        both = jnp.concatenate([query, key], axis=2)[..., : 2 * pairs].astype(jnp.float32)
        both = jnp.where(state.live[..., None, None], both, 0.0)
        return both[..., :pairs], both[..., pairs:]

    (x, y), (u, v) = halves(state.plain_query, state.plain_key), halves(state.query, state.key)
    cos, sin = jnp.sum(u * x + v * y, axis=2), jnp.sum(v * x - u * y, axis=2)
    length = jnp.sqrt(jnp.square(cos) + jnp.square(sin))
    turned = length > 0
    length = jnp.where(turned, length, 1.0)
    return jnp.concatenate(
        [jnp.where(turned, cos / length, 1.0), jnp.where(turned, sin / length, 0.0)], axis=-1
    )


def rotary_bias(
    state: DecoderState,
    turned: Float[Array, "B S angles"],
    rows: Int[Array, " r"],
    floor: float = FLOOR,
) -> Float[Array, "B r S"]:
    """D_mn = <rotate_m(1), rotate_n(1)> / Dh for some rows m and all positions n; 1 at distance 0.

    Args:
      state: gives Dh; channels that are not in `turned` do not rotate.
      turned: float32 [B, S, pairs * 2], see `turns`.
      rows: int [r].
      floor: the least value.

    Returns:
      float32 [B, r, S].
    """
    width = state.query.shape[-1]
    # Elementwise, fused with the reduction: no matrix product.
    alike = jnp.sum(turned[:, rows][:, :, None] * turned[:, None], axis=-1)
    return jnp.maximum((2 * alike + width - turned.shape[-1]) / width, floor)
