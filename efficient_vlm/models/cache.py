"""The key-value cache: explicit, with one static length per decoder segment."""

from typing import Any

import jax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from efficient_vlm.sharding import CACHE_AXES, constrain, spec_of


@struct.dataclass
class SegmentCache:
    """Keys and values of the layers of one segment.

    Slots: [visual tokens of this segment | prompt, padded | generated].

    Attributes:
      key, value: [layers, B, S, Hkv, Dh]; keys are already rotated. A tuple over the layers where
        parameters are split (`nn.stack.unstack`): no step then copies all of them.
      live: bool [B, S], slots that hold a token.
      bias: float32 [B, S], added to the attention logits of each key.
      index: int or float [B, S], place of each token in the prompt, for windows.
      behind: [B], rotary position of the first generated token.
      start: slot of the first generated token (static).
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    live: jax.Array
    bias: jax.Array
    index: jax.Array
    behind: jax.Array
    start: int = struct.field(pytree_node=False)


@struct.dataclass
class KVCache:
    """All segments, and how many tokens have been generated.

    Attributes:
      segments: one cache per decoder segment.
      generated: int32 scalar, tokens written since the prompt.
    """

    segments: tuple[SegmentCache, ...]
    generated: jax.Array

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        kept = [(s.key, s.value) for s in self.segments]
        return sum(part.nbytes for part in jax.tree.leaves(kept))


def cache_shardings(cache: KVCache, mesh: Mesh) -> KVCache:
    """A tree of `NamedSharding` like a cache: rows over the batch's axes, heads over "tensor".

    Args:
      cache: arrays or their shapes.
      mesh: see `sharding.make_mesh`.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _axes(path, leaf)
        return NamedSharding(mesh, spec_of(names, leaf.shape, mesh.shape, what="the cache"))

    return jax.tree_util.tree_map_with_path(place, cache)


def constrained(cache: KVCache) -> KVCache:
    """A cache that lies as `cache_shardings` says on the mesh that is set; without one as it is."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *_axes(path, x)), cache)


def _axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
    if any(getattr(key, "name", None) in ("key", "value") for key in path):
        return (*(None,) * (leaf.ndim - len(CACHE_AXES)), *CACHE_AXES)
    return ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ()
