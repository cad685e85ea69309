"""The key-value cache: slots for each row in each decoder segment, and a length for each row.

What a query attends to follows from the place of its token alone. A row that is set back to a
shorter length therefore ignores later slots, although its arrays still hold them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from efficient_vlm.kernels.attention import make_mask
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.nn.decoder_block import LayerInputs
from efficient_vlm.nn.kv_cache import LayerCache, Slots, cache_axes
from efficient_vlm.sharding import constrain, spec_of

__all__ = ["KVCache", "SegmentCache", "cache_shardings", "constrained"]


@struct.dataclass
class SegmentCache:
    """Keys and values of the layers of one segment.

    Slots of a row: [visual tokens of this segment | prompt | further text]. Further text follows
    the prompt of its row directly and overwrites its padding.

    Attributes:
      parts: the arrays of `kv_cache.LayerCache`, each with a leading axis over the layers, or a
        tuple over them where parameters are split (`nn.stack.unstack`), so that no step copies them
        all. Keys are already rotated.
      bias: float32 [B, M], added to the attention logits of each key.
      index: float32 [B, M], place in the prompt of each slot's token, for masks; +inf for empty
        visual slots.
      offset: int32 [B], the rotary position of the first generated token minus the length of the
        prompt.
      pages: int32 [B, T], the pages of each row in order; None for a contiguous cache.
      start: slot of the first text token (static).
    """

    parts: Any
    bias: jax.Array
    index: jax.Array
    offset: jax.Array
    pages: jax.Array | None
    start: int = struct.field(pytree_node=False)

    @property
    def num_layers(self) -> int:
        """Layers of this segment."""
        return len(self.parts[0])

    @property
    def num_slots(self) -> int:
        """Slots per row."""
        return self.index.shape[1]

    def inputs(
        self, lengths: jax.Array, counts: jax.Array, new: int, window: int | None = None
    ) -> LayerInputs:
        """Inputs of the layers for `new` tokens per row.

        Args:
          lengths: int32 [B], text tokens of each row before the new ones.
          counts: int32 [B], how many of the new tokens each row has, the first ones.
          new: static.
          window: of local layers, see `kernels.attention.make_mask`; None without them.
        """
        step = jnp.arange(new)
        live = step < counts[:, None]
        # Absent tokens share the last position: dynamic RoPE reads the largest one.
        text = lengths[:, None] + jnp.minimum(step, jnp.maximum(counts - 1, 0)[:, None])
        slots = self.start + text
        index = jnp.take_along_axis(self.index, jnp.minimum(slots, self.num_slots - 1), axis=1)
        options = dict(q_positions=index, kv_positions=self.index, q_lengths=counts)
        mask = functools.partial(make_mask, new, self.num_slots, causal=True, **options)
        return LayerInputs(
            positions=self.offset[:, None] + text,
            mask=mask(),
            key_bias=self.bias,
            live=live,
            # Slots of absent tokens are past the end, where nothing is written.
            slots=Slots(jnp.where(live, slots, self.num_slots + step), self.pages),
            local_mask=None if window is None else mask(window=window),
        )


@struct.dataclass
class KVCache:
    """The caches of all segments, and the length of each row.

    Attributes:
      segments: one cache per decoder segment.
      lengths: int32 [B], text tokens of each row, prompt included.
    """

    segments: tuple[SegmentCache, ...]
    lengths: jax.Array

    @property
    def room(self) -> int:
        """The most text tokens of a row."""
        return min(part.num_slots - part.start for part in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        parts = jax.tree.leaves([segment.parts for segment in self.segments])
        return sum(part.nbytes for part in parts)

    def rolled_back(self, lengths: jax.Array) -> "KVCache":
        """Rows cut to their first `lengths` text tokens, int32 [B]; longer lengths change nothing.

        For tokens that were only tried (speculative decoding). No array of keys and values is
        touched, and the choices that methods inside the decoder made for the prompt stay.
        """
        return self.replace(lengths=jnp.minimum(lengths, self.lengths).astype(jnp.int32))


def make_segment(
    parts: LayerCache,
    inputs: LayerInputs,
    place: Placement,
    visual: jax.Array,
    lengths: jax.Array,
    paged: bool,
) -> SegmentCache:
    """The cache of a segment after the prompts.

    Args:
      parts: see `SegmentCache`, filled by the layers.
      inputs: those of the layers.
      place: of all tokens that the layers read.
      visual: bool [B, N], visual slots that hold a token.
      lengths: int32 [B], text tokens of each prompt.
      paged: whether `parts` are pools of pages, in the order of the rows.
    """
    (rows, start), keys = visual.shape, jax.tree.leaves(parts)[0]
    pages = keys.shape[-4] // rows
    slots = pages * keys.shape[-2]
    text = jnp.arange(slots - start)
    prompt = jnp.pad(place.text_index, ((0, 0), (0, len(text) - place.text_index.shape[1])))
    generated = place.next_index[:, None] + text - lengths[:, None]
    index = [
        jnp.where(visual, place.visual_index, jnp.inf),
        jnp.where(text < lengths[:, None], prompt, generated),
    ]
    bias = inputs.key_bias
    return SegmentCache(
        parts=parts,
        bias=jnp.pad(bias, ((0, 0), (0, slots - bias.shape[1]))),
        index=jnp.concatenate([x.astype(jnp.float32) for x in index], axis=1),
        offset=(place.next_position - lengths).astype(jnp.int32),
        pages=jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages) if paged else None,
        start=start,
    )


def cache_shardings(cache: KVCache, mesh: Mesh) -> KVCache:
    """A tree of `NamedSharding` like a cache: rows over the batch's axes, heads over "tensor".

    Args:
      cache: arrays or their shapes.
      mesh: see `sharding.make_mesh`.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _axes(cache, path, leaf)
        return NamedSharding(mesh, spec_of(names, leaf.shape, mesh.shape, what="the cache"))

    return jax.tree_util.tree_map_with_path(place, cache)


def constrained(cache: KVCache) -> KVCache:
    """A cache that lies as `cache_shardings` says on the mesh that is set; without one as it is."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: constrain(x, *_axes(cache, path, x)), cache
    )


def _axes(cache: KVCache, path: Any, leaf: Any) -> tuple[str | None, ...]:
    names = [getattr(key, "name", None) for key in path]
    if "parts" not in names:
        return ("batch", *(None,) * (leaf.ndim - 1))
    segment, order = cache.segments[path[1].idx], path[names.index("parts") + 1].idx
    axes = cache_axes(order, segment.pages is not None)
    return (*(None,) * (leaf.ndim - len(axes)), *axes)
