"""LLaVA-1.5 (arXiv 2310.03744), and its layout with other encoders and decoders (TinyLLaVA)."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import (
    activation,
    clip,
    clip_tensors,
    embedding_refused,
    siglip,
    siglip_tensors,
)
from efficient_vlm.processing.pictures.resized import LlavaPictures
from efficient_vlm.processing.pictures.siglip import SiglipPictures


def _model(config: Config) -> dict[str, Any]:
    vision, text = config["vision_config"], config["text_config"]
    layers = config.get("vision_feature_layer", -2)
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    if 0 in layers:
        raise embedding_refused("vision_feature_layer")
    # Layer -1 is the output of the last block, as in ours; 0 is the embedding.
    layers = tuple(layer if layer < 0 else layer - 1 for layer in layers)
    select = config.get("vision_feature_select_strategy", "default")
    is_clip = vision.get("model_type", "clip_vision_model").startswith("clip")
    if select != "full" and not (is_clip and select == "default"):
        raise UserError(
            f"config.json: vision_feature_select_strategy={short(select)} with a "
            f"{vision.get('model_type')}",
            allowed="full, or for CLIP default (the CLS token is left out)",
        )
    encoder = clip(vision, layers) if is_clip else siglip(vision, layers)
    if is_clip and select == "full":
        encoder["class_feature"] = True
    bias = config.get("multimodal_projector_bias", True)
    return dict(
        vocab_size=text["vocab_size"],
        encoder=encoder,
        compressor=dict(name="none"),
        connector=dict(
            hidden_dim=text["hidden_size"],
            bias=bias,
            activation=activation(config.get("projector_hidden_act", "gelu")),
        ),
        # The head is LLaVA's own: it has neither the bias of Phi's nor the soft cap of Gemma 2's.
        decoder={
            **decoder_fields(text, config.get("tie_word_embeddings")),
            "head_bias": False,
            "final_softcap": None,
        },
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    vision, text = config["vision_config"], config["text_config"]
    tower = clip_tensors if "vit/class_token" in m else siglip_tensors
    tower(m, vision, "vision_tower.vision_model.")
    m.linear("connect/up", "multi_modal_projector.linear_1")
    m.linear("connect/out", "multi_modal_projector.linear_2")
    text_of(text).tensors(m, text, "language_model.model.", "language_model.lm_head", spelling)


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    is_clip = config["vision_config"].get("model_type", "clip_vision_model").startswith("clip")
    cls = LlavaPictures if is_clip else SiglipPictures
    return cls.from_hf(preprocessor, config, **options)


MEMORY = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\b", "model.multi_modal_projector"),
)

LLAVA = Family(
    name="llava",
    model_types=("llava",),
    model=_model,
    tensors=_tensors,
    spellings={
        # transformers 5 omits this level in models that it saves itself, but keeps it in models
        # that it loaded with it.
        "hub": ((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
        "memory": (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
            (r"^model\.multi_modal_projector", "multi_modal_projector"),
        ),
    },
    memory=MEMORY,
    ignored=(
        r"vision_tower\.vision_model\.post_layernorm\..*",
        r"vision_tower\.vision_model\.head\..*",
        r".*\.position_ids",
        r".*rotary_emb\.inv_freq",
    ),
    processor=_processor,
    image_token=lambda config: config.get("image_token_index", config.get("image_token_id")),
    picture_options=("max_visual_tokens",),
    prompt="llava",
)
