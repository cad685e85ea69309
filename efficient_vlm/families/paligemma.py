"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): SigLIP, one product, Gemma."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.llava import LLAVA, MEMORY
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import siglip, siglip_tensors
from efficient_vlm.processing.pictures.stretched import PaliGemmaPictures


def _model(config: Config) -> dict[str, Any]:
    text = config["text_config"]
    decoder = decoder_fields(text, config.get("tie_word_embeddings"))
    return dict(
        vocab_size=text["vocab_size"],
        encoder=siglip(config["vision_config"]),
        compressor=dict(name="none"),
        connector=dict(bias=True),
        # The window of Gemma 2 does not cut the prefix, as in transformers.
        decoder={**decoder, "bidirectional_visual": True, "window_spares_blocks": True},
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text = config["text_config"]
    siglip_tensors(m, config["vision_config"], "vision_tower.vision_model.")
    m.linear("connect/out", "multi_modal_projector.linear")
    text_of(text).tensors(m, text, "language_model.model.", "language_model.lm_head", spelling)


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    return PaliGemmaPictures.from_hf(preprocessor, config, **options)


PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    model=_model,
    tensors=_tensors,
    spellings=LLAVA.spellings,
    memory=MEMORY,
    ignored=(
        r"vision_tower\.vision_model\.head\..*",
        r".*\.position_ids",
        r".*rotary_emb\.inv_freq",
    ),
    processor=_processor,
    image_token=lambda config: config.get("image_token_index", config.get("image_token_id")),
    picture_options=("max_visual_tokens",),
    prompt="paligemma",
    own_prompt=True,
    begin="prompt",
    blocks="prefix",
)
