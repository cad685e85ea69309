"""All families, and which one a config.json belongs to."""

import re

from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.gemma3 import GEMMA3
from efficient_vlm.families.internvl import INTERNVL
from efficient_vlm.families.llava import LLAVA
from efficient_vlm.families.mobilevlm import MOBILEVLM
from efficient_vlm.families.molmo import MOLMO
from efficient_vlm.families.molmo2 import MOLMO2
from efficient_vlm.families.paligemma import PALIGEMMA
from efficient_vlm.families.qwen_vl import QWEN_VL
from efficient_vlm.families.smolvlm import SMOLVLM
from efficient_vlm.families.texts import TEXTS, text_family

FAMILIES: dict[str, Family] = {
    kind: family
    for family in (
        *(text_family(name) for name in TEXTS),
        GEMMA3,
        INTERNVL,
        LLAVA,
        MOBILEVLM,
        MOLMO,
        MOLMO2,
        PALIGEMMA,
        QWEN_VL,
        SMOLVLM,
    )
    for kind in family.model_types
}


# model_type of a known model in another layout -> whose layout, and what to take instead.
_CONVERTED = "use the release in transformers' layout (its name ends in -hf)"
_LAYOUTS = {
    r"llava_\w*(llama|mistral|mpt|qwen|gemma|phi)\w*": (
        "the original LLaVA code",
        "use the release in transformers' layout (llava-hf/...), or convert it with transformers' "
        "convert_llava_weights_to_hf.py",
    ),
    r"(tiny_?llava|TinyLlava)\w*": ("the original TinyLLaVA code", _CONVERTED),
    r"internvl_chat\w*": ("the original InternVL code", _CONVERTED),
}


def refuse_layout(config: Config) -> None:
    """Raises UserError for a known model whose config.json and weights are in another layout."""
    kind = config.get("model_type")
    original = kind == "llava" and "vision_config" not in config and "mm_vision_tower" in config
    for pattern, (whose, fix) in _LAYOUTS.items():
        if isinstance(kind, str) and re.fullmatch(pattern, "llava_llama" if original else kind):
            problem = f"config.json: model_type={kind!r:.60}, the layout of {whose}"
            raise UserError(problem, fix=fix)


def family_of(config: Config) -> Family:
    """The family of a config.json.

    Raises:
      UserError: another architecture, or another layout of a known one. There is no "did you mean":
        a program wrote this name, and the nearest one is another model.
    """
    kind = config.get("model_type")
    if kind is None:
        raise UserError(
            "config.json: no model_type",
            allowed=", ".join(sorted(FAMILIES)),
            fix="use the directory that transformers' save_pretrained writes",
        )
    refuse_layout(config)
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r:.60}, an architecture that is not known here",
            allowed=", ".join(sorted(FAMILIES)),
            fix="choose a model of one of these (efficient-vlm presets lists some)",
        )
    return FAMILIES[kind]
