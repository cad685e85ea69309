"""All families, and which one a config.json belongs to."""

from efficient_vlm.errors import UserError, unknown
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


def family_of(config: Config) -> Family:
    """The family of a config.json; UserError with the nearest name if there is none."""
    kind = config.get("model_type")
    if kind is None:
        raise UserError(
            "config.json: no model_type",
            allowed=", ".join(sorted(FAMILIES)),
            fix="use the directory that transformers' save_pretrained writes",
        )
    if kind not in FAMILIES:
        raise unknown("config.json: model_type", str(kind), FAMILIES)
    return FAMILIES[kind]
