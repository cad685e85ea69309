"""The key-value cache: explicit, with one static length per decoder segment."""

import jax
from flax import struct


@struct.dataclass
class SegmentCache:
    """Keys and values of the layers of one segment.

    Slots: [visual tokens of this segment | prompt, padded | generated].

    Attributes:
      key, value: [layers, B, S, Hkv, Dh]; keys are already rotated. A tuple over the layers where
        parameters are split (`models.stack.unstack`): no step then copies all of them.
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
