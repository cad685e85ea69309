"""Checks the shapes in the package's signatures while tests run; the package itself does not.

Importing this file installs the hook, so it comes before the first import of the package.
"""

import dataclasses
import typing
from collections.abc import Callable

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, install_import_hook, jaxtyped

CHECKED = ["efficient_vlm.nn", "efficient_vlm.compressors"]


# An int is a float, as PEP 484 has it.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """beartype for functions of arrays, but no constructors.

    The others raise a UserError for a wrong argument themselves, and JAX rebuilds pytrees with
    leaves that are not arrays.
    """
    shaped = any(map(_has_shape, function.__annotations__.values()))
    return _beartype(function) if shaped and function.__name__ != "__init__" else function


def _has_shape(annotation: typing.Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(annotation)))


install_import_hook(CHECKED, "shape_checks.check")


def check_fields(record: typing.Any) -> None:
    """AssertionError if arrays of a dataclass or named tuple do not have their annotated shapes."""
    types = typing.get_type_hints(type(record))
    if dataclasses.is_dataclass(record):
        types = {field.name: types[field.name] for field in dataclasses.fields(record)}
    with jaxtyped("context"):
        for name, kind in types.items():
            # `isinstance` asks the parts of a union for the class of a value, not for its shape.
            kinds, value = typing.get_args(kind) or (kind,), getattr(record, name)
            assert isinstance(value, kinds), f"{type(record).__name__}.{name}: not a {kind}"
