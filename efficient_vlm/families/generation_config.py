"""Settings of generation_config.json that change greedy answers, and those of sampling."""

import numbers
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.hub_tokenizer import read_json

__all__ = ["repetition_penalty", "sampling", "stop_strings"]

# Fields that would change greedy answers but are not applied -> values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "force_words_ids": (None, []),
    "guidance_scale": (None, 1.0),
    "max_length": (None, 20),
    "max_new_tokens": (None,),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "remove_invalid_values": (None, False),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None, {}),
}
# The same of those that change drawn answers only.
_NOT_DRAWN: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}
_FILE = "generation_config.json"


def repetition_penalty(directory: Path) -> float:
    """The repetition penalty of a model's directory, 1.0 by default.

    Warns of all other settings that change greedy answers, or would if they were applied.

    Raises:
      UserError: not a positive number.
    """
    settings = read_json(directory / _FILE)
    _warn(directory, settings, _NOT_APPLIED)
    if settings.get("stop_strings") not in (None, "", [], [""]):
        warnings.warn(
            f"{directory / _FILE}: stop_strings: they end answers, and are cut off (stop=[] keeps "
            "answers whole)",
            stacklevel=2,
        )
    value = settings.get("repetition_penalty")
    return 1.0 if value is None else _penalty(value, f"{directory / _FILE}: repetition_penalty")


def _warn(directory: Path, settings: dict[str, Any], plain: dict[str, tuple[Any, ...]]) -> None:
    """Names settings that are not applied and have other values than plain ones."""
    others = [name for name, values in plain.items() if settings.get(name) not in values]
    if others:
        warnings.warn(f"{directory / _FILE}: {', '.join(others)}: not applied", stacklevel=3)


def stop_strings(directory: Path) -> tuple[str, ...]:
    """The strings that end an answer by a model's directory, () by default; empty ones end none.

    Their lengths and their number are checked where they are used.

    Raises:
      UserError: no string, and no list of strings.
    """
    found = read_json(directory / _FILE).get("stop_strings")
    strings = [found] if isinstance(found, str | None) else found
    if not isinstance(strings, list) or not all(isinstance(s, str | None) for s in strings):
        raise UserError(
            f"{directory / _FILE}: stop_strings: {short(found)}",
            allowed="a string, a list of strings, null",
            fix="correct it there, or give stop ([] for none)",
        )
    return tuple(string for string in strings if string)


def sampling(directory: Path) -> dict[str, Any]:
    """How the model of a directory is meant to be sampled, as in transformers.

    Fields that the file does not name have the defaults of transformers' `GenerationConfig`:
    temperature 1, the 50 most likely tokens. Values are checked where they are used.
    """
    settings = read_json(directory / _FILE)
    _warn(directory, settings, _NOT_DRAWN)
    named = {name: settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in named.items() if value is not None}
    return {"temperature": 1.0, "top_k": 50} | given


def _penalty(value: Any, name: str) -> float:
    number = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    if not number or not 1e-30 < value < 1e30:
        raise UserError(f"{name}: {value!r:.40}", allowed="a number above 0; 1.0 changes nothing")
    return float(value)
