"""What a teacher and its student have inside: hidden states and attention of some layers."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Float32

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.nn.attention import attention_rows
from efficient_vlm.nn.decoder_block import LayerInputs
from efficient_vlm.shapes import Array

__all__ = ["Watched", "pieces", "watched"]


@struct.dataclass
class Watched:
    """One layer of the decoder, in a forward pass over R rows of T visual and S text tokens.

    Attributes:
      visual: the visual tokens that this layer has, with their hidden states behind it as `embed`.
      text: [R, S, D], hidden states of the text behind it.
      attention: [R, S, T], of each text token to the visual tokens that it may see, mean over
        heads; sums to 1.
    """

    visual: VisualTokens
    text: Float[Array, "R S D"]
    attention: Float32[Array, "R S T"]


def pieces(start: int, stop: int, watch: tuple[int, ...]) -> list[tuple[int, int]]:
    """Layers `start` to `stop` (excluded) as (first, end), those of `watch` by themselves."""
    alone = {edge for layer in watch for edge in (layer, layer + 1) if start < edge < stop}
    edges = [start, *sorted(alone), stop]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def watched(
    visual: VisualTokens,
    x: jax.Array,
    seen: dict[str, jax.Array],
    inputs: LayerInputs,
    scale: float,
    softcap: float | None,
) -> Watched:
    """What is kept of a layer.

    Args:
      visual: tokens in front of the text.
      x: [R, T + S, D], behind the layer.
      seen: what its attention saw, see `DecoderBlock.__call__`.
      inputs, scale, softcap: of its attention.
    """
    count = visual.mask.shape[1]
    rows = jnp.arange(count, x.shape[1])
    rows = jnp.broadcast_to(rows, (len(x), len(rows)))
    own = (scale, softcap, inputs.key_bias, seen["mask"])
    attention = attention_rows(seen["query"], seen["key"], rows, visual.mask, *own)
    return Watched(visual.replace(embed=x[:, :count]), x[:, count:], attention)
