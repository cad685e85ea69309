"""`register`: methods of one's own, without a row in the table of `methods`."""

import dataclasses
import inspect
import re
from typing import Any, TypeVar

from efficient_vlm.compressors.base import PLACES, Compressor
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.compressors.signals import Signals
from efficient_vlm.errors import UserError, unknown

__all__ = ["register"]

T = TypeVar("T")  # Whatever is handed in: what is no class is refused with what to write.

_BUILT_IN = frozenset(METHODS)
_RESERVED = ("all",)  # What `efficient-vlm compress` calls every method.
_files: dict[str, str | None] = {}  # Label -> the file that its class came from.


def register(method: T) -> T:
    """Makes a method of one's own known by its `label`: to configs, `build` and the command line.

    A decorator, or a call. A class that is made anew (its cell runs again, its module is reloaded)
    takes the place of the one before.

        @register
        class Loudest(Compressor):
            label = "loudest"
            ...

    Args:
      method: a subclass of `Compressor`; docs/adding_a_compressor.md says how to write one.

    Returns:
      The class.

    Raises:
      UserError: no such subclass, a label that cannot be a name or is taken, class attributes
        outside what the model knows, or a method without a body.
    """
    _check_class(method)
    label = method.label
    known, file = METHODS.get(label), _file(method)
    if known is not None and not _made_anew(known, method, file):
        raise UserError(
            f"register: {label!r} is the name of {known.__module__}.{known.__qualname__} already",
            fix=f"give {method.__qualname__} another label",
        )
    METHODS[label], _files[label] = method, file
    return method


def _check_class(method: Any) -> None:
    if not inspect.isclass(method) or not issubclass(method, Compressor) or method is Compressor:
        raise UserError(
            f"register: {method!r:.80} is not a subclass of compressors.Compressor",
            fix="class MyMethod(compressors.Compressor): ...",
        )
    name, label = method.__qualname__, method.label
    word = isinstance(label, str) and re.fullmatch(r"[a-z][a-z0-9_]*", label)
    if not word or label in _RESERVED:
        raise UserError(
            f"register: {name}.label is {label!r}",
            allowed="a name of small letters, digits and _, other than all",
            fix='for example label = "my_method"',
        )
    if method.where not in PLACES:
        raise unknown(f"register: {name}.where", str(method.where), PLACES)
    signals = [field.name for field in dataclasses.fields(Signals)]
    for need in method.needs:
        if need not in signals:
            raise unknown(f"register: {name}.needs", str(need), signals)
    for field in dataclasses.fields(method):
        needed = field.default is dataclasses.MISSING is field.default_factory
        if needed and field.init and field.name != "budget":
            raise UserError(
                f"register: {name}.{field.name} has no default", fix="give it one, or None"
            )
    body = "__call__" if method.between else "stages"
    if getattr(method, body) is getattr(Compressor, body):
        raise UserError(
            f"register: {name} has no {body}", fix="see docs/adding_a_compressor.md, step 2"
        )


def _made_anew(known: type, method: type, file: str | None) -> bool:
    """Whether a class is the known one, or that one from the same cell, module or file."""
    if known is method:
        return True
    if known.__qualname__ != method.__qualname__ or known.label in _BUILT_IN:
        return False
    return known.__module__ == method.__module__ or _files.get(known.label) == file is not None


def _file(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except (TypeError, OSError):  # Of a notebook.
        return None
