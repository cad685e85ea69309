"""Attention of a decoder layer, a few query rows at a time and never as a map of S x S.

Fused attention returns no weights, so the rows that a method needs are recomputed from the layer's
queries and keys: O(R S) for R rows. Methods that need all rows sum over blocks of rows, in
O(block S) memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Shaped

from efficient_vlm.compressors.signals import DecoderState
from efficient_vlm.kernels.attention import mask_rows, visible
from efficient_vlm.shapes import Array

HEADS = ("mean", "max", "each")
BLOCK = 64


def num_visual(state: DecoderState) -> int:
    """T: the number of visual tokens among the S positions, padding included."""
    return state.live.shape[1] - state.prompt.shape[1]


def judges(state: DecoderState, *, visual: bool = True, text: bool = True) -> Bool[Array, "B S"]:
    """Rows that may score: live visual positions and those of the prompt, never of an answer."""
    count = num_visual(state)
    asks = state.live[:, count:] & state.prompt
    return jnp.concatenate([state.live[:, :count] & visual, asks & text], axis=1)


def attention_rows(
    state: DecoderState,
    index: Int[Array, "B R"],
    *,
    rotary: bool = True,
    among: Bool[Array, "B S"] | None = None,
) -> Float32[Array, "B H R S"]:
    """softmax(scale q_i K^T + bias) of some query rows i, over the live keys that they attend to.

    The layer's mask says which. Without one, a row attends to the positions up to its own, and a
    visual row of a `bidirectional` decoder to all visual positions. Consecutive query heads share a
    key head (GQA).

    Args:
      state: state of the layer.
      index: int [B, R], positions 0..S-1 of the query rows.
      rotary: False uses queries and keys without rotary positions.
      among: bool [B, S], keys that the softmax runs over; None for all.

    Returns:
      float32 [B, H, R, S], rows that sum to 1, with 0 for hidden keys; rows of empty positions are
      0. The values of padding have no influence.
    """
    query = state.query if rotary else state.plain_query
    key = state.key if rotary else state.plain_key
    batch, places, kv_heads, depth = key.shape
    rows, groups = index.shape[1], query.shape[2] // kv_heads
    lives = jnp.take_along_axis(state.live, index, axis=1)  # [B, R]
    query = jnp.take_along_axis(query, index[:, :, None, None], axis=1)
    # Padding may hold anything. Zeroed before the products, it does not reach a gradient either.
    query = jnp.where(lives[..., None, None], query, 0)
    key = jnp.where(state.live[..., None, None], key, 0)
    # Operands keep their dtype (no float32 copy of all keys); products accumulate in float32.
    logits = jnp.einsum(
        "brkgd,bskd->bkgrs",
        query.reshape(batch, rows, kv_heads, groups, depth),
        key,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).reshape(batch, kv_heads * groups, rows, places)
    bias = jnp.where(state.live, state.bias, 0).astype(jnp.float32)
    logits = logits * state.scale
    if state.softcap is not None:
        logits = state.softcap * jnp.tanh(logits / state.softcap)
    logits = logits + bias[:, None, None]

    if state.mask is not None:
        sees = visible(mask_rows(state.mask, index))
    else:
        key_index, own = jnp.arange(places), index[..., None]
        sees = key_index <= own
        if state.bidirectional:
            count = num_visual(state)
            sees |= (own < count) & (key_index < count)
    sees &= state.live[:, None] & lives[..., None]
    if among is not None:
        sees &= among[:, None]
    sees = sees[:, None]  # [B, 1, R, S]
    if state.lse is not None and rotary and among is None:
        # The layer has computed this log-sum-exp already.
        lse = jnp.take_along_axis(state.lse, index[:, None], axis=2)[..., None]
        return jnp.where(sees, jnp.exp(jnp.where(sees, logits, 0.0) - lse), 0.0)
    top = jnp.max(jnp.where(sees, logits, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weight = jnp.where(sees, jnp.exp(jnp.where(sees, logits - top, 0.0)), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def column_sums(
    state: DecoderState,
    weight: Shaped[Array, "B S"],
    *,
    rotary: bool = True,
    heads: str = "mean",
    block: int = BLOCK,
) -> Float32[Array, "B *heads S"]:
    """sum_i weight_i A_ij: the attention that each position j receives from weighted rows.

    Args:
      state: state of the layer.
      weight: [B, S], weights of the query rows; 0 or False excludes a row.
      rotary: see `attention_rows`.
      heads: "mean" or "max" over the heads of each entry A_ij before the sum (FitPrune takes the
        maximum), or "each" for one sum per head.
      block: query rows per step; memory is O(H block S) per batch row.

    Returns:
      float32 [B, S]; [B, H, S] for heads="each". Matrix FLOPs: `column_flops`.
    """
    return range_sums(state, 0, weight, rotary=rotary, heads=heads, block=block)


def column_means(
    state: DecoderState, rows: Bool[Array, "B S"], **options: Any
) -> Float32[Array, "B *heads S"]:
    """Mean of A_ij over the query rows `rows`; options as in `column_sums`.

    A row that does not attend to j counts as 0, so that all columns have the same divisor. Without
    any rows the result is 0.
    """
    count = jnp.sum(rows, axis=1, dtype=jnp.float32)
    total = column_sums(state, rows, **options)
    return total / jnp.maximum(count, 1.0).reshape(-1, *(1,) * (total.ndim - 1))


def row_flops(num_rows: int, num_places: int, width: int) -> int:
    """Matrix FLOPs of `attention_rows` per image: a product of width H x Dh for each entry."""
    return 2 * num_rows * num_places * width


def column_flops(num_places: int, width: int, block: int = BLOCK) -> int:
    """Matrix FLOPs of `column_sums` per image, with rows rounded up to whole blocks."""
    return range_flops(num_places, num_places, width, block)


def range_sums(
    state: DecoderState,
    start: int,
    weight: Shaped[Array, "B R"],
    *,
    rotary: bool = True,
    heads: str = "mean",
    divisor: Callable[[jax.Array], jax.Array] | None = None,
    block: int = BLOCK,
) -> Float32[Array, "B *heads S"]:
    """`column_sums` that computes only the rows start .. start + R - 1.

    Args:
      state: state of the layer.
      start: static, the first row.
      weight: [B, R], weights of the rows; 0 or False excludes a row.
      rotary: see `attention_rows`.
      heads: as in `column_sums`.
      divisor: maps positions of rows, int [r], to float32 [B, r, S], by which each entry is divided
        first; None for 1.
      block: query rows per step.

    Returns:
      float32 [B, S], or [B, H, S] for heads="each". Matrix FLOPs: `range_flops`.
    """
    batch, rows = weight.shape
    places = state.live.shape[1]
    shape = (batch, state.query.shape[2], places) if heads == "each" else (batch, places)
    total = jnp.zeros(shape, jnp.float32)
    if rows == 0:
        return total
    block = min(block, rows)
    steps = -(-rows // block)
    # Rows past the end repeat the last row with weight 0.
    index = start + jnp.minimum(jnp.arange(steps * block), rows - 1).reshape(steps, block)
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, steps * block - rows)))
    weight = jnp.moveaxis(weight.reshape(batch, steps, block), 1, 0)

    def add(total, step):
        positions, share = step
        own = jnp.broadcast_to(positions, (batch, block))
        attention = attention_rows(state, own, rotary=rotary)
        if divisor is not None:
            attention = attention / divisor(positions)[:, None]
        if heads == "each":
            return total + jnp.sum(attention * share[:, None, :, None], axis=2), None
        attention = attention.mean(axis=1) if heads == "mean" else attention.max(axis=1)
        return total + jnp.sum(attention * share[..., None], axis=1), None

    return jax.lax.scan(add, total, (index, weight))[0]


def range_flops(num_rows: int, num_places: int, width: int, block: int = BLOCK) -> int:
    """Matrix FLOPs of `range_sums` per image."""
    block = min(block, num_rows)
    return row_flops(-(-num_rows // block) * block, num_places, width) if num_rows else 0
