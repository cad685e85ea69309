"""Configs: Python files with `get_config(arg)`, and overrides from the command line.

There is no second schema: a section's fields are those of the class that it is handed to.
"""

import dataclasses
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.data.config import DataConfig
from efficient_vlm.errors import UserError, closest, short, short_path, unknown
from efficient_vlm.evaluation.settings import EvalConfig
from efficient_vlm.models import connector, decoder, vlm
from efficient_vlm.models import encoder as vit
from efficient_vlm.nn import moe
from efficient_vlm.sharding import MeshConfig
from efficient_vlm.train.config import TrainConfig, is_published
from efficient_vlm.train.objective import DistilConfig, PreferenceConfig
from efficient_vlm.train.optimizer import OptimizerConfig
from efficient_vlm.train.pretrained_fields import PretrainedFields

# `--config.seed=N` sets both: with another train.seed alone, a run sees the same data in one order.
SEED, SEEDS = "seed", ("train.seed", "data.seed")
# Sections whose fields are those of a class that needs JAX; `data` has a class of its own.
SECTIONS = (
    "model",
    "model.encoder",
    "model.connector",
    "model.compressor",
    "model.decoder",
    "model.decoder.moe",
    "train",
    "train.optimizer",
    "train.mesh",
    "adapt",
    "distil",
    "distil.compressor",
    "preference",
    "eval",
)
# Those of them that runs from published models may leave out; other runs have none.
OF_PUBLISHED = ("adapt", "distil", "preference")


def load(spec: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Loads `path/to/config.py` or `path/to/config.py:arg` and applies overrides.

    Args:
      spec: a Python file that defines `get_config()` or `get_config(arg)`, and its argument.
      overrides: "section.field=value" strings; values are JSON, or plain words. "seed=7" sets
        train.seed and data.seed.

    Raises:
      UserError: no such file, no such field, or a value of another type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"--config: there is no file {short_path(path)} (from {Path.cwd()})",
            fix=f"try {_nearest_file(path)}"
            if _nearest_file(path)
            else "give a path to a .py file",
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if module_spec is None:
        raise UserError(f"--config: {short_path(path)} is not a Python file", allowed="*.py")
    module = importlib.util.module_from_spec(module_spec)
    # A config may build on its neighbours: `import quickstart`.
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(
            f"--config: {error.filename}, line {error.lineno}: {error.msg}", fix="correct that line"
        ) from None
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"--config: {path} has no function get_config", fix="define get_config(arg)"
        )
    parameters = inspect.signature(module.get_config).parameters.values()
    takes_arg = bool(parameters)
    needs_arg = any(p.default is inspect.Parameter.empty for p in parameters)
    if arg and not takes_arg:
        raise UserError(f"--config: {path} takes no argument, got {short(arg)}", fix=f"use {path}")
    try:
        config = module.get_config(arg) if arg or needs_arg else module.get_config()
    except ValueError as error:
        raise UserError(f"--config={spec}: {error}", fix=f"see the first lines of {path}") from None
    config = ml_collections.ConfigDict(config)
    for override in _spread(overrides, config):
        apply_override(config, override)
    _check_types(config)
    return config


def _spread(overrides: Iterable[str], config: ml_collections.ConfigDict) -> list[str]:
    """ "seed=7" as the seeds of a run, in front of whatever sets one of them by itself."""
    overrides = list(overrides)
    # A file may have a field of this name for itself.
    both = [] if SEED in config else [each for each in overrides if each.startswith(f"{SEED}=")]
    spread = [f"{field}={each.partition('=')[2]}" for each in both for field in SEEDS]
    return spread + [each for each in overrides if each not in both]


def apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    """Sets one "section.field=value" in place; see `load`."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--config.{name}: no value", fix=f"write --config.{name}=VALUE")
    *sections, field = name.split(".")
    node: Any = config
    for depth, section in enumerate(sections):
        here, whole = ".".join(sections[:depth]), ".".join(sections[: depth + 1])
        absent = isinstance(node, ml_collections.ConfigDict) and section not in node
        made = _made(here, section, config) if whole in SECTIONS else None
        known = isinstance(made, Mapping) or (whole in OF_PUBLISHED and is_published(config))
        if absent and known:
            # A section that the file leaves out because its fields have defaults.
            with node.unlocked():
                node[section] = ml_collections.ConfigDict(dict(made or {}))
        if not isinstance(node, ml_collections.ConfigDict) or section not in node:
            raise _unknown_field(here, section, node)
        node = node[section]
    where = ".".join(sections)
    fields = _fields(where, config)
    defaults = {f.name: _default(f) for f in fields.values()}
    if not isinstance(node, ml_collections.ConfigDict) or (
        field not in node and field not in defaults
    ):
        raise _unknown_field(where, field, node, defaults)
    old = node[field] if field in node else defaults[field]
    value = _parse(name, text, fields[field].type if field in fields else _type_of(old), old)
    with node.unlocked():
        # Deleted first: ConfigDict would refuse None for a number, and a field's class decides.
        if field in node:
            del node[field]
        node[field] = value


def _parse(name: str, text: str, wanted: Any, old: Any) -> Any:
    """The first reading of `text` that has the type wanted: JSON or a word, text, a list."""
    bare = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    listed = [_word(part.strip()) for part in bare.split(",") if part.strip()]
    for value in (_word(text), text, listed):
        if _fits(value, wanted):
            if isinstance(value, dict):
                return ml_collections.ConfigDict(value)
            whole = isinstance(value, int) and not isinstance(value, bool)
            return float(value) if whole and not _fits(value, wanted, exact=True) else value
    plain = old is not None and isinstance(old, bool | int | float | str | list | tuple)
    raise UserError(
        f"--config.{name}: {short(text)} is not of type {spell(wanted)}",
        allowed=spell(wanted) + (f", such as {short(old)}" if plain else ""),
    )


def _word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _fits(value: Any, wanted: Any, *, exact: bool = False) -> bool:
    """Whether a value has the type of an annotation; whole numbers are floats unless `exact`."""
    inner = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return any(_fits(value, option, exact=exact) for option in inner)
    if wanted is None or wanted is type(None):
        return value is None
    if wanted in (bool, str):
        return isinstance(value, wanted)
    if wanted in (int, float):
        kinds = (float, int) if wanted is float and not exact else (wanted,)
        return isinstance(value, kinds) and not isinstance(value, bool)
    kind = typing.get_origin(wanted) or wanted
    if kind in (Mapping, dict):
        return isinstance(value, Mapping | ml_collections.ConfigDict)
    if kind in (Sequence, list, tuple):
        each = (inner or (Any,))[0]
        return isinstance(value, list | tuple) and all(_fits(item, each) for item in value)
    # Any, and what a config cannot hold, such as a NumPy dtype: its class decides.
    return wanted is Any or not isinstance(wanted, type)


def _type_of(old: Any) -> Any:
    """The annotation for a field that no class knows: the type of the value that it has."""
    if old is None:
        return Any
    if isinstance(old, Mapping | ml_collections.ConfigDict):
        return Mapping
    return Sequence if isinstance(old, list | tuple) else type(old)


def spell(wanted: Any) -> str:
    """An annotation as a person reads it: "int", "float | None"."""
    if isinstance(wanted, type) and not typing.get_args(wanted):
        return wanted.__name__
    return str(wanted).replace("typing.", "").replace("collections.abc.", "")


def _check_types(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first value whose type is not that of its class's field."""
    # data.* is checked by its own class, which JAX does not come with.
    for where in SECTIONS:
        node: Any = config
        for name in where.split("."):
            node = node.get(name) if isinstance(node, ml_collections.ConfigDict) else None
        if not isinstance(node, ml_collections.ConfigDict):
            continue
        for name, field in _fields(where, config).items():
            if name in node and not _fits(node[name], field.type):
                raise UserError(
                    f"{where}.{name}: {short(node[name])} has the wrong type",
                    allowed=spell(field.type),
                    fix=f"--config.{where}.{name}=VALUE, or change the config file",
                )


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


def _fields(where: str, config: ml_collections.ConfigDict) -> dict[str, dataclasses.Field]:
    """The fields that a section may have: those of the class that it is handed to."""
    cls = class_of(where, config)
    if cls is None:
        return {}
    hidden = hidden_fields(where)
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in hidden}


def hidden_fields(where: str) -> frozenset[str]:
    """Fields of a section's class that are none of the config's: those of every Linen module."""
    return frozenset(("parent", "name") if where.startswith("model") else ())


def class_of(where: str, config: ml_collections.ConfigDict) -> type | None:
    """The class that a section is handed to; None for a section of one's own, or no such method."""
    if where == "data":
        return DataConfig
    if where not in SECTIONS:
        return None
    if where.endswith(".compressor"):
        return METHODS.get(config.get(where.split(".")[0], {}).get("compressor", {}).get("name"))
    return {
        "model": PretrainedFields if is_published(config) else vlm.VisionLanguageModel,
        "model.encoder": vit.ViT,
        "model.connector": connector.Connector,
        "model.decoder": decoder.Decoder,
        "model.decoder.moe": moe.MoE,
        "train": TrainConfig,
        "train.optimizer": OptimizerConfig,
        "train.mesh": MeshConfig,
        "adapt": AdaptConfig,
        "distil": DistilConfig,
        "preference": PreferenceConfig,
        "eval": EvalConfig,
    }[where]


def _made(where: str, name: str, config: ml_collections.ConfigDict) -> Any:
    """The default of a field of a section's class, None if there is no such field."""
    field = _fields(where, config).get(name)
    return None if field is None else _default(field)


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _nearest_file(path: str) -> str | None:
    folder = Path(path).parent
    names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
    guess = closest(Path(path).name, names)
    return str(folder / guess) if guess else None
