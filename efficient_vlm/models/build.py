"""From a config section to a module: the module's fields are the schema."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

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
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in _LINEN}
    check_fields(where, config, fields)
    values = {**extra, **config}
    absent = dataclasses.MISSING
    for name, field in fields.items():
        if name not in values and field.default is absent and field.default_factory is absent:
            raise UserError(f"{where}.{name}: missing", fix=f"set {where}.{name} in the config")
    return cls(**values)


_LINEN = ("parent", "name")
