"""From a config section to a module: the module's fields are the schema."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ml_collections
from flax import linen as nn
from flax.core import FrozenDict

from efficient_vlm.errors import UserError, check_fields

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
    check_fields(where, config, fields)
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


_RANGES: dict[str, Callable[[float], bool]] = {
    "1 or more": lambda x: x >= 1,
    "0 or more": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "0 or more, below 1": lambda x: 0 <= x < 1,
}


def check_range(settings: Any, where: str, allowed: str, *names: str) -> None:
    """Raises UserError for a field that is no finite number in a range, nor a None that it may be.

    Args:
      settings: a dataclass with the fields.
      where: in front of their names in the error.
      allowed: a key of `_RANGES`.
      names: of the fields.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(settings)}
    for name in names:
        value = getattr(settings, name)
        if value is None and "None" in kinds[name]:
            continue
        finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not finite or not _RANGES[allowed](value):
            raise UserError(f"{where}.{name}: {value!r}", allowed=allowed)


def check_positive(where: str, module: Any, names: tuple[str, ...]) -> None:
    """Raises UserError unless these fields of `module` are whole numbers above 0 (or None)."""
    for name in names:
        value = getattr(module, name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise UserError(f"{where}.{name}: {value!r}", allowed="a whole number above 0")
