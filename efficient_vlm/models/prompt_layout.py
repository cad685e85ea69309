"""Where tokens stand in a prompt: images anywhere in the text, and what becomes of their places.

In memory visual tokens always come first and text behind them; attention does not care about the
order in memory. What it does care about is carried here: the place of each token in the prompt (for
causal masks and windows), its rotary position, and the block in which tokens see each other.
"""

import jax
import jax.numpy as jnp
from flax import struct

from efficient_vlm.compressors import VisualTokens


@struct.dataclass
class Placement:
    """Places of a batch of prompts. Rows R, text tokens S, slots V for visual tokens.

    A slot is a place that a visual token of the uncompressed model would take.

    Attributes:
      visual_index, text_index: int32 [R, V] and [R, S], place in the prompt, from 0.
      visual_position, text_position: rotary positions, int32 [R, V] and [R, S], or with a last axis
        for models with several position axes (M-RoPE).
      visual_block, text_block: int32 [R, V] and [R, S], 0 for tokens of no block, see
        `kernels.attention.make_mask`.
      next_index, next_position: int32 [R], of the first token to be generated.
      visual_segment: int32 [R, V], the conversation of each slot where a row holds several about
        pictures of their own (`ModelInputs.segments`); None where all text sees all pictures. A
        compressor must not merge tokens of two conversations.
    """

    visual_index: jax.Array
    text_index: jax.Array
    visual_position: jax.Array
    text_position: jax.Array
    visual_block: jax.Array
    text_block: jax.Array
    next_index: jax.Array
    next_position: jax.Array
    visual_segment: jax.Array | None = None


def held_mean(visual: VisualTokens, values: jax.Array) -> jax.Array:
    """For each token the mean of what the slots that it holds carry.

    Args:
      visual: T tokens a row over V slots; `source` says which slot went where.
      values: [R, V, ...].

    Returns:
      float32 [R, T, ...]. A token that holds nothing gets what the next one that does gets, or the
      last: padding, and cells of `pool` that only have the lesser part of each of their slots.
    """
    slots, count = visual.source.shape[1], visual.embed.shape[1]
    flat = values.astype(jnp.float32).reshape(values.shape[0], slots, -1)
    holds = jax.nn.one_hot(visual.source, count, dtype=jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    total = jnp.einsum("rvt,rvc->rtc", holds, flat, precision=exact)
    held = holds.sum(axis=1)
    mean = total / jnp.maximum(held, 1.0)[..., None]
    if count:
        # Place 0 would be in front of the prompt, where all text sees it.
        place = jnp.arange(count)
        following = jax.lax.cummin(jnp.where(held > 0, place, count), axis=1, reverse=True)
        last = jnp.max(jnp.where(held > 0, place, 0), axis=1, keepdims=True)
        mean = jnp.take_along_axis(mean, jnp.minimum(following, last)[..., None], axis=1)
    return mean.reshape(values.shape[0], count, *values.shape[2:])


def place_tokens(
    placement: Placement,
    visual: VisualTokens,
    text_live: jax.Array,
    policy: str,
    text_segments: jax.Array | None = None,
) -> Placement:
    """The placement of the visual tokens that are left.

    Args:
      placement: of all slots.
      visual: T tokens over those slots.
      text_live: bool [R, S].
      policy: "retain" keeps positions (the mean, for merged tokens); "reindex" closes the gaps:
        the distinct positions of all live tokens, on all axes together, are numbered from the
        smallest on. With nothing dropped that changes nothing.
      text_segments: int [R, S], needed where the placement has `visual_segment`: positions of each
        conversation are then numbered by themselves.

    Returns:
      The placement with a slot for each token; places in the prompt are kept in either case.
    """
    if visual.source.shape[1] == 0:
        return placement
    index, position, block = (
        held_mean(visual, value)
        for value in (
            placement.visual_index,
            placement.visual_position,
            placement.visual_block,
        )
    )
    square = held_mean(visual, jnp.square(placement.visual_block.astype(jnp.float32)))
    of_one = jnp.abs(square - jnp.square(block)) < 1e-3
    segment = placement.visual_segment
    if segment is not None:
        segment = jnp.round(held_mean(visual, segment)).astype(jnp.int32)
    text, after = placement.text_position, placement.next_position
    if policy == "reindex" and segment is None:
        position, text, after = _close_gaps(position, text, after, visual.mask, text_live)
    elif policy == "reindex":
        both = jnp.concatenate([position, text.astype(jnp.float32)], axis=1)
        live = jnp.concatenate([visual.mask, text_live], axis=1)
        numbers = jnp.concatenate([segment, text_segments], axis=1)
        both = _closed_apart(both, live, numbers)
        position, text = jnp.split(both, [position.shape[1]], axis=1)
    return placement.replace(
        visual_index=index,
        visual_position=position,
        # Tokens of two blocks merged into one are of neither.
        visual_block=jnp.where(of_one, jnp.round(block), 0).astype(jnp.int32),
        text_position=text,
        next_position=after,
        visual_segment=segment,
    )


def _close_gaps(visual, text, after, visual_live, text_live):
    """Positions numbered without gaps; see `place_tokens`."""
    axes = visual.ndim - 2
    rows = visual.shape[0]

    def spread(live, positions):
        live = live.reshape(*live.shape, *(1,) * axes)
        return jnp.broadcast_to(live, positions.shape).reshape(rows, -1)

    both = [visual.astype(jnp.float32), text.astype(jnp.float32)]
    values = jnp.concatenate([x.reshape(rows, -1) for x in both], axis=1)
    live = jnp.concatenate([spread(visual_live, visual), spread(text_live, text)], axis=1)
    far = jnp.finfo(jnp.float32).max
    ordered = jnp.sort(jnp.where(live, values, far), axis=1)
    first = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first &= ordered < far
    rank = jnp.cumsum(first, axis=1) - first  # Distinct values below each.
    # Whole also where the first token is merged, of positions 0 and 1: generated ones are.
    start = jnp.floor(ordered[:, :1])
    count = first.sum(axis=1)

    def renumber(x):
        place = jax.vmap(jnp.searchsorted)(ordered, x.reshape(rows, -1))
        place = jnp.minimum(place, ordered.shape[1] - 1)
        new = start + jnp.take_along_axis(rank, place, axis=1)
        return new.reshape(x.shape)

    # The token behind everything: one above the highest position that is left.
    return *(renumber(x) for x in both), (start[:, 0] + count).astype(after.dtype)


def _closed_apart(positions: jax.Array, live: jax.Array, segments: jax.Array) -> jax.Array:
    """Positions [R, N, ...] numbered without gaps in each conversation; see `place_tokens`.

    Args:
      positions: float32.
      live: bool [R, N].
      segments: int [R, N], of the conversations.
    """
    rows, axes = len(positions), positions.shape[2:]

    def spread(x):
        x = x.reshape(*x.shape, *(1,) * len(axes))
        return jnp.broadcast_to(x, positions.shape).reshape(rows, -1)

    live, segments = spread(live), spread(segments)
    values = jnp.where(live, positions.reshape(rows, -1), 0.0)
    segments = jnp.where(live, segments, jnp.iinfo(jnp.int32).max)
    place = jnp.broadcast_to(jnp.arange(values.shape[1]), values.shape)
    segments, values, order = jax.lax.sort((segments, values, place), dimension=1, num_keys=2)

    def changes(x):
        return jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    begins = changes(segments)
    rank = jnp.cumsum(begins | changes(values), axis=1)
    # Ranks and places rise, so the last one that began is the largest so far.
    base = jax.lax.cummax(jnp.where(begins, rank, 0), axis=1)
    begin = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    start = jnp.floor(jnp.take_along_axis(values, begin, axis=1))
    new = start + (rank - base)
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(new, back, axis=1).reshape(positions.shape)
