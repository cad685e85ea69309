"""Molmo2 4B, 8B and O-7B (arXiv 2601.10611): pictures."""

import functools
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.molmo import (
    BACKBONE,
    TRANSFORMER,
    connector_tensors,
    fixed,
    table,
    tower_tensors,
)
from efficient_vlm.families.text import PATH, attention, fused_rows, glu, llama
from efficient_vlm.families.vision import activation
from efficient_vlm.processing.pictures import overlap
from efficient_vlm.processing.pictures.molmo2 import Molmo2


def _vision(config: Config) -> Config:
    """Settings of the encoder under the names of transformers, from either kind of file."""
    vision = config.get("vision_config") or config["vit_config"]
    fixed(vision, dict(attention_bias=(True,), float32_attention=(True, False)))
    names = {"image_default_input_size": "image_size", "image_patch_size": "patch_size"}
    return {names.get(name, name): value for name, value in vision.items()}


def _model(config: Config) -> dict[str, Any]:
    text, adapter, vision = config["text_config"], config["adapter_config"], _vision(config)
    fixed(adapter, dict(attention_bias=(True,), mlp_bias=(False,), hidden_act=("silu",)))
    layers = adapter.get("vision_feature_layer") or adapter["vit_layers"]
    layers = tuple(layer % vision["num_hidden_layers"] for layer in layers)
    return dict(
        vocab_size=text["vocab_size"] + text["additional_vocab_size"],
        encoder=dict(
            image_size=tuple(vision["image_size"]),
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            # Files of the hub declare all 27 layers of SigLIP2 but hold only those that are used.
            depth=max(layers) + 1 if "vit_config" in config else vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_dim=vision["intermediate_size"],
            patch_bias=True,
            position="bicubic_antialias",
            norm="layernorm",
            norm_epsilon=vision.get("layer_norm_eps", 1e-6),
            activation=activation(vision.get("hidden_act", "gelu_pytorch_tanh")),
            bias=True,
            final_norm=False,
            feature_layers=layers,
        ),
        projector=dict(
            name="attention_pool",
            hidden_dim=adapter["intermediate_size"],
            num_heads=adapter["num_attention_heads"],
            head_dim=adapter["head_dim"],
        ),
        compressor=dict(name="none"),
        connector=dict(identity=True),
        slot_token=config["image_patch_id"],
        decoder=_decoder(text),
    )


def _decoder(text: Config) -> dict[str, Any]:
    fixed(text, dict(use_qk_norm=(True,), tie_word_embeddings=(False,)))
    bias = bool(text.get("qkv_bias", text.get("attention_bias", False)))
    epsilon = text.get("layer_norm_eps", text.get("rms_norm_eps", 1e-6))
    count, scaled = text["num_hidden_layers"], text.get("rope_scaling_layers")
    rope = {}
    if scaled is not None and len(set(scaled)) < count:
        # Only some layers scale their positions; the others become "local" layers without a window.
        types = ("global" if layer in scaled else "local" for layer in range(count))
        rope = dict(layer_types=tuple(types), local_rope=dict(scaling=None))
    return {
        **llama(text),
        "norm_epsilon": epsilon,
        "norm_layout": "post" if text.get("norm_after") else "pre",
        "qk_norm": "full" if text.get("qk_norm_type", "qwen3") == "olmo" else "head",
        "qkv_bias": bias,
        "out_bias": False,
        "head_size": text["vocab_size"],
        **rope,
    }


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text = config["text_config"]
    is_memory = spelling == "memory"
    if is_memory:
        m.plain(f"{PATH}embedding", "model.language_model.embed_tokens.weight")
    elif spelling == "saved":
        # save_pretrained of transformers 5.24 splits the table in the middle.
        table(m, -(-m.shapes[f"{PATH}embedding"][0] // 2))
    else:
        table(m, text["vocab_size"])
    m.norm(f"{PATH}norm", f"{TRANSFORMER}ln_f")
    m.linear(f"{PATH}head", "lm_head")
    norm = "post_norm" if text.get("norm_after") else "norm"
    for i in range(text["num_hidden_layers"]):
        ours, theirs = f"{PATH}layers/{i}/", f"{TRANSFORMER}blocks.{i}."
        m.norm(f"{ours}attention_{norm}", f"{theirs}attn_norm")
        m.norm(f"{ours}mlp_{norm}", f"{theirs}ff_norm")
        if is_memory:
            attention(m, ours, theirs)
            glu(m, ours, theirs)
            continue
        parts = ("query", "key", "value")
        fused_rows(m, f"{ours}attention/", parts, f"{theirs}self_attn.att_proj")
        m.linear(f"{ours}attention/out", f"{theirs}self_attn.attn_out", inputs=2)
        for part in ("query", "key"):
            m.norm(f"{ours}attention/{part}_norm", f"{theirs}self_attn.{part[0]}_norm")
        fused_rows(m, f"{ours}mlp/", ("up", "gate"), f"{theirs}mlp.ff_proj")
        m.linear(f"{ours}mlp/down", f"{theirs}mlp.ff_out")
    tower_tensors(m)
    connector_tensors(m)


def _block_ids(config: Config) -> tuple[int, ...]:
    """Ids of start, end, column and frame tokens, which attend to each other and to patches."""
    patch = config["image_patch_id"]
    marks = ("image_start", "image_end", "low_res_image_start", "frame_start", "frame_end")
    column = config.get("image_col_id", patch + 1)
    return (*(config[f"{mark}_token_id"] for mark in marks), column)


_LAYER = r"^model\.language_model\.layers\.(\d+)\."
_BLOCK = rf"{TRANSFORMER}blocks.\1."
_TOWER = r"^model\.vision_tower\.layers\.(\d+)\."
_RESBLOCK = rf"{BACKBONE}image_vit.transformer.resblocks.\1."
_CONNECTOR = r"^model\.multi_modal_projector\."

MOLMO2 = Family(
    name="molmo2",
    model_types=("molmo2",),
    variable=True,
    model=_model,
    tensors=_tensors,
    spellings={
        "hub": (),
        "saved": (),
        "memory": (
            (r"^model\.language_model\.norm\.", f"{TRANSFORMER}ln_f."),
            (rf"{_LAYER}input_layernorm\.", f"{_BLOCK}attn_norm."),
            (rf"{_LAYER}post_attention_layernorm\.", f"{_BLOCK}ff_norm."),
            (_LAYER, _BLOCK),
            (rf"{_TOWER}self_attn\.([qkvo])_proj\.", rf"{_RESBLOCK}attention.w\2."),
            (rf"{_TOWER}mlp\.fc([12])\.", rf"{_RESBLOCK}feed_forward.w\2."),
            (rf"{_TOWER}layer_norm1\.", f"{_RESBLOCK}attention_norm."),
            (rf"{_TOWER}layer_norm2\.", f"{_RESBLOCK}ffn_norm."),
            (r"^model\.vision_tower\.", f"{BACKBONE}image_vit."),
            (
                rf"{_CONNECTOR}image_pooling_2d\.([qkvo])_proj\.",
                rf"{BACKBONE}image_pooling_2d.w\1.",
            ),
            (rf"{_CONNECTOR}image_projector\.gate_proj\.", f"{BACKBONE}image_projector.w1."),
            (rf"{_CONNECTOR}image_projector\.down_proj\.", f"{BACKBONE}image_projector.w2."),
            (rf"{_CONNECTOR}image_projector\.up_proj\.", f"{BACKBONE}image_projector.w3."),
        ),
    },
    ignored=(r".*rotary_emb.*\.inv_freq",),
    processor=functools.partial(overlap.from_files, Molmo2),
    image_token=lambda config: config["image_patch_id"],
    picture_options=("max_crops", "max_visual_tokens", "skip_blank"),
    placeholder="<|image|>",
    begin="bos_or_eos",
    blocks="images",
    block_ids=_block_ids,
)
