"""Gemma 3 with pictures (arXiv 2503.19786): SigLIP, averaged patches, a norm, one product."""

import math
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.llava import LLAVA, MEMORY
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import siglip, siglip_tensors
from efficient_vlm.processing.pictures.stretched import Gemma3Pictures


def _model(config: Config) -> dict[str, Any]:
    vision, text = config["vision_config"], config["text_config"]
    decoder = decoder_fields(text, config.get("tie_word_embeddings"))
    return dict(
        vocab_size=text["vocab_size"],
        encoder=siglip(vision),
        compressor=dict(name="none"),
        projector=dict(name="average_pool", side=_side(config)),
        connector=dict(norm="rms_plus1", norm_epsilon=vision.get("layer_norm_eps", 1e-6)),
        decoder={**decoder, "bidirectional_visual": True},
    )


def _side(config: Config) -> int:
    """Edge, in patches, of the square that one visual token averages."""
    patches = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    tokens = config.get("mm_tokens_per_image", 256)
    along = math.isqrt(tokens)
    if along < 1 or along**2 != tokens or patches % along:
        raise UserError(
            f"config.json: mm_tokens_per_image={tokens} for {patches} x {patches} patches",
            allowed="the square of a divisor of the patches along an edge",
        )
    return patches // along


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text = config["text_config"]
    siglip_tensors(m, config["vision_config"], "vision_tower.vision_model.")
    m.norm("connect/norm", "multi_modal_projector.mm_soft_emb_norm")
    # Not a torch Linear: stored as [in, out], like ours.
    m.plain("connect/out/kernel", "multi_modal_projector.mm_input_projection_weight")
    text_of(text).tensors(m, text, "language_model.model.", "language_model.lm_head", spelling)


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    return Gemma3Pictures.from_hf(preprocessor, config, **options)


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    model=_model,
    tensors=_tensors,
    spellings=LLAVA.spellings,
    memory=MEMORY,
    ignored=(
        r"vision_tower\.vision_model\.head\..*",
        r".*\.position_ids",
        r".*rotary_emb.*\.inv_freq",
    ),
    processor=_processor,
    image_token=lambda config: config.get("image_token_index", config.get("image_token_id")),
    picture_options=("pan_and_scan", "max_visual_tokens"),
    placeholder="<start_of_image>",
    blocks="image",
)
