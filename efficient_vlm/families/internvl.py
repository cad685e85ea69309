"""InternVL 2.5 and 3 (arXiv 2504.10479) in the layout of transformers: InternViT, pixel shuffle."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap, Piece
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import activation, embedding_refused
from efficient_vlm.processing.pictures.internvl import InternVLPictures

NORMS = {"layer_norm": "layernorm", "rms_norm": "rms"}


def internvit(vision: Config, feature_layer: int = -1) -> dict[str, Any]:
    """Fields of `encoder.ViT` for an InternViT (arXiv 2312.14238, section 3.2).

    Args:
      vision: "vision_config" of config.json.
      feature_layer: -1 for the output of the encoder; other numbers count its hidden states, 1
        being the output of the first layer.
    """
    kind = vision.get("norm_type", "layer_norm")
    if kind not in NORMS:
        raise UserError(f"config.json: norm_type={short(kind)}", allowed=", ".join(NORMS))
    if feature_layer == 0:
        raise embedding_refused("vision_feature_layer")
    last = feature_layer == -1
    final_norm = last and not vision.get("use_mean_pooling", True)
    if final_norm and kind != "layer_norm":
        raise UserError(
            f"config.json: use_mean_pooling=False with norm_type={short(kind)}",
            allowed="norm_type=layer_norm, the type of the last norm",
        )
    placed = vision.get("use_absolute_position_embeddings", True)
    return dict(
        image_size=_side(vision, "image_size"),
        patch_size=_side(vision, "patch_size"),
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        patch_bias=True,
        position="bicubic" if placed else "none",
        class_token=True,
        class_position=placed,
        norm=NORMS[kind],
        norm_epsilon=vision.get("layer_norm_eps", 1e-6),
        activation=activation(vision.get("hidden_act", "gelu")),
        bias=True,
        qkv_bias=bool(vision.get("attention_bias", False)),
        qk_norm="full" if vision.get("use_qk_norm") else False,
        layer_scale=True,
        final_norm=final_norm,
        feature_layers=None if last else (feature_layer - (feature_layer >= 0),),
    )


def _side(vision: Config, name: str) -> int:
    value = vision[name]
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        raise UserError(f"config.json: {name}={value}", allowed="a square")
    return sides[0]


def internvit_tensors(m: NameMap, vision: Config, prefix: str, path: str = "vit/") -> None:
    """Names of an InternViT below `prefix`."""
    patch, width = _side(vision, "patch_size"), vision["hidden_size"]
    m.plain(f"{path}class_token", f"{prefix}embeddings.cls_token", (1, 1, width))
    m.patch_embedding(f"{path}embed", f"{prefix}embeddings.patch_embeddings.projection", patch)
    if f"{path}position" in m:
        rows, columns, _ = m.shapes[f"{path}position"]
        name, table = f"{prefix}embeddings.position_embeddings", (1, 1 + rows * columns, width)
        m.add(f"{path}class_position", Piece(name, table, (1, 0, 1)))
        m.add(f"{path}position", Piece(name, table, (1, 1, table[1])))
    if f"{path}norm/scale" in m:
        m.norm(f"{path}norm", f"{prefix}layernorm")
    for i in range(vision["num_hidden_layers"]):
        ours, theirs = f"{path}layers/{i}/", f"{prefix}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            m.linear(f"{ours}attention/{name}", f"{theirs}attention.{name[0]}_proj")
        for name in ("query", "key"):
            if f"{ours}attention/{name}_norm/scale" in m:
                m.norm(f"{ours}attention/{name}_norm", f"{theirs}attention.{name[0]}_norm")
        m.linear(f"{ours}attention/out", f"{theirs}attention.projection_layer", inputs=2)
        m.norm(f"{ours}attention_norm", f"{theirs}layernorm_before")
        m.norm(f"{ours}mlp_norm", f"{theirs}layernorm_after")
        m.plain(f"{ours}attention_scale", f"{theirs}lambda_1")
        m.plain(f"{ours}mlp_scale", f"{theirs}lambda_2")
        m.linear(f"{ours}up", f"{theirs}mlp.fc1")
        m.linear(f"{ours}down", f"{theirs}mlp.fc2")


def _model(config: Config) -> dict[str, Any]:
    text = config["text_config"]
    select = config.get("vision_feature_select_strategy", "default")
    if select != "default":
        raise UserError(
            f"config.json: vision_feature_select_strategy={short(select)}",
            allowed="default (the CLS token is left out)",
        )
    ratio = config.get("downsample_ratio", 0.5)
    if not 0 < ratio <= 1 or abs(round(1 / ratio) * ratio - 1) > 1e-6:
        raise UserError(f"config.json: downsample_ratio={ratio}", allowed="0.5, or another 1/n")
    return dict(
        vocab_size=text["vocab_size"],
        encoder=internvit(config["vision_config"], config.get("vision_feature_layer", -1)),
        compressor=dict(name="none"),
        projector=dict(
            name="patch_merger",
            side=round(1 / ratio),
            hidden_dim=text["hidden_size"],
            norm="layernorm",
            norm_epsilon=1e-5,
            norm_after=True,
            activation=activation(config.get("projector_hidden_act", "gelu")),
        ),
        connector=dict(identity=True),
        decoder=decoder_fields(text, config.get("tie_word_embeddings")),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text = config["text_config"]
    internvit_tensors(m, config["vision_config"], "vision_tower.")
    m.norm("project/norm", "multi_modal_projector.layer_norm")
    m.linear("project/up", "multi_modal_projector.linear_1")
    m.linear("project/out", "multi_modal_projector.linear_2")
    text_of(text).tensors(m, text, "language_model.model.", "language_model.lm_head", spelling)


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    return InternVLPictures.from_hf(preprocessor, config, **options)


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    model=_model,
    tensors=_tensors,
    spellings={
        "hub": (),
        "memory": (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        ),
    },
    memory=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\b", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\b", r"model.\1"),
    ),
    ignored=(r"vision_tower\.embeddings\.mask_token", r".*rotary_emb\.inv_freq"),
    processor=_processor,
    image_token=lambda config: config["image_token_id"],
    picture_options=("max_tiles", "max_visual_tokens", "skip_blank"),
    placeholder="<IMG_CONTEXT>",
)
