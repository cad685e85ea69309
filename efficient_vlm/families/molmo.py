"""Molmo 7B-D, 7B-O, 72B and MolmoE-1B (arXiv 2409.17146)."""

import functools
from collections.abc import Mapping
from typing import Any

from efficient_vlm.checkpoints.names import NameMap, Piece
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.moe_text import OTHERS, experts, mixture
from efficient_vlm.families.text import PATH, fused_rows
from efficient_vlm.families.vision import activation
from efficient_vlm.processing.pictures import overlap
from efficient_vlm.processing.pictures.base import CLIP_MEAN, CLIP_STD
from efficient_vlm.processing.pictures.molmo import Molmo

TRANSFORMER, BACKBONE = "model.transformer.", "model.vision_backbone."

# Names in the config.json of the hub, and values that the file leaves to the code beside it.
_HUB = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "tie_word_embeddings": "weight_tying",
}
_HUB_DEFAULTS = dict(
    additional_vocab_size=128,
    vit_layers=(-2, -9),
    vision_backbone=dict(
        image_default_input_size=(336, 336),
        image_patch_size=14,
        image_emb_dim=1024,
        image_num_heads=16,
        image_head_dim=64,
        image_num_layers=23,
        image_mlp_dim=4096,
    ),
)
# Settings that all released models share, with the values that mean the same.
_FIXED = dict(
    activation_type=("swiglu",),
    layer_norm_type=("rms",),
    bias_for_layer_norm=(False, None),
    include_bias=(False,),
    rope=(True,),
    rope_impl=("llama",),
    clip_qkv=(None,),
    weight_tying=(False,),
    normalize_input_embeds=(False,),
    moe_normalize_expert_weights=(None, False),
    image_pooling_2d=("attention_meanq", "attention-meanq"),
    image_projector=("mlp",),
    image_padding_embed=("pad_and_partial_pad", None),
)


def fixed(config: Config, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError for a setting whose value is not one of those allowed; absent ones pass."""
    for name, values in allowed.items():
        if config.get(name, values[0]) not in values:
            raise UserError(
                f"config.json: {name}={short(config[name])}",
                allowed=f"{short(values[0])}, as in the released models",
            )


def _settings(config: Config) -> dict[str, Any]:
    """Settings under the names of the original code, from either kind of config.json."""
    if "d_model" not in config:
        renamed = {_HUB.get(name, name): value for name, value in config.items()}
        config = {**_HUB_DEFAULTS, "image_padding_embed": "pad_and_partial_pad", **renamed}
    fixed(config, _FIXED)
    return dict(config)


def _rows(config: Config) -> int:
    """Rows of the embedding table that the head scores; rows of special tokens follow."""
    return config.get("embedding_size") or config["vocab_size"]


def _image_token(config: Config) -> int:
    """Id of <im_patch>: the third additional row, unless the tokenizer has another id (MolmoE:
    50282, a row of the language model)."""
    return config.get("image_patch_id", _rows(config) + 2)


def _model(config: Config) -> dict[str, Any]:
    config = _settings(config)
    vision, width = config["vision_backbone"], config["d_model"]
    tokens = _rows(config) + config["additional_vocab_size"]
    if not 0 <= _image_token(config) < tokens:
        raise UserError(
            f"image_patch_id: {_image_token(config)}",
            allowed=f"below {tokens}, the tokens of this model",
            fix="use tokenizer and weights of the same release",
        )
    return dict(
        vocab_size=tokens,
        encoder=_encoder(vision, config["vit_layers"]),
        padding_embedding=config.get("image_padding_embed") is not None,
        projector=dict(
            name="attention_pool",
            hidden_dim=_hidden(config),
            num_heads=vision["image_num_heads"],
            head_dim=vision["image_head_dim"],
            side=config.get("image_pooling_h", 2),
        ),
        compressor=dict(name="none"),
        connector=dict(identity=True),
        slot_token=_image_token(config),
        decoder=_decoder(config, width),
    )


def _hidden(config: Config) -> int:
    """Width of the feed-forward layers or of one expert; settings count gate and up together."""
    return (config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"]) // 2


def _decoder(config: Config, width: int) -> dict[str, Any]:
    heads, kind = config["n_heads"], config.get("block_type", "sequential")
    if kind not in ("sequential", "moe"):
        raise unknown("config.json: block_type", str(kind), ("sequential", "moe"))
    moe = None
    if kind == "moe":
        names = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_top_k"}
        counts = {ours: config[theirs] for ours, theirs in names.items()}
        moe = mixture(counts, _hidden(config), normalize=False)
    return dict(
        width=width,
        segments=[{"layers": config["n_layers"]}],
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads") or heads,
        head_dim=width // heads,
        mlp_dim=None if moe else _hidden(config),
        moe=moe,
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        norm_layout="post" if config.get("norm_after") else "pre",
        qk_norm="full" if config.get("attention_layer_norm") else "none",
        qkv_bias=bool(config.get("qkv_bias", False)),
        rope_theta=float(config.get("rope_theta", 10_000.0)),
        head_size=_rows(config),
        bidirectional_visual=False,
    )


def _encoder(vision: Config, layers: Any) -> dict[str, Any]:
    """CLIP, stored with 23 of its 24 layers; `layers` count from the end of those stored."""
    fixed(vision, dict(image_model_type=("openai",)))
    return dict(
        image_size=tuple(vision["image_default_input_size"]),
        patch_size=vision["image_patch_size"],
        width=vision["image_emb_dim"],
        depth=vision["image_num_layers"],
        num_heads=vision["image_num_heads"],
        mlp_dim=vision["image_mlp_dim"],
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        position="bicubic_antialias",
        class_token=True,
        class_position=True,
        norm="layernorm",
        norm_epsilon=vision.get("image_norm_eps", 1e-5),
        activation=activation(vision.get("image_mlp_activations", "quick_gelu")),
        bias=True,
        pre_norm=True,
        final_norm=False,
        feature_layers=tuple(layers),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    config = _settings(config)
    table(m, _rows(config))
    m.norm(f"{PATH}norm", f"{TRANSFORMER}ln_f")
    m.linear(f"{PATH}head", f"{TRANSFORMER}ff_out")
    norm = "post_norm" if config.get("norm_after") else "norm"
    for i in range(config["n_layers"]):
        ours, theirs = f"{PATH}layers/{i}/", f"{TRANSFORMER}blocks.{i}."
        fused_rows(m, f"{ours}attention/", ("query", "key", "value"), f"{theirs}att_proj")
        m.linear(f"{ours}attention/out", f"{theirs}attn_out", inputs=2)
        if f"{ours}attention/query_norm/scale" in m:
            m.norm(f"{ours}attention/query_norm", f"{theirs}q_norm")
            m.norm(f"{ours}attention/key_norm", f"{theirs}k_norm")
        m.norm(f"{ours}attention_{norm}", f"{theirs}attn_norm")
        m.norm(f"{ours}mlp_{norm}", f"{theirs}ff_norm")
        if f"{ours}moe/gate" in m:
            m.linear(f"{ours}moe/router", f"{theirs}ffn.router.layer")
            _experts(m, f"{ours}moe/", theirs, spelling)
        else:
            fused_rows(m, f"{ours}mlp/", ("up", "gate"), f"{theirs}ff_proj")
            m.linear(f"{ours}mlp/down", f"{theirs}ff_out")
    tower_tensors(m)
    connector_tensors(m)


def table(m: NameMap, rows: int) -> None:
    """Names of the embedding table: `rows` of the language model, then those of special tokens."""
    total, width = m.shapes[f"{PATH}embedding"]
    name = f"{TRANSFORMER}wte"
    old, new = (rows, width), (total - rows, width)
    m.add(f"{PATH}embedding", Piece(f"{name}.embedding", old), Piece(f"{name}.new_embedding", new))


def _experts(m: NameMap, ours: str, theirs: str, spelling: str) -> None:
    if spelling == "experts":
        experts(m, ours, f"{theirs}mlp.experts.", OTHERS)
        return
    # megablocks: the matrices of all experts stacked along rows; "down" is not transposed.
    count, width, hidden = m.shapes[f"{ours}gate"]
    all_rows, each = (count * hidden, width), (count, hidden, width)
    for part, name in (("gate", "w1"), ("up", "v1")):
        piece = Piece(f"{theirs}ffn.experts.mlp.{name}", all_rows, view=each, turn=(0, 2, 1))
        m.add(f"{ours}{part}", piece)
    m.plain(f"{ours}down", f"{theirs}ffn.experts.mlp.w2", all_rows)


def tower_tensors(m: NameMap) -> None:
    """Names of the encoder of Molmo and Molmo2."""
    prefix = f"{BACKBONE}image_vit."
    m.linear("vit/embed", f"{prefix}patch_embedding")
    rows, columns, width = m.shapes["vit/position"]
    is_clip = "vit/class_token" in m
    positions = (rows * columns + is_clip, width)
    m.rows("vit/position", f"{prefix}positional_embedding", positions, int(is_clip))
    if is_clip:
        m.rows("vit/class_position", f"{prefix}positional_embedding", positions, 0)
        m.plain("vit/class_token", f"{prefix}class_embedding", (width,))
        m.norm("vit/pre_norm", f"{prefix}pre_ln")
    for i in range(m.count("vit/layers")):
        ours, theirs = f"vit/layers/{i}/", f"{prefix}transformer.resblocks.{i}."
        for part in ("query", "key", "value"):
            m.linear(f"{ours}attention/{part}", f"{theirs}attention.w{part[0]}")
        m.linear(f"{ours}attention/out", f"{theirs}attention.wo", inputs=2)
        m.norm(f"{ours}attention_norm", f"{theirs}attention_norm")
        m.norm(f"{ours}mlp_norm", f"{theirs}ffn_norm")
        m.linear(f"{ours}up", f"{theirs}feed_forward.w1")
        m.linear(f"{ours}down", f"{theirs}feed_forward.w2")


def connector_tensors(m: NameMap) -> None:
    """Names of pooling and projector of Molmo and Molmo2."""
    for part in ("query", "key", "value"):
        m.linear(f"project/{part}", f"{BACKBONE}image_pooling_2d.w{part[0]}")
    m.linear("project/pooled", f"{BACKBONE}image_pooling_2d.wo", inputs=2)
    for part, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        m.linear(f"project/{part}", f"{BACKBONE}image_projector.{name}")
    if "padding_embedding" in m:
        m.plain("padding_embedding", f"{BACKBONE}pad_embed")


_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_OURS = r"model.transformer.blocks.\1."

MOLMO = Family(
    name="molmo",
    model_types=("molmo",),
    model=_model,
    tensors=_tensors,
    spellings={
        "hub": (),
        # MolmoE with one tensor per product and expert.
        "experts": (
            (rf"{_BLOCK}attn\.(att_proj|attn_out|attn_norm|q_norm|k_norm)\.", rf"{_OURS}\2."),
            (rf"{_BLOCK}mlp\.gate\.", f"{_OURS}ffn.router.layer."),
            (rf"{_BLOCK}mlp\.ff_norm\.", f"{_OURS}ff_norm."),
            (r"^(model\.)?lm_head\.", "model.transformer.ff_out."),
        ),
    },
    ignored=(r".*rotary_emb\.inv_freq",),
    processor=functools.partial(overlap.from_files, Molmo),
    image_token=_image_token,
    special_ids={"image_patch_id": "<im_patch>"},
    picture_options=("max_crops", "max_visual_tokens", "skip_blank"),
    # The template in its files has neither pictures nor a beginning token.
    prompt="molmo",
    own_prompt=True,
    begin="prompt",
    placeholder="<|image|>",
)
