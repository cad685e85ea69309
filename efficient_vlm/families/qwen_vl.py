"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631)."""

import math
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.text import fused_rows, llama_tensors, qwen2, qwen3
from efficient_vlm.families.vision import activation
from efficient_vlm.processing.pictures.native import Qwen2VLPictures, Qwen3VLPictures

# Visual tokens along a side of the picture that stated shapes refer to; any other size works.
_SIDE = 24
_SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}


def _text(config: Config) -> Config:
    """The text config: older files of Qwen2-VL and Qwen2.5-VL have its fields at the top."""
    return config.get("text_config") or config


def _model(config: Config) -> dict[str, Any]:
    kind, text, vision = config["model_type"], _text(config), config["vision_config"]
    is_third = kind == "qwen3_vl"
    decoder = (qwen3 if is_third else qwen2)(text)
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    deep = tuple(vision.get("deepstack_visual_indexes", ())) if is_third else ()
    if list(deep) != sorted(set(deep)):
        raise UserError(f"config.json: deepstack_visual_indexes={deep}", allowed="in rising order")
    side, encoder = vision.get("spatial_merge_size", 2), _encoder(kind, vision, deep)
    return dict(
        vocab_size=text["vocab_size"],
        encoder=encoder,
        projector=dict(
            name="patch_merger",
            side=side,
            hidden_dim=encoder["width"] * side**2,
            norm=encoder["norm"],
            norm_epsilon=1e-6,
            deepstack=len(deep),
        ),
        compressor=dict(name="none"),
        connector=dict(identity=True),
        decoder=dict(
            **{**decoder, "tie_embeddings": bool(tied)},
            rope_sections=tuple(rope.get("mrope_section") or _SECTIONS[kind]),
            rope_interleaved=is_third,
            deepstack=len(deep),
        ),
    )


def _encoder(kind: str, vision: Config, deep: tuple[int, ...]) -> dict[str, Any]:
    """Fields of `encoder.ViT`; biases everywhere, and no file states the epsilons of the norms."""
    patch, side = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    rope = {**vision, **(vision.get("rope_parameters") or {})}
    shared = dict(
        image_size=patch * side * _SIDE,
        patch_size=patch,
        temporal_patch=vision.get("temporal_patch_size", 2),
        depth=vision["depth"],
        num_heads=vision["num_heads"],
        position="none",
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm="layernorm",
        norm_epsilon=1e-6,
        bias=True,
        final_norm=False,
    )
    if kind == "qwen2_vl":
        width = vision["embed_dim"]
        return dict(
            shared,
            width=width,
            mlp_dim=int(width * vision.get("mlp_ratio", 4)),
            activation=activation(vision.get("hidden_act", "quick_gelu")),
        )
    shared.update(width=vision["hidden_size"], mlp_dim=vision["intermediate_size"])
    if kind == "qwen2_5_vl":
        return dict(
            shared,
            norm="rms",
            mlp_gated=True,
            activation=activation(vision.get("hidden_act", "silu")),
            # In patches, rounded to whole visual tokens: 112 pixels are 4 tokens of 28, 8 patches.
            window=vision["window_size"] // side // patch * side,
            full_layers=tuple(vision["fullatt_block_indexes"]),
        )
    table = math.isqrt(vision["num_position_embeddings"])
    return dict(
        shared,
        patch_bias=True,
        position="corners",
        position_grid=(table, table),
        activation=activation(vision.get("hidden_act", "gelu_pytorch_tanh")),
        feature_layers=(*deep, vision["depth"] - 1),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    is_third, vision = config["model_type"] == "qwen3_vl", config["vision_config"]
    prefix, text = ("model.visual.", "model.language_model.") if is_third else ("visual.", "model.")
    llama_tensors(m, _text(config), text, "lm_head", spelling)
    frames = vision.get("temporal_patch_size", 2)
    patch = vision.get("patch_size", 14)
    m.patch_embedding("vit/embed", f"{prefix}patch_embed.proj", patch, frames)
    if is_third:
        rows, columns, width = m.shapes["vit/position"]
        m.plain("vit/position", f"{prefix}pos_embed.weight", (rows * columns, width))
    up, down = ("mlp.linear_fc1", "mlp.linear_fc2") if is_third else ("mlp.fc1", "mlp.fc2")
    for i in range(vision["depth"]):
        ours, theirs = f"vit/layers/{i}/", f"{prefix}blocks.{i}."
        fused_rows(m, f"{ours}attention/", ("query", "key", "value"), f"{theirs}attn.qkv")
        m.linear(f"{ours}attention/out", f"{theirs}attn.proj", inputs=2)
        m.norm(f"{ours}attention_norm", f"{theirs}norm1")
        m.norm(f"{ours}mlp_norm", f"{theirs}norm2")
        if f"{ours}gate/kernel" in m:
            for name in ("gate", "up", "down"):
                m.linear(f"{ours}{name}", f"{theirs}mlp.{name}_proj")
        else:
            m.linear(f"{ours}up", f"{theirs}{up}")
            m.linear(f"{ours}down", f"{theirs}{down}")
    if not is_third:
        _merger(m, "project/", f"{prefix}merger.", ("ln_q", "mlp.0", "mlp.2"))
        return
    names = ("norm", "linear_fc1", "linear_fc2")
    _merger(m, "project/", f"{prefix}merger.", names)
    for i in range(len(vision.get("deepstack_visual_indexes", ()))):
        _merger(m, f"project/deep_{i}_", f"{prefix}deepstack_merger_list.{i}.", names)


def _merger(m: NameMap, ours: str, theirs: str, names: tuple[str, str, str]) -> None:
    norm, up, out = names
    m.norm(f"{ours}norm", f"{theirs}{norm}")
    m.linear(f"{ours}up", f"{theirs}{up}")
    m.linear(f"{ours}out", f"{theirs}{out}")


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    cls = Qwen3VLPictures if config["model_type"] == "qwen3_vl" else Qwen2VLPictures
    return cls.from_hf(preprocessor, config, **options)


QWEN_VL = Family(
    name="qwen_vl",
    model_types=tuple(_SECTIONS),
    variable=True,
    model=_model,
    tensors=_tensors,
    spellings={
        "hub": (),
        "memory": (
            (r"^model\.language_model\.", "model."),
            (r"^model\.visual\.", "visual."),
        ),
    },
    memory=(
        (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
        (r"^visual\.", "model.visual."),
    ),
    ignored=(r".*rotary_emb\.inv_freq", r".*rotary_pos_emb\.inv_freq"),
    processor=_processor,
    image_token=lambda config: config["image_token_id"],
    picture_options=("min_pixels", "max_pixels", "max_visual_tokens"),
    placeholder="<|image_pad|>",
    positions="mrope",
)
