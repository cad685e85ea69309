"""What the docstring of a class says of its fields: the texts of `--config.help` and `methods`."""

import dataclasses
import inspect
import re
from typing import Any, NamedTuple

__all__ = ["Described", "described", "description", "docstring", "summary"]

_HEADING = re.compile(r"^[A-Z][\w ]*:$")
_ENTRY = re.compile(r"^  (\w+(?:, \w+)*): (.*)$")


class Described(NamedTuple):
    """One field of a class.

    Attributes:
      name, type: as annotated.
      default: its value; `dataclasses.MISSING` for a field that must be given.
      sentence: what a docstring says of it, "" where none does.
    """

    name: str
    type: Any
    default: Any
    sentence: str


def described(cls: type, hidden: frozenset[str] = frozenset()) -> list[Described]:
    """The fields of a dataclass that can be given, but for `hidden`, in order.

    A sentence stands under "Attributes:" of the class, or of the nearest class that it derives from
    and that has one.
    """
    sentences: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        sentences |= _attributes(base.__dict__.get("__doc__") or "")
    return [
        Described(field.name, field.type, _default(field), sentences.get(field.name, ""))
        for field in dataclasses.fields(cls)
        if field.init and field.name not in hidden
    ]


def docstring(cls: type) -> str:
    """A class's own docstring, without its indentation; "" where it has none."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    # Of a class without one, dataclasses make a signature.
    return "" if text.startswith(f"{cls.__name__}(") else text


def summary(cls: type) -> str:
    """The first sentence of a class's docstring, without the name that it begins with."""
    first = " ".join(docstring(cls).split("\n\n")[0].split())
    first = re.sub(r"^(`\w+`|[\w+]+)( \([^)]*\))?: ", "", first)
    return re.split(r"(?<=[.])\s", first)[0].rstrip(".")


def description(cls: type) -> str:
    """A class's docstring behind its first paragraph, up to the list of its attributes."""
    _, _, rest = docstring(cls).partition("\n\n")
    return re.split(r"^[A-Z][\w ]*:$", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _attributes(text: str) -> dict[str, str]:
    """Name -> text of the section "Attributes:" of a docstring."""
    sentences: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(text).splitlines():
        if _HEADING.match(line):
            inside, names = line == "Attributes:", []
        elif inside and (entry := _ENTRY.match(line)):
            names = entry[1].split(", ")
            sentences |= dict.fromkeys(names, entry[2])
        elif inside and line.startswith("    "):
            sentences |= {name: f"{sentences[name]} {line.strip()}" for name in names}
        elif line.strip():
            names = []
    return sentences
