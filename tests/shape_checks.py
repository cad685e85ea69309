"""Checks the shapes in the package's signatures while tests run; the package itself does not.

Importing this file installs the hook, so it comes before the first import of the package. The hook
is jaxtyping's `install_import_hook`, but for one thing: that one also wraps functions inside
functions, anew at each call, and functions without arrays, and would cost a tenth of the time.
"""

import ast
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from types import CodeType

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

CHECKED = ("efficient_vlm.nn", "efficient_vlm.compressors")

# An int is a float, as PEP 484 has it.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """The function with its signature checked at every call, if that has shapes."""
    shaped = any(map(_has_shape, function.__annotations__.values()))
    return jaxtyped(function, typechecker=_beartype) if shaped else function


def _has_shape(annotation: typing.Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(annotation)))


class _Loader(SourceFileLoader):
    """Loads a module with `checked` as the innermost decorator of its functions and methods."""

    def get_code(self, fullname: str) -> CodeType:
        # Compiled here: the bytecode on disk is that without checks.
        tree = ast.parse(self.get_data(self.path))
        for function in _functions(tree):
            decorator = ast.parse(f"__import__('{__name__}').checked", mode="eval").body
            function.decorator_list.append(ast.copy_location(decorator, function))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (member for member in members if isinstance(member, ast.FunctionDef))


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None):
        if not any(name == module or name.startswith(f"{module}.") for module in CHECKED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder())


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
