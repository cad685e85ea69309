"""Settings of generation_config.json that change greedy answers, and those of sampling."""

import numbers
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.processing.hub_tokenizer import read_json

__all__ = ["repetition_penalty", "sampling"]

# Fields that would change greedy answers but are not applied -> values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
}


def repetition_penalty(directory: Path) -> float:
    """The repetition penalty of a model's directory, 1.0 by default.

    Warns of other settings that would change greedy answers.

    Raises:
      UserError: not a positive number.
    """
    settings = read_json(directory / "generation_config.json")
    others = [name for name, plain in _NOT_APPLIED.items() if settings.get(name) not in plain]
    if others:
        warnings.warn(
            f"{directory / 'generation_config.json'}: {', '.join(others)}: not applied",
            stacklevel=2,
        )
    value = settings.get("repetition_penalty")
    where = f"{directory / 'generation_config.json'}: repetition_penalty"
    return 1.0 if value is None else _penalty(value, where)


def sampling(directory: Path) -> dict[str, Any]:
    """How the model of a directory is meant to be sampled, as in transformers.

    Fields that the file does not name have the defaults of transformers' `GenerationConfig`:
    temperature 1, the 50 most likely tokens. Values are checked where they are used.
    """
    settings = read_json(directory / "generation_config.json")
    named = {name: settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in named.items() if value is not None}
    return {"temperature": 1.0, "top_k": 50} | given


def _penalty(value: Any, name: str) -> float:
    number = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    if not number or not 1e-30 < value < 1e30:
        raise UserError(f"{name}: {value!r:.40}", allowed="a number above 0; 1.0 changes nothing")
    return float(value)
