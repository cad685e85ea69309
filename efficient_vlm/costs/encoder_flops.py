"""FLOPs of the vision encoder, of a method inside it, and of what it computes for other methods."""

import dataclasses
from collections.abc import Callable, Sequence

from efficient_vlm.compressors.base import Compressor, Stage
from efficient_vlm.costs.products import attention, dense
from efficient_vlm.errors import UserError
from efficient_vlm.models.encoder import ViT
from efficient_vlm.nn.intermediates import parse_intermediate

_CHANNELS = 3


def _one_row(places: int, width: int) -> int:
    """One query, of CLS or the mean one, with all keys."""
    return dense(1, width, places)


def _all_rows(places: int, width: int) -> int:
    """All queries with all keys a second time: half an attention (`attention_importance`)."""
    return dense(places, width, places)


def _there_anyway(places: int, width: int) -> int:
    del places, width
    return 0


# FLOPs beside the encoder's layers of each of `nn.intermediates.INTERMEDIATES`, from the tokens
# of an image, CLS included, and the encoder's width (all heads together, however many they are).
INTERMEDIATE_FLOPS: dict[str, Callable[[int, int], int]] = {
    "features": _there_anyway,
    "keys": _there_anyway,
    "cls_row": _one_row,
    "cls_row_full": _one_row,
    "mean_query_row": _one_row,
    "column_mean": _all_rows,
    "change": _there_anyway,
}


@dataclasses.dataclass(frozen=True)
class EncoderLayerTokens:
    """Tokens of one image, CLS included, that an encoder layer's attention and MLP process."""

    attention: int
    mlp: int


@dataclasses.dataclass(frozen=True)
class EncoderCost:
    """One image through the encoder.

    Attributes:
      flops: of the encoder itself.
      stage_flops: of the method inside it.
      layers: tokens, in order.
      patches: tokens that leave it, without CLS.
    """

    flops: int
    stage_flops: int
    layers: tuple[EncoderLayerTokens, ...]
    patches: int


def encoder_cost(vit: ViT, patches: int, stages: Sequence[Stage] = ()) -> EncoderCost:
    """Counts a vision transformer over one image of `patches` patches, beside it its CLS token.

    Only the layers that the features need. Layers that attend in windows count the full square: a
    dense kernel with a mask computes it.

    Args:
      vit: unbound.
      patches: of the image.
      stages: of a method inside it; each leaves `module.budget` patch tokens.
    """
    special, head_dim = int(vit.class_token), vit.width // vit.num_heads
    depth = min([vit.layers_run, *(s.layer for s in stages if s.module.ends_encoder)])
    pixels = _CHANNELS * vit.temporal_patch * vit.patch_size**2
    matrices = 3 if vit.mlp_gated else 2
    if vit.stem_dim is None:
        total = dense(patches, pixels, vit.width)
    else:
        total = dense(patches, pixels, vit.stem_dim) + dense(patches, vit.stem_dim, vit.width)
    count, beside, layers = patches, 0, []

    stabilised, whole = range(0), 0  # Layers whose keys are those of all, and to put them back.

    def cut(layer: int, inside: bool) -> None:
        nonlocal count, beside, stabilised, whole
        for stage in stages:
            if stage.layer == layer and stage.inside == inside:
                for name in stage.module.observes.values():
                    beside += INTERMEDIATE_FLOPS[name](count + special, vit.width)
                beside += with_keys(stage.module, head_dim).flops(count, vit.width)
                if stage.module.whole_grid and not stage.module.ends_encoder:
                    stabilised = range(layer, layer + stage.module.stabilised)
                    whole = stage.module.whole_flops(count, vit.width)
                count = after(stage.module, count)

    for layer in range(depth):
        cut(layer, inside=False)
        tokens = count + special
        heads = (vit.width, vit.num_heads, vit.num_heads, head_dim)
        if layer in stabilised:
            total += attention(tokens, patches + special, *heads)
            total += dense(patches - count, vit.width, 2 * vit.width)  # Keys and values.
            beside += whole
        else:
            total += attention(tokens, tokens, *heads)
        cut(layer, inside=True)
        total += matrices * dense(count + special, vit.width, vit.mlp_dim)
        layers.append(EncoderLayerTokens(tokens, count + special))
    cut(vit.layers_run, inside=False)
    if any(stage.module.whole_grid for stage in stages):
        features = [layer % vit.depth for layer in vit.feature_layers or (-1,)]
        beside += whole * sum(layer >= stages[0].layer for layer in features)
        return EncoderCost(total, beside, tuple(layers), patches)
    return EncoderCost(total, beside, tuple(layers), count)


def signal_flops(vit: ViT, method: Compressor, patches: int) -> int:
    """FLOPs of what the encoder computes for a method beside its layers, one image."""
    places, total = patches + int(vit.class_token), 0
    for asked in set(method.intermediates().values()):
        # Refuses what this encoder cannot give.
        name, _ = parse_intermediate(asked, vit.layers_run, vit.class_token)
        total += INTERMEDIATE_FLOPS[name](places, vit.width)
    return total


def after(module: Compressor, count: int) -> int:
    """Tokens behind a module that gets `count`; without a budget it keeps them all."""
    if module.budget is None:
        return count
    if module.budget > count:
        raise UserError(
            f"compressor.budget: {module.label} cannot give {module.budget} of {count} tokens",
            allowed=f"{module.min_budget} to {count}",
        )
    return module.budget


def with_keys(module: Compressor, dim: int) -> Compressor:
    """The module, told how wide the encoder's keys are that it compares (ToMe, VisionZip)."""
    if "keys" not in module.needs:
        return module
    names = {f.name for f in dataclasses.fields(module)} & {"head_dim"}
    return module.clone(parent=None, **dict.fromkeys(names, dim)) if names else module
