"""Published models: what their `config.json` says, their sizes and their visual tokens.

One JSON file per model. `config` holds every key that decides an array's shape or a value of the
forward pass, so that no default of another library is needed. It uses `rope_parameters` and
`layer_types` as transformers 5 does. Files on the hub may use older
spellings (`rope_theta` with `rope_scaling`, a flat text configuration).
`tests/parity/test_published_counts.py` counts every model's parameters from its `config`.
"""

import json
from importlib import resources
from typing import Any

from efficient_vlm.errors import unknown

_FILES = resources.files("efficient_vlm.families") / "published"


def names() -> tuple[str, ...]:
    """The models that `get` knows, sorted."""
    files = _FILES.iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def get(name: str) -> dict[str, Any]:
    """One published model, as a new copy.

    Args:
      name: one of `names()`.

    Returns:
      source: the paper and the weights' name on the hub.
      config: the content of `config.json`.
      image_processor: the content of `preprocessor_config.json`; None for a language model. Sizes
        in pixels, `resample` as Pillow numbers its filters.
      params: parameters of the checkpoint, tied tables once; `count` says how they were counted.
      params_active: those that one token uses, for a mixture of experts, else None.
      params_vision: of the vision tower, with the merger for Qwen; None for a language model.
      unused: part of a tensor's name -> parameters of the vision tower that the checkpoint holds
        and no forward pass reads.
      visual_tokens: `tokens` that a `picture` (height x width in pixels, or "any") becomes, over
        `images` tiles or crops; `sequence`, where given, also counts the tokens that mark rows and
        crops. None for a language model.
      notes: remarks on the numbers.

    Raises:
      UserError: no such model, with the nearest name.
    """
    known = names()
    if name not in known:
        raise unknown("model", str(name), known)
    return json.loads(_FILES.joinpath(f"{name}.json").read_text("utf-8"))
