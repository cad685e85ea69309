"""`--config.help`: every field of a config with its type, default and meaning."""

import dataclasses
import shutil
import sys
import textwrap
from typing import Any

import ml_collections

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli.docstrings import Described, described
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.errors import unknown
from efficient_vlm.families import presets

_ALL = ("data", *configs.SECTIONS)
_ABSENT = object()


def print_fields(
    section: str | None = None, config: str | None = None, preset: str | None = None
) -> None:
    """Prints all fields, or those of a section and of what is in it.

    Args:
      section: such as "train" or "model.encoder"; None for all.
      config, preset: "FILE.py" or "FILE.py:ARG", or a published model, whose values are shown where
        they are not the defaults, and whose compressor's options are listed; None for neither.

    Raises:
      UserError: no such section, config or preset.
    """
    shown = [name for name in _ALL if section is None or f"{name}.".startswith(f"{section}.")]
    if not shown:
        raise unknown("--config.SECTION.help", str(section), _ALL)
    loaded = ml_collections.ConfigDict({"model": {"compressor": {}}})
    if config is not None:
        loaded = configs.load(config)
    elif preset is not None:
        loaded = ml_collections.ConfigDict({"model": presets.get(preset)["model"]})
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    print("Each is an option, --config.FIELD=VALUE, and a field of the config file.")
    print(f"--config.{configs.SEED}=N sets {' and '.join(configs.SEEDS)}, unless given themselves.")
    for name in shown:
        cls = configs.class_of(name, loaded) or Compressor
        print(f"\n{name}: fields of {cls.__module__.removeprefix('efficient_vlm.')}.{cls.__name__}")
        if name.endswith(".compressor"):
            print("  name and options of a method; `efficient-vlm methods NAME` lists them")
        values = _values(loaded, name)
        for field in described(cls, configs.hidden_fields(name)):
            for line in _lines(name, field, values.get(field.name, _ABSENT), width):
                print(line)


def _values(config: ml_collections.ConfigDict, section: str) -> dict[str, Any]:
    """What a config says of a section; {} where it has none."""
    node: Any = config
    for name in section.split("."):
        node = node.get(name) if isinstance(node, ml_collections.ConfigDict) else None
    return node.to_dict() if isinstance(node, ml_collections.ConfigDict) else {}


def _lines(section: str, field: Described, value: Any, width: int) -> list[str]:
    required = field.default is dataclasses.MISSING
    text = f"  {section}.{field.name}: {configs.spell(field.type)}"
    text += ", required" if required else f" = {_short(field.default)}"
    # Sections of their own are listed below.
    nested = f"{section}.{field.name}" in _ALL
    if value is not _ABSENT and value != field.default and not nested:
        text += f"  (here {_short(value)})"
    wrapped = textwrap.wrap(
        field.sentence, width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return [text, *wrapped]


def _short(value: Any) -> str:
    if isinstance(value, type):  # A dtype.
        return value.__name__
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
