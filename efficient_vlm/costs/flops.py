"""FLOPs, token counts and KV bytes of a model, from its fields alone: nothing is run or allocated.

Conventions, the same everywhere in this project:

* 2 FLOPs per multiply-add; every matrix product counts, nothing else does (norms, softmax,
  activations, rotary positions, gathers, sorting and image resizing count as 0).
* Attention counts the full rectangle queries x keys, also where a mask hides half of it, or all
  but a window: a dense kernel computes it, and papers count it. A kernel that skips hidden blocks
  does less.
* Slots of a picture without a place in the prompt (overlapping crops) are computed, and count.
* A mixture of experts counts the router, `top_k` experts a token (all places of all experts, with a
  capacity), the weighted sum of their outputs and the shared expert; blocks padded by an
  implementation are not counted.
* Decoding counts keys over the whole static cache, as the program reads it.
* A method inside the encoder or decoder shortens everything behind its cut: ToMe, between attention
  and MLP, lets attention see n tokens and the MLP n - r.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from efficient_vlm.compressors.base import Compressor, describe
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.costs.encoder_flops import (
    EncoderLayerTokens,
    after,
    encoder_cost,
    signal_flops,
    with_keys,
)
from efficient_vlm.costs.products import attention, dense, mixture
from efficient_vlm.costs.stages import STAGES
from efficient_vlm.errors import UserError
from efficient_vlm.models.decoder import Decoder
from efficient_vlm.models.encoder import ViT
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """Tokens that one decoder layer processes in prefill, and its segment.

    A segment is a stretch of layers of one length: those of the config, split where a method cuts.
    """

    segment: int
    visual: int
    text: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one question about its image(s) costs.

    Attributes:
      visual_tokens: tokens that enter the decoder.
      flops: prefill FLOPs by stage. "compressor" is everything between the encoder and the first
        decoder layer (compressor, its signals, connector) plus what methods inside the encoder and
        the decoder compute; "head" is the logits of the first generated token.
      decode_flops: of each further token, decoder and head.
      kv_bytes: keys and values of all layers, each segment at its own static length.
      layers: of the decoder, in order.
      encoder_layers: of the encoder, in order, for one image.
      left: visual tokens behind the last decoder layer.
    """

    visual_tokens: int
    flops: dict[str, int]
    decode_flops: int
    kv_bytes: int
    layers: tuple[LayerTokens, ...]
    encoder_layers: tuple[EncoderLayerTokens, ...] = ()
    left: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all stages up to the first generated token."""
        return sum(self.flops.values())

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens processed, mean over decoder layers."""
        return sum(layer.visual for layer in self.layers) / max(len(self.layers), 1)


def layer_flops(decoder: Decoder, queries: int, keys: int, layer: int = 0) -> int:
    """FLOPs of decoder layer `layer` for `queries` new tokens that look at `keys` keys."""
    heads, kv_heads, dim = decoder.num_heads, decoder.kv_heads, decoder.dim
    total = attention(queries, keys, decoder.width, heads, kv_heads, dim)
    if decoder.moe is not None and layer not in tuple(decoder.dense_layers):
        return total + mixture(queries, decoder.width, decoder.moe)
    matrices = 3 if decoder.mlp_gated else 2
    return total + matrices * dense(queries, decoder.width, decoder.mlp_dim)


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
    pooled: int | None = None,
) -> Cost:
    """Counts one question about one row of images, batch 1.

    Args:
      model: any configuration; it is not initialised.
      text_tokens: prompt tokens, padding included if it is computed.
      new_tokens: room for generated tokens in the cache.
      images: images of the row.
      image_size: pixels, one side or (height, width); None for the encoder's own.
      pooled: tokens of the row where each reads patches of any image (`inputs.Pictures`);
        a budget in front of the decoder is then of all of them. None: each image has its own.

    Raises:
      UserError: an image size that is no multiple of the patch size, or a negative length.
    """
    for name, value in (("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value < 0:
            raise UserError(f"{name}: {value}", allowed="0 or more")
    vit, decoder = model.make_encoder(), model.make_decoder()
    method = model.make_compressor()
    if image_size is not None:
        vit = vit.clone(image_size=image_size)
    entrance = _entrance(model, method, vit, pooled)
    patches = math.prod(entrance.patches)
    inside, side = method.in_encoder and not method.whole_grid, model.unit_side
    encoder = encoder_cost(vit, patches, model.encoder_stages(entrance.patches))
    between = images * (encoder.stage_flops + signal_flops(vit, method, patches))
    tokens = math.prod(entrance.read)
    if inside:
        tokens = encoder.patches // side**2
        entrance = entrance._replace(patches=(side, side * tokens))
    joined, more = _join(model, method, entrance, tokens, decoder.width)
    rows = 1 if pooled else images
    between += rows * (more + _projector_flops(model, vit, entrance, images if pooled else 1))

    visual = joined * rows
    layers, prefill, decode, kv_tokens = [], 0, 0, 0
    left = visual
    for segment, (start, stop, reducer) in enumerate(decoder.runs(visual)):
        if reducer is not None:
            between += _cut_flops(decoder, reducer, left, text_tokens)
            left = after(reducer, left)
        count, length = stop - start, left + text_tokens
        for layer in range(start, stop):
            prefill += layer_flops(decoder, length, length, layer)
            decode += layer_flops(decoder, 1, length + new_tokens, layer)
        kv_tokens += count * (length + new_tokens)
        layers += [LayerTokens(segment, left, text_tokens)] * count
    head = dense(1, decoder.width, decoder.head_size or decoder.vocab_size)
    per_token = 2 * decoder.kv_heads * decoder.dim * jnp.dtype(decoder.dtype).itemsize
    parts = (images * encoder.flops, between, prefill, head)
    return Cost(
        visual_tokens=visual,
        flops=dict(zip(STAGES, parts, strict=True)),
        decode_flops=decode + head,
        kv_bytes=kv_tokens * per_token,
        layers=tuple(layers),
        encoder_layers=encoder.layers,
        left=left,
    )


class _Entrance(NamedTuple):
    """The grids on the way of one image (or of a whole row, where tokens are pooled across it).

    Attributes:
      source: of tokens, for an image of its own size.
      read: of tokens that the compressor gets; smaller where the method makes images smaller.
      patches: of one image, in the encoder.
      width: channels of a token.
      head_dim: of the encoder's keys.
      pooled: whether tokens read patches of any image of the row.
    """

    source: Grid
    read: Grid
    patches: Grid
    width: int
    head_dim: int
    pooled: bool


def _entrance(
    model: VisionLanguageModel, method: Compressor, vit: ViT, pooled: int | None
) -> _Entrance:
    projector = None if model.projector is None else model.make_projector()
    source = vit.grid if projector is None else projector.cells(vit.grid)
    if model.in_place:  # The compressor reads the patches.
        source, projector = vit.grid, None
    source = (1, pooled) if pooled else source
    read = method.image_grid(source)
    patches = vit.grid
    if read != source:
        side = 1 if projector is None else projector.side
        patches = read[0] * side, read[1] * side
    width = vit.feature_width
    if getattr(projector, "features", None):
        width = projector.features * (1 + getattr(projector, "deepstack", 0))
    return _Entrance(source, read, patches, width, vit.width // vit.num_heads, bool(pooled))


def _projector_flops(model: VisionLanguageModel, vit: ViT, entrance: _Entrance, images: int) -> int:
    """FLOPs of the model's own projector, for one image or for all `images` of a pooled row."""
    if model.projector is None or model.in_place:
        return 0
    projector, (rows, columns) = model.make_projector(), entrance.patches
    options = {"tokens": math.prod(entrance.read)} if entrance.pooled else {}
    return projector.flops((rows * images, columns), vit.feature_width, **options)


def _join(
    model: VisionLanguageModel, method: Compressor, entrance: _Entrance, tokens: int, width: int
) -> tuple[int, int]:
    """Tokens of one image that enter the decoder, and FLOPs from the projector's end to there.

    Args:
      model, method: whose.
      entrance: of the image.
      tokens: that the method gets.
      width: of the decoder.
    """
    joined = entrance.width
    connected = width * (1 + (model.decoder.get("deepstack") or 0))
    if not method.between:
        return tokens, _connector(model.connector, joined, connected, tokens)
    _check_budget(method, entrance.source)
    # `tokens` of a smaller image, and padding behind them.
    kept = after(method, tokens) if entrance.read == entrance.source else method.budget
    if method.projected:
        connector = _connector(model.connector, joined, connected, tokens)
        return kept, connector + method.flops(tokens, connected, width)
    total = with_keys(method, entrance.head_dim).flops(tokens, joined, width)
    joined = getattr(method, "features", None) or joined  # Width of what it gives out.
    return kept, total + _connector(model.connector, joined, connected, kept)


def _check_budget(method: Compressor, grid: Grid) -> None:
    """The error of `Compressor.check_call`, without an input."""
    reachable = method.reachable(grid)
    if method.budget is not None and method.budget not in reachable:
        raise UserError(
            f"compressor.budget: {method.label} cannot give {method.budget} tokens from "
            f"{grid[0]} x {grid[1]} patches",
            allowed=describe(reachable),
            fix=f"compressor.budget={min(reachable, key=lambda b: (abs(b - method.budget), b))}",
        )


def _cut_flops(decoder: Decoder, module: Compressor, visual: int, text: int) -> int:
    """FLOPs of one cut in front of a decoder layer, and of the look at the layer behind it."""
    if not module.in_decoder:
        return module.flops(visual, decoder.width, decoder.width)
    heads = decoder.num_heads * decoder.dim
    total = module.flops(visual, heads, decoder.width, num_text=text)
    if "decoder" in module.needs and module.looks == "next":
        # Keys of all places and the query of the last prompt token, as that layer would make them.
        total += dense(visual + text, decoder.width, decoder.kv_heads * decoder.dim)
        total += dense(1, decoder.width, heads)
    return total


def _connector(connector: Mapping[str, Any], inputs: int, outputs: int, tokens: int) -> int:
    if connector.get("identity"):
        return 0
    outputs = connector.get("features", outputs)
    hidden = connector.get("hidden_dim")
    if hidden is None:
        return dense(tokens, inputs, outputs)
    return dense(tokens, inputs, hidden) + dense(tokens, hidden, outputs)
