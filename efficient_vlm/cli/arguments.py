"""What the parsers of all verbs share: complaints, examples, options with a dot, common options.

Importing this costs nothing, and no parser does: a verb imports what it does when it runs.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficient_vlm.errors import UserError, closest, unknown

PROGRAM = "efficient-vlm"
# Options of which any field may follow: prefix -> what the help says of it.
DOTTED = {
    "config": "--config.FIELD=VALUE  a field of the config, such as --config.model.dtype=bfloat16\n"
    "--config.help         list all fields: type, default, meaning",
    "compressor": "--compressor.OPTION=VALUE       an option of all methods that have it\n"
    "--compressor.NAME.OPTION=VALUE  an option of one; `efficient-vlm methods NAME` lists them",
    "pictures": "--pictures.OPTION=VALUE  how pictures are cut or resized: min_pixels, max_pixels\n"
    "                         (Qwen-VL), split (SmolVLM), max_tiles (InternVL), max_crops (Molmo)",
}


class Given(NamedTuple):
    """Options with a dot: "field=value" of --config.field=value, and so on."""

    config: tuple[str, ...] = ()
    compressor: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, with the nearest name.

    Attributes:
      dotted: keys of DOTTED that the verb takes.
    """

    dotted: tuple[str, ...] = ()

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}", fix=f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's check of a value against `choices`, with the nearest of them."""
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else self.prog
            raise unknown(name, str(value), action.choices)

    def own_options(self) -> list[str]:
        """--name of every option, --help aside."""
        names = (action.option_strings[-1:] for action in self._actions)
        return [name for each in names for name in each if name != "--help"]

    def nested(self) -> Mapping[str, "Parser"]:
        """The verbs below this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return {}

    def every(self) -> Iterator["Parser"]:
        """This parser and all below it."""
        yield self
        for parser in self.nested().values():
            yield from parser.every()


def add_verbs(parser: Parser, title: str, **options: Any) -> Any:
    """What verbs are added to with `add_verb`; options of argparse's `add_subparsers`."""
    return parser.add_subparsers(title=title, parser_class=Parser, prog=parser.prog, **options)


def add_verb(
    verbs: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace, Given], int] | None,
    *,
    examples: Sequence[str] = (),
    dotted: Sequence[str] = (),
) -> Parser:
    """The parser of a verb.

    Args:
      verbs: from `add_verbs`.
      name, text: of the verb.
      run: what it does, with exit code; None if only verbs below it do anything.
      examples: what to type behind the program's name, each a command that works.
      dotted: keys of DOTTED.
    """
    lines = [f"  {PROGRAM} {example}" for example in examples]
    parser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog="\n".join(["examples:", *lines]) if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.dotted = tuple(dotted)
    parser.set_defaults(run=run, parser=parser)
    for key in dotted:
        parser.add_argument_group(f"options --{key}.*", DOTTED[key])
    return parser


# ---- common options ------------------------------------------------------------------------------


def add_config(parser: Parser, *, required: bool = True) -> None:
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE.py[:ARG]",
        help="config file and its argument" + ("" if required else ", instead of --preset"),
    )


def add_workdir(parser: Parser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")


def add_json(parser: Parser, text: str = "print as JSON") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_quiet(parser: Parser) -> None:
    parser.add_argument(
        "--quiet", action="store_true", help="say nothing of what is being compiled"
    )


def add_imports(parser: Parser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="file (or dotted module) that registers methods of your own; may be repeated",
    )


def import_methods(args: argparse.Namespace) -> None:
    """Runs what --import names."""
    if args.imports:
        from efficient_vlm.compressors.imports import import_methods

        import_methods(args.imports)


def add_distributed(parser: Parser) -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="WHERE",
        help="join the other processes of a job: alone on Slurm, TPU pods and MPI; "
        "or ADDRESS:PORT,PROCESSES,NUMBER",
    )


def add_methods(parser: Parser, text: str, *, several: bool = True) -> None:
    """--compressor, repeatable where `several`."""
    action = parser.add_argument(
        "--compressor",
        action="append" if several else "store",
        metavar="NAME[,NAME]" if several else "NAME",
        help=text,
    )
    action.completer = lambda prefix, **_: complete_list(prefix, method_names())


# ---- names for the completion of a shell ---------------------------------------------------------


def complete_list(prefix: str, names: Sequence[str]) -> list[str]:
    """`names` behind the commas of what has been typed."""
    before = prefix[: prefix.rfind(",") + 1]
    return [before + name for name in names]


def method_names() -> list[str]:
    """The names of the methods, read from their sources: importing them would bring JAX."""
    folder = Path(__file__).resolve().parents[1] / "compressors"
    table, names, method = (folder / "methods.py").read_text(), [], ""
    for file in folder.rglob("*.py"):
        for line in file.read_text().splitlines():
            if found := re.match(r"class (\w+)\(", line):
                method = found[1]
            elif found := re.match(r'    label = "(\w+)"', line):
                # Parts of a method have labels, too, but no row in the table.
                names += [found[1]] * bool(re.search(rf"\b{method},", table))
    return sorted(names)


def preset_names() -> list[str]:
    """The names of the published models."""
    from efficient_vlm.families import published

    return list(published.names())


# ---- options with a dot --------------------------------------------------------------------------


def joined(words: Sequence[str]) -> list[str]:
    """`--compressor.layer 2` as one word, so that the value is not taken for a file's name."""
    prefixes = tuple(f"--{key}." for key in DOTTED)
    done: list[str] = []
    for word in words:
        last = done[-1] if done else ""
        if last.startswith(prefixes) and "=" not in last and not word.startswith("--"):
            done[-1] = f"{last}={word}"
        else:
            done.append(word)
    return done


@dataclasses.dataclass(frozen=True)
class _Refused:
    """Complaints about words that a verb's parser has left over."""

    parser: Parser
    everything: Parser

    def option(self, word: str) -> UserError:
        """An option that others take, or nobody."""
        name = word.split("=")[0]
        short = self.parser.prog.removeprefix(f"{PROGRAM} ")
        own = self.parser.own_options()
        takers = [
            f"`{each.prog.removeprefix(f'{PROGRAM} ')}`"
            for each in self.everything.every()
            if name in each.own_options()
        ]
        if takers:
            *first, last = takers
            both = f"{', '.join(first)} and {last}" if first else last
            return UserError(
                f"{name}: `{short}` does not take it",
                allowed=", ".join(own),
                fix=f"only {both} take{'' if first else 's'} it",
            )
        guess = closest(name, [*own, "--help"])
        fix = f"did you mean {guess}?" if guess else f"see {self.parser.prog} --help"
        return UserError(f"unknown option {word!r}", fix=fix)

    def dotted(self, key: str, text: str) -> UserError:
        verb = self.parser.prog.removeprefix(f"{PROGRAM} ")
        if key == "config":
            return UserError(
                f"--config.{text}: {verb} takes no config",
                fix=f"leave it out; the run's own config is used by {verb}",
            )
        if key == "compressor":
            return UserError(
                f"--compressor.{text}: {verb} takes no options of a compressor",
                allowed=", ".join(self.parser.own_options()) or None,
                fix="config fields are --config.model.compressor.FIELD=VALUE",
            )
        return UserError(f"--pictures.{text}: {verb} takes no options of pictures")


def read_given(rest: Sequence[str], parser: Parser, everything: Parser) -> Given:
    """What a parser has left over, as options with a dot.

    Args:
      rest: words.
      parser: of the verb.
      everything: of the program, to say which other verb takes an option.

    Raises:
      UserError: any other word, an option without a value, or one that the verb does not take.
    """
    refused = _Refused(parser, everything)
    found: dict[str, list[str]] = {key: [] for key in DOTTED}
    for word in rest:
        key = next((key for key in DOTTED if word.startswith(f"--{key}.")), None)
        if key is None:
            raise refused.option(word)
        text = word.removeprefix(f"--{key}.")
        if key not in parser.dotted:
            raise refused.dotted(key, text)
        if "=" not in text:
            raise UserError(f"{word}: no value", fix=f"write {word}=VALUE")
        found[key].append(text)
    return Given(**{key: tuple(texts) for key, texts in found.items()})
