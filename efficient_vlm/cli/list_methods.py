"""`efficient-vlm methods`: what there is to make visual tokens fewer, and the options of each."""

import dataclasses
import json
import re
import shutil
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli.docstrings import described, description, docstring, summary
from efficient_vlm.compressors import Signals, VisualTokens, methods
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.errors import UserError

# Where a method comes from, in its docstring: a paper, or the model that it was published with.
_PAPER = re.compile(r"arXiv:? ?(\d{4}\.\d{4,5})(?:v\d)?")
_MODELS = ("Gemma 4", "MiniCPM-V 4.6", "SmolVLM")
_LINEN = frozenset(("parent", "name"))
# Of the example: LLaVA's patches, and the number of tokens that most papers report.
_PATCHES: Grid = (24, 24)
_BUDGET = 64


def list_methods(name: str | None = None, *, as_json: bool = False) -> int:
    """Prints all methods, or the options of one.

    Args:
      name: of a method; None for all.
      as_json: print as JSON.

    Raises:
      UserError: no such method.
    """
    if name is not None:
        facts = describe(name)
        if as_json:
            print(json.dumps(facts, indent=1))
        else:
            _show_one(facts)
        return 0
    rows = [row(each) for each in methods.names()]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _show_all(rows)
    return 0


def row(name: str) -> dict[str, Any]:
    """A method in one line: name, where it acts, whether it has parameters, what it does."""
    method = methods.find(name)
    return {
        "name": name,
        "where": method.where,
        "trained": is_trained(name),
        "summary": summary(method),
        "source": sources(name),
    }


def describe(name: str) -> dict[str, Any]:
    """`row`, and the options with their types, defaults and meaning, and a command to try."""
    method = methods.find(name)
    options = []
    for field in described(method, _LINEN | method.internal):
        required = field.name == "budget" and not method.optional_budget
        option = {"name": field.name, "type": configs.spell(int if required else field.type)}
        option |= {"required": required, "meaning": field.sentence}
        option["default"] = None if field.default is dataclasses.MISSING else field.default
        options.append(option)
    facts = {"text_guided": method.text_guided, "needs": sorted(method.needs)}
    facts["description"] = description(method)
    return {**row(name), **facts, "options": options, "example": example(name)}


def sources(name: str) -> list[str]:
    """arXiv numbers in the docstring of a method, or the models it names, in order."""
    text = " ".join(docstring(methods.find(name)).split())
    return list(dict.fromkeys(_PAPER.findall(text))) or [m for m in _MODELS if m in text]


def is_trained(name: str) -> bool | None:
    """Whether a method has parameters, from the shapes of its initialiser; None for one of your own
    that does not run."""
    if methods.find(name).in_decoder:
        return False
    try:
        return _has_parameters(name)
    except Exception:
        if methods.find(name).__module__.startswith("efficient_vlm."):
            raise
        return None  # The list goes on, and `audit` says what is wrong.


def _has_parameters(name: str) -> bool:
    grid, width = (4, 4), 64
    tokens = VisualTokens.from_grid(jnp.zeros((1, 16, width)), grid)
    row = jnp.zeros((1, 16))
    signals = Signals(row, row, jnp.zeros((1, 16, 2, 4)), jnp.zeros((1, width)), tokens.embed)
    signals = signals.replace(pixels=tokens.embed)
    module = methods.build(name, budget=methods.reachable(name, grid)[-1], grid=grid)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, signals)
    return bool(jax.tree.leaves(shapes))


def example(name: str) -> str:
    """A command that audits the method on LLaVA-1.5, at a budget that it can reach."""
    command = f"efficient-vlm audit --preset=llava-1.5-7b --compressor={name}"
    try:
        methods.build(name, parent=None)
    except UserError:  # It needs a budget.
        budget = min(methods.reachable(name, _PATCHES), key=lambda b: (abs(b - _BUDGET), b))
        return f"{command} --compressor.budget={budget}"
    return command


def _show_all(rows: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    table.add_column("acts", no_wrap=True)
    table.add_column("trained", no_wrap=True)
    table.add_column("what it does")
    for each in rows:
        trained = {True: "yes", False: "-", None: "?"}[each["trained"]]
        # Text between brackets is no markup.
        table.add_row(each["name"], each["where"], trained, each["summary"].replace("[", r"\["))
    console.print(table)
    console.print(
        "acts: between encoder and decoder, or inside one of them; trained: has parameters\n"
        "options and an example: efficient-vlm methods NAME; all: docs/compressors.md\n"
        "your own: --import=FILE.py, see docs/adding_a_compressor.md",
        markup=False,
    )


def _show_one(facts: dict[str, Any]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100

    def wrapped(text: str, indent: int) -> str:
        pad = " " * indent
        return textwrap.fill(text, width, initial_indent=pad, subsequent_indent=pad)

    place = "between encoder and decoder"
    if facts["where"] != "between":
        place = f"inside the {facts['where']}"
    print(wrapped(f"{facts['name']}: {facts['summary']}.", 0))
    guided = ", by the question" if facts["text_guided"] else ""
    print(f"Acts {place}{guided}; {'has' if facts['trained'] else 'no'} trained parameters.")
    if facts["description"]:
        print(f"\n{facts['description']}")
    if facts["source"]:
        links = [f"https://arxiv.org/abs/{s}" if s[0].isdigit() else s for s in facts["source"]]
        print(f"Source: {', '.join(links)}")
    print("\nOptions, --compressor.OPTION=VALUE, or fields of model.compressor in a config:")
    for option in facts["options"]:
        default = ", required" if option["required"] else f" = {option['default']!r}"
        print(f"  {option['name']}: {option['type']}{default}")
        print(wrapped(option["meaning"], 6))
    print(f"\nExample: {facts['example']}")
