"""adapter_config.json of PEFT: what of it is read, and what is refused."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.checkpoints.foreign import ADAPTER_CONFIG
from efficient_vlm.errors import UserError, short, short_path

__all__ = ["pattern_value", "read_settings"]

# Settings with which the tensors mean something else, and what they may be.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
}
# Ways to start that change the base as well, so that a file alone does not say what it adds.
_CHANGES_BASE = r"pissa|olora|corda|loftq|lora_ga"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder.

    Raises:
      UserError: none, or of an adapter that is not read here.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{short_path(folder)}: no {ADAPTER_CONFIG}",
            allowed=f"a folder of PEFT: {ADAPTER_CONFIG} and adapter_model.safetensors",
        ) from None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a JSON object", fix="download it again")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type={short(kind)}", allowed="LORA, with DoRA or rsLoRA")
    for name, plain in _PLAIN.items():
        if settings.get(name) not in plain:
            raise UserError(
                f"{path}: {name}={short(settings[name])}, which is not read here",
                allowed=f"{plain[-1]}",
                fix="merge it by PEFT (merge_and_unload) and load the whole model",
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and re.match(_CHANGES_BASE, start.lower()):
        raise UserError(
            f"{path}: init_lora_weights={short(start)}, which changes the base as well",
            allowed="true, false, gaussian, eva, orthogonal",
            fix="save it by PEFT with path_initial_model_for_weight_conversion",
        )
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = settings.get(name, 8)
        if not _is_number(value, least):
            raise UserError(f"{path}: {name}={short(value)}", allowed=f"a number, {least} or more")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, name, settings.get(name))
    return settings


def _check_patterns(path: Path, name: str, patterns: Any) -> None:
    """Raises UserError for anything but numbers by pattern."""
    if patterns is None:
        return
    values = patterns.values() if isinstance(patterns, dict) else [None]
    if not all(_is_number(value, 0) for value in values):
        allowed = "numbers by pattern, 0 or more"
        raise UserError(f"{path}: {name}={short(patterns)}", allowed=allowed)


def _is_number(value: Any, least: int) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and least <= value < float("inf")


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any, where: str) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT.

    Args:
      patterns: regular expression, usually a name -> value.
      module: its name in memory.
      default: for a module that none matches.
      where: for messages.

    Raises:
      UserError: no regular expression.
    """
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return value
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error:
            allowed = "regular expressions"
            raise UserError(f"{where}: {short(pattern)}", allowed=allowed) from None
        if matches:
            return value
    return default
