"""Whether the head of a language model is its embedding table, by what lies in its files.

`tie_word_embeddings` stands at the top of config.json, in its text_config, in both or in neither.
transformers 4 obeys the inner one and leaves defaults out, transformers 5 the outer one, so a file
of one may say the opposite to the other. The weights settle it.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.checkpoints.safetensors_format import CheckpointError
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.families.base import Config
from efficient_vlm.families.defaults import complete
from efficient_vlm.processing.hub_tokenizer import read_json

FLAG = "tie_word_embeddings"
_HEAD = re.compile(r"(.*\.)?lm_head\.weight|model\.transformer\.ff_out\.weight")
_TABLE = re.compile(r"(.*\.)?(embed_tokens|wte)\.weight")


def with_head(config: Config, weights: Path) -> dict[str, Any]:
    """config.json as it was read, with `tie_word_embeddings` as the weights have it.

    A head in the file is used: as the table, where a flag ties them and both are equal, else as
    one of its own. Without one, the table is the head where a flag says so; an absent flag has
    the default of its place. A warning names flags that say otherwise.

    Args:
      config: content of config.json.
      weights: what `safetensors_index.locate` gives. Weights that cannot be read, and a head that
        is missing although no flag ties it, change nothing here: `load` says what is wrong.
    """
    config = _without_nulls(config)
    full = complete(config)
    ties = any(value is True for value in _flags(full).values())
    held = _imported(weights) if weights.is_dir() else None
    held = held or _published(weights, ties)
    if held is None:
        return config
    tied, flags = held != "a head of its own", _flags(config)
    if any(value is not tied for value in flags.values()):
        said = " and ".join(f"{place} {str(value).lower():.20}" for place, value in flags.items())
        used = "the embedding table" if tied else "that one"
        warnings.warn(
            f"{weights}: config.json has {said}, the file has {held}: {used} is used", stacklevel=3
        )
    settled = with_flags(config, tied) | {FLAG: tied}
    if isinstance(config.get("text_config"), Mapping):
        settled["text_config"] = {**config["text_config"], FLAG: tied}
    return settled


def with_flags(config: Config, tied: bool) -> dict[str, Any]:
    """config.json with the flags that it has, all of this value."""
    config = dict(config) | {name: tied for name in (FLAG, "weight_tying") if name in config}
    text = config.get("text_config")
    if isinstance(text, Mapping) and FLAG in text:
        config["text_config"] = {**text, FLAG: tied}
    return config


def _flags(config: Config) -> dict[str, Any]:
    """Place -> value of every flag that is there; Molmo's own name of it is another."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    flags = {name: config[name] for name in (FLAG, "weight_tying") if name in config}
    return flags | ({f"text_config.{FLAG}": text[FLAG]} if FLAG in text else {})


def _without_nulls(config: Config) -> dict[str, Any]:
    """The config without flags that are null, which count as absent."""
    config = {name: value for name, value in config.items() if name != FLAG or value is not None}
    text = config.get("text_config")
    if isinstance(text, Mapping) and FLAG in text and text[FLAG] is None:
        config["text_config"] = {name: value for name, value in text.items() if name != FLAG}
    return config


def _imported(directory: Path) -> str | None:
    """The head of an imported model, in words; None for another directory."""
    paths = read_json(directory / "dtypes.json")
    if "language/embedding" not in paths:
        return None
    return "a head of its own" if "language/head/kernel" in paths else "no head"


def _published(weights: Path, ties: bool) -> str | None:
    """The head in a published checkpoint, in words, where a flag or default `ties` it or not; None
    if it cannot be told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They are given when the weights are read.
            checkpoint = Checkpoint.open(weights)
    except CheckpointError:
        return None
    heads = [name for name in checkpoint.names if _HEAD.fullmatch(name)]
    tables = [name for name in checkpoint.names if _TABLE.fullmatch(name)]
    if not heads:
        return "no head" if ties and tables else None
    # A head alone is the table of a tied model under its other name.
    if ties and (not tables or equal(checkpoint, heads[0], tables[0])):
        return "a head equal to the table"
    return "a head of its own"


def equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors [R, D] have equal values."""
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    a, b = checkpoint.read(one), checkpoint.read(other)
    # A few rows first: tables are large, and different ones differ at once.
    same = np.array_equal(a[:16], b[:16]) and np.array_equal(a, b)
    for name in (one, other):
        checkpoint.release(name)
    return same
