"""Encoders that several families share: CLIP and SigLIP (config, names)."""

from collections.abc import Sequence
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.families.base import Config

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation(name: str) -> str:
    """Our name of an activation of transformers."""
    if name not in ACTIVATIONS:
        raise unknown("config.json: hidden_act", str(name), ACTIVATIONS)
    return ACTIVATIONS[name]


def embedding_refused(name: str) -> UserError:
    """The error for features that are the input of the first layer."""
    return UserError(
        f"config.json: {name}=0, the embedding of the patches",
        allowed="1 to the number of layers, or -1, -2, ... counted from the last",
    )


def clip(vision: Config, feature_layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Fields of `encoder.ViT` for a CLIP vision tower (arXiv 2103.00020)."""
    return dict(
        **_common(vision, "quick_gelu", 1e-5),
        patch_bias=False,
        class_token=True,
        class_position=True,
        pre_norm=True,
        final_norm=False,
        feature_layers=None if feature_layers is None else tuple(feature_layers),
    )


def siglip(
    vision: Config, feature_layers: Sequence[int] | None = None, position: str = "bicubic"
) -> dict[str, Any]:
    """Fields of `encoder.ViT` for a SigLIP vision tower (arXiv 2303.15343)."""
    return dict(
        **{**_common(vision, "gelu_pytorch_tanh", 1e-6), "position": position},
        patch_bias=True,
        final_norm=feature_layers is None,
        feature_layers=None if feature_layers is None else tuple(feature_layers),
    )


def _common(vision: Config, act: str, epsilon: float) -> dict[str, Any]:
    return dict(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        crop_remainder=True,
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        position="bicubic",
        norm="layernorm",
        norm_epsilon=vision.get("layer_norm_eps", epsilon),
        activation=activation(vision.get("hidden_act", act)),
        bias=True,
    )


def clip_tensors(m: NameMap, vision: Config, prefix: str, path: str = "vit/") -> None:
    """Names of a CLIP tower below `prefix` ("vision_tower.vision_model.")."""
    m.plain(f"{path}class_token", f"{prefix}embeddings.class_embedding", (vision["hidden_size"],))
    _tower(m, vision, prefix, path, first_position=1)
    # The class token's position is the first row of the hub's table.
    m.norm(f"{path}pre_norm", f"{prefix}pre_layrnorm")


def siglip_tensors(m: NameMap, vision: Config, prefix: str, path: str = "vit/") -> None:
    """Names of a SigLIP tower below `prefix`."""
    _tower(m, vision, prefix, path)
    if f"{path}norm/scale" in m:
        m.norm(f"{path}norm", f"{prefix}post_layernorm")


def _tower(m: NameMap, vision: Config, prefix: str, path: str, first_position: int = 0) -> None:
    patch, width = vision["patch_size"], vision["hidden_size"]
    m.patch_embedding(f"{path}embed", f"{prefix}embeddings.patch_embedding", patch)
    rows, columns, _ = m.shapes[f"{path}position"]
    name, table = f"{prefix}embeddings.position_embedding.weight", rows * columns + first_position
    m.rows(f"{path}position", name, (table, width), first_position)
    if first_position:
        m.rows(f"{path}class_position", name, (table, width), 0)
    for i in range(vision["num_hidden_layers"]):
        ours, theirs = f"{path}layers/{i}/", f"{prefix}encoder.layers.{i}."
        for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            m.linear(f"{ours}attention/{name}", f"{theirs}self_attn.{part}")
        m.linear(f"{ours}attention/out", f"{theirs}self_attn.out_proj", inputs=2)
        m.norm(f"{ours}attention_norm", f"{theirs}layer_norm1")
        m.norm(f"{ours}mlp_norm", f"{theirs}layer_norm2")
        m.linear(f"{ours}up", f"{theirs}mlp.fc1")
        m.linear(f"{ours}down", f"{theirs}mlp.fc2")
