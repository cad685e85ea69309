"""SmolVLM (arXiv 2504.05299), SmolVLM2 and Idefics3 (arXiv 2408.12637): the same forward pass."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import siglip, siglip_tensors
from efficient_vlm.processing.pictures.smolvlm import SmolVLMPictures


def _model(config: Config) -> dict[str, Any]:
    text = config["text_config"]
    return dict(
        vocab_size=text["vocab_size"],
        encoder=siglip(config["vision_config"], position="bucketed"),
        compressor=dict(name="none"),
        projector=dict(name="patch_merger", side=config["scale_factor"], bias=False),
        connector=dict(identity=True),
        decoder=decoder_fields(text, config.get("tie_word_embeddings")),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text = config["text_config"]
    siglip_tensors(m, config["vision_config"], "model.vision_model.")
    m.linear("project/out", "model.connector.modality_projection.proj")
    text_of(text).tensors(m, text, "model.text_model.", "lm_head", spelling)


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    return SmolVLMPictures.from_hf(preprocessor, config, **options)


SMOLVLM = Family(
    name="smolvlm",
    model_types=("smolvlm", "idefics3"),
    model=_model,
    tensors=_tensors,
    ignored=(r".*rotary_emb\.inv_freq", r".*\.position_ids"),
    processor=_processor,
    image_token=lambda config: config["image_token_id"],
    picture_options=("split", "max_visual_tokens", "skip_blank"),
)
