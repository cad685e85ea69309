"""From a config section to a module: the module's fields are the schema."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
from flax import linen as nn
from flax.core import FrozenDict

from efficient_vlm.checks import known_fields
from efficient_vlm.errors import UserError

T = TypeVar("T")


def construct(cls: type[T], config: Mapping[str, Any], where: str, **extra: Any) -> T:
    """Builds a dataclass (a Linen module is one) from a mapping of its fields.

    Args:
      cls: the class.
      config: field values.
      where: the section's name in the config, for messages.
      extra: further fields; `config` takes precedence.

    Raises:
      UserError: for an unknown or a missing field, naming it.
    """
    hidden = ("parent", "name") if issubclass(cls, nn.Module) else ()
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in hidden}
    known_fields(where, config, fields)
    values = {**extra, **config}
    absent = dataclasses.MISSING
    for name, field in fields.items():
        if name not in values and field.default is absent and field.default_factory is absent:
            raise UserError(f"{where}.{name}: missing", fix=f"set {where}.{name} in the config")
    return cls(**values)


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain JSON types, as written to config.json."""
    return json.loads(json.dumps(config.to_dict()))


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section as a plain dict; empty if it is absent."""
    value = config.get(name) or {}
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else dict(value)


def frozen(value: Any) -> Any:
    """Mappings and lists as FrozenDicts and tuples, all the way down: a module must be hashable."""
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    return value
