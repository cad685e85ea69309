"""Checks the shapes in the package's signatures while tests run; the package itself does not.

Importing this file installs the hook, so it comes before the first import of the package.
"""

import dataclasses
import typing
from collections.abc import Callable

from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped

CHECKED = ["efficient_vlm.nn", "efficient_vlm.compressors"]


def check(function: Callable) -> Callable:
    """beartype, except for constructors.

    Modules raise a UserError for a wrong field themselves, and JAX rebuilds pytrees with leaves
    that are not arrays.
    """
    return function if function.__name__ == "__init__" else beartype(function)


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
