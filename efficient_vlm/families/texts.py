"""All decoders, by the model_type of the text config."""

from collections.abc import Callable
from typing import Any, NamedTuple

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.gemma_text import gemma, gemma2, gemma3_text, sandwich_tensors
from efficient_vlm.families.gpt_text import (
    gpt_neo,
    gpt_neo_tensors,
    phi,
    phi3,
    phi3_tensors,
    phi_tensors,
)
from efficient_vlm.families.moe_text import MIXTRAL, OTHERS, mixtral, moe_tensors, olmoe, qwen3_moe
from efficient_vlm.families.text import llama, llama_tensors, mistral, olmo2, qwen2, qwen3


class Text(NamedTuple):
    """A kind of decoder.

    Attributes:
      fields: text config -> fields of `decoder.Decoder`.
      tensors: fills a name map: (map, text config, prefix of names, name of the head, spelling).
    """

    fields: Callable[[Config], dict[str, Any]]
    tensors: Callable[[NameMap, Config, str, str, str], None]


TEXTS: dict[str, Text] = {
    "llama": Text(llama, llama_tensors),
    "mistral": Text(mistral, llama_tensors),
    "gemma": Text(gemma, llama_tensors),
    "gemma2": Text(gemma2, sandwich_tensors),
    "gemma3_text": Text(gemma3_text, sandwich_tensors),
    "gpt_neo": Text(gpt_neo, gpt_neo_tensors),
    "phi": Text(phi, phi_tensors),
    "phi3": Text(phi3, phi3_tensors),
    "qwen2": Text(qwen2, llama_tensors),
    "qwen3": Text(qwen3, llama_tensors),
    "mixtral": Text(mixtral, moe_tensors("block_sparse_moe", MIXTRAL)),
    "olmo2": Text(olmo2, llama_tensors),
    "olmoe": Text(olmoe, moe_tensors("mlp", OTHERS)),
    "qwen3_moe": Text(qwen3_moe, moe_tensors("mlp", OTHERS)),
}


def text_of(config: Config) -> Text:
    """The kind of decoder of a text config; UserError for one that is not known."""
    kind = config.get("model_type", "llama")
    if kind not in TEXTS:
        raise UserError(
            f"config.json: a language model of model_type {kind!r:.60}, which is not known here",
            allowed=", ".join(sorted(TEXTS)),
            fix="choose a model with one of these",
        )
    return TEXTS[kind]


def decoder_fields(text: Config, tied: Any = None) -> dict[str, Any]:
    """Fields of the decoder; `tied`: whether the outer config ties the head, or None."""
    fields = text_of(text).fields(text)
    return fields if tied is None else {**fields, "tie_embeddings": bool(tied)}


def _model(config: Config) -> dict[str, Any]:
    return dict(
        vocab_size=config["vocab_size"],
        encoder=None,
        compressor=dict(name="none"),
        decoder=decoder_fields(config),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text_of(config).tensors(m, config, "model.", "lm_head", spelling)


def text_family(model_type: str) -> Family:
    """The family of a language model without images."""
    return Family(
        name=model_type,
        model_types=(model_type,),
        model=_model,
        tensors=_tensors,
        spellings={"hub": (), "memory": ()},
        begin="template",
        ignored=(r".*rotary_emb\.inv_freq", r".*attn(\.attention)?\.(masked_)?bias"),
    )
