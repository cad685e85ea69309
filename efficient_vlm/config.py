"""Configs: Python files with `get_config(arg)`, and overrides from the command line.

There is no second schema: a section's fields are those of the class that it is handed to.
"""

import dataclasses
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from efficient_vlm.errors import UserError, closest, unknown


def load(spec: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Loads `path/to/config.py` or `path/to/config.py:arg` and applies overrides.

    Args:
      spec: a Python file that defines `get_config()` or `get_config(arg)`, and its argument.
      overrides: "section.field=value" strings; values are JSON, or plain words.

    Raises:
      UserError: no such file, no such field, or a value of another type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"--config: there is no file {path!r} (from {Path.cwd()})",
            fix=f"try {_nearest_file(path)}"
            if _nearest_file(path)
            else "give a path to a .py file",
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if module_spec is None:
        raise UserError(f"--config: {path!r} is not a Python file", allowed="*.py")
    module = importlib.util.module_from_spec(module_spec)
    # A config may build on its neighbours: `import quickstart`.
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"--config: {path} has no function get_config", fix="define get_config(arg)"
        )
    takes_arg = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes_arg:
        raise UserError(f"--config: {path} takes no argument, got {arg!r}", fix=f"use {path}")
    try:
        config = module.get_config(arg) if arg else module.get_config()
    except ValueError as error:
        raise UserError(f"--config={spec}: {error}", fix=f"see the first lines of {path}") from None
    config = ml_collections.ConfigDict(config)
    for override in overrides:
        apply_override(config, override)
    return config


def apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    """Sets one "section.field=value" in place; see `load`."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--config.{name}: no value", fix=f"write --config.{name}=VALUE")
    *sections, field = name.split(".")
    node: Any = config
    for depth, section in enumerate(sections):
        here = ".".join(sections[:depth])
        if not isinstance(node, ml_collections.ConfigDict) or section not in node:
            raise _unknown_field(here, section, node)
        node = node[section]
    where = ".".join(sections)
    defaults = _defaults(where, config)
    if not isinstance(node, ml_collections.ConfigDict) or (
        field not in node and field not in defaults
    ):
        raise _unknown_field(where, field, node, defaults)
    old = node[field] if field in node else defaults[field]
    value = _parse(name, text, old)
    with node.unlocked():
        # Deleted first: ConfigDict would refuse None for a number, and a field's class decides.
        if field in node:
            del node[field]
        node[field] = value


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain JSON types, as written to config.json."""
    return json.loads(json.dumps(config.to_dict()))


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section as a plain dict; empty if it is absent."""
    value = config.get(name) or {}
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else dict(value)


def _parse(name: str, text: str, old: Any) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    if isinstance(old, ml_collections.ConfigDict) and isinstance(value, dict):
        return ml_collections.ConfigDict(value)
    if isinstance(old, list | tuple) and isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if isinstance(old, list | tuple) and isinstance(value, list):
        return type(old)(value)
    if isinstance(old, str) and not isinstance(value, str) and value is not None:
        return text
    fits = (
        old is None
        or value is None
        or old is dataclasses.MISSING
        or (isinstance(value, type(old)) and isinstance(value, bool) == isinstance(old, bool))
        or (isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool))
    )
    if not fits:
        raise UserError(
            f"--config.{name}: {text!r} is not of type {type(old).__name__}",
            allowed=f"a {type(old).__name__}, such as {old!r}",
        )
    return float(value) if isinstance(old, float) and value is not None else value


def _unknown_field(where: str, field: str, node: Any, defaults: Iterable[str] = ()) -> UserError:
    full = f"{where}.{field}" if where else field
    known = [*(node if isinstance(node, ml_collections.ConfigDict) else ()), *defaults]
    if not known:
        return UserError(f"--config.{full}: {where} is a value, not a section")
    guess = closest(field, known)
    error = unknown(f"--config.{full}", field, set(known))
    if guess:
        path = f"{where}.{guess}" if where else guess
        return UserError(f"--config.{full}: unknown field", fix=f"did you mean --config.{path}?")
    return error


def _defaults(where: str, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields a section may have beside those its file names, with their defaults."""
    # Late, and here alone: the classes bring JAX with them.
    from efficient_vlm.audit.evaluate import EvalConfig
    from efficient_vlm.compressors.methods import METHODS
    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.models import decoder, moe, vit, vlm
    from efficient_vlm.train.loop import TrainConfig
    from efficient_vlm.train.optimizer import OptimizerConfig

    classes = {
        "data": DataConfig,
        "model": vlm.VisionLanguageModel,
        "model.encoder": vit.ViT,
        "model.connector": vlm.Connector,
        "model.decoder": decoder.Decoder,
        "model.decoder.moe": moe.MoE,
        "train": TrainConfig,
        "train.optimizer": OptimizerConfig,
        "eval": EvalConfig,
    }
    if where == "model.compressor":
        classes[where] = METHODS.get(config.model.compressor.name)
    if classes.get(where) is None:
        return {}
    hidden = ("parent", "name") if where.startswith("model") else ()
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(classes[where])
        if f.init and f.name not in hidden
    }


def _nearest_file(path: str) -> str | None:
    folder = Path(path).parent
    names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
    guess = closest(Path(path).name, names)
    return str(folder / guess) if guess else None
