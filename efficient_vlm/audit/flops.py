"""FLOPs, token counts and KV bytes of a model, from its fields alone: nothing is run or allocated.

Conventions, the same everywhere in this project:

* 2 FLOPs per multiply-add; every matrix product counts, nothing else does (norms, softmax,
  activations, rotary positions, gathers, sorting and image resizing count as 0).
* Attention counts the full rectangle queries x keys, also where a mask hides half of it: a dense
  kernel computes it, and papers count it. A causal kernel that skips hidden blocks does less.
* A mixture of experts counts the router, `top_k` experts a token, the weighted sum of their outputs
  and the shared expert; blocks padded by an implementation are not counted.
* Decoding counts keys over the whole static cache, as the program reads it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from efficient_vlm import compressors
from efficient_vlm.audit.records import STAGES
from efficient_vlm.errors import UserError
from efficient_vlm.models.decoder import Decoder
from efficient_vlm.models.vit import ViT
from efficient_vlm.models.vlm import VisionLanguageModel

_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """Tokens that one decoder layer processes in prefill, and its segment."""

    segment: int
    visual: int
    text: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one question about its image(s) costs.

    Attributes:
      visual_tokens: tokens that enter the decoder.
      flops: prefill FLOPs by stage. "compressor" is everything between the encoder and the first
        decoder layer (compressor, its signals, connector) plus compressors between segments; "head"
        is the logits of the first generated token.
      decode_flops: of each further token, decoder and head.
      kv_bytes: keys and values of all layers, each segment at its own static length.
      layers: of the decoder, in order.
    """

    visual_tokens: int
    flops: dict[str, int]
    decode_flops: int
    kv_bytes: int
    layers: tuple[LayerTokens, ...]

    @property
    def total(self) -> int:
        """FLOPs of all stages up to the first generated token."""
        return sum(self.flops.values())

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens processed, mean over decoder layers."""
        return sum(layer.visual for layer in self.layers) / max(len(self.layers), 1)


def dense(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of [tokens, inputs] @ [inputs, outputs]."""
    return 2 * tokens * inputs * outputs


def attention(
    queries: int, keys: int, width: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """FLOPs of an attention layer: projections of the queries' tokens, QK^T and PV over keys."""
    heads = num_heads * head_dim
    projections = dense(queries, width, heads + 2 * num_kv_heads * head_dim)
    return projections + 2 * dense(queries, heads, keys) + dense(queries, heads, width)


def mixture(tokens: int, width: int, moe: Mapping[str, Any]) -> int:
    """FLOPs of a mixture-of-experts layer of SwiGLU experts; `moe` holds the fields of `MoE`."""
    routed = tokens * moe["top_k"]
    router = dense(tokens, width, moe["num_experts"])
    experts = 3 * dense(routed, width, moe["expert_dim"])
    shared = 3 * dense(tokens, width, moe.get("shared_dim") or 0)
    return router + experts + 2 * routed * width + shared


def encoder_flops(vit: ViT, patches: int) -> int:
    """FLOPs of a vision transformer over one image of `patches` patches."""
    pixels = _CHANNELS * vit.patch_size**2
    if vit.stem_dim is None:
        embedding = dense(patches, pixels, vit.width)
    else:
        embedding = dense(patches, pixels, vit.stem_dim) + dense(patches, vit.stem_dim, vit.width)
    head_dim = vit.width // vit.num_heads
    block = attention(patches, patches, vit.width, vit.num_heads, vit.num_heads, head_dim)
    block += 2 * dense(patches, vit.width, vit.mlp_dim)
    return embedding + vit.depth * block


def layer_flops(decoder: Decoder, queries: int, keys: int) -> int:
    """FLOPs of one decoder layer for `queries` new tokens that look at `keys` keys."""
    heads, kv_heads, dim = decoder.num_heads, decoder.kv_heads, decoder.dim
    total = attention(queries, keys, decoder.width, heads, kv_heads, dim)
    if decoder.moe is not None:
        return total + mixture(queries, decoder.width, decoder.moe)
    return total + 3 * dense(queries, decoder.width, decoder.mlp_dim)


def published_layer_flops(
    tokens: int, width: int, mlp_dim: int, matrices: int, *, per_multiply_add: int = 1
) -> int:
    """One layer as papers count it: 4 n d^2 + 2 n^2 d + k n d m, a multiply-add usually once.

    Args:
      tokens: n; papers differ in whether text is in it.
      width, mlp_dim: d, m.
      matrices: k, 2 (FastV, DivPrune: the SwiGLU gate forgotten) or 3 (PyramidDrop, SparseVLM).
      per_multiply_add: 1, or 2 as in M3 (arXiv 2405.17430).
    """
    products = 4 * tokens * width**2 + 2 * tokens**2 * width + matrices * tokens * width * mlp_dim
    return per_multiply_add * products


def amdahl(accelerated: float, speedup: float = math.inf) -> float:
    """Largest end-to-end speed-up when a share of the work gets faster and the rest does not.

    Args:
      accelerated: share of the time (or FLOPs) that the method touches, 0 to 1.
      speedup: of that share; infinite for the bound.

    Raises:
      UserError: a share outside [0, 1] or a speed-up not above 0.
    """
    if not 0 <= accelerated <= 1 or not speedup > 0:
        raise UserError(
            f"amdahl: share {accelerated} made {speedup} times faster",
            allowed="a share from 0 to 1 and a speed-up above 0",
        )
    rest = 1 - accelerated + accelerated / speedup
    return 1 / rest if rest else math.inf


def model_cost(
    model: VisionLanguageModel,
    *,
    text_tokens: int,
    new_tokens: int = 1,
    images: int = 1,
    image_size: int | tuple[int, int] | None = None,
) -> Cost:
    """Counts one question about one row of images, batch 1.

    Args:
      model: any configuration; it is not initialised.
      text_tokens: prompt tokens, padding included if it is computed.
      new_tokens: room for generated tokens in the cache.
      images: images of the row.
      image_size: pixels, one side or (height, width); None for the encoder's own.

    Raises:
      UserError: an image size that is no multiple of the patch size, or a negative length.
    """
    for name, value in (("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value < 0:
            raise UserError(f"{name}: {value}", allowed="0 or more")
    vit, decoder = model.make_encoder(), model.make_decoder()
    compressor = model.make_compressor()
    if image_size is not None:
        vit = vit.clone(image_size=image_size)
    grid = compressor.image_grid(vit.grid)
    patches = grid[0] * grid[1]

    between = compressor.flops(patches, vit.width, decoder.width)
    if "attention_row" in compressor.needs:
        # The scan over layers computes the row in each of them, though only the last is used.
        between += vit.depth * dense(1, vit.width, patches)
    joined = getattr(compressor, "features", None) or vit.width  # Width of what it gives out.
    between += _connector(model.connector, joined, decoder.width, compressor.budget)
    between *= images

    visual = compressor.budget * images
    entering, layers, prefill, decode, kv_tokens = visual, [], 0, 0, 0
    for index, segment in enumerate(decoder.segments):
        if segment.get("compressor"):
            inner = compressors.build(**segment["compressor"], parent=None)
            between += inner.flops(visual, decoder.width, decoder.width)
            visual = inner.budget
        count, length = segment["layers"], visual + text_tokens
        prefill += count * layer_flops(decoder, length, length)
        decode += count * layer_flops(decoder, 1, length + new_tokens)
        kv_tokens += count * (length + new_tokens)
        layers += [LayerTokens(index, visual, text_tokens)] * count
    head = dense(1, decoder.width, decoder.vocab_size)
    per_token = 2 * decoder.kv_heads * decoder.dim * jnp.dtype(decoder.dtype).itemsize
    stages = (images * encoder_flops(vit, patches), between, prefill, head)
    return Cost(
        visual_tokens=entering,
        flops=dict(zip(STAGES, stages, strict=True)),
        decode_flops=decode + head,
        kv_bytes=kv_tokens * per_token,
        layers=tuple(layers),
    )


def _connector(connector: Mapping[str, Any], inputs: int, outputs: int, tokens: int) -> int:
    outputs = connector.get("features", outputs)
    hidden = connector.get("hidden_dim")
    if hidden is None:
        return dense(tokens, inputs, outputs)
    return dense(tokens, inputs, hidden) + dense(tokens, hidden, outputs)
