"""What the parsers of all verbs share: error messages, examples, common and dotted options.

Neither this module nor a parser imports anything heavy: a verb imports its work when it runs.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficient_vlm.errors import UserError, closest, short, unknown

PROGRAM = "efficient-vlm"
# Dotted options, --config.FIELD=VALUE and others: prefix -> its text in the help of a verb.
DOTTED = {
    "config": "--config.FIELD=VALUE  a field of the config, such as --config.model.dtype=bfloat16\n"
    "--config.seed=N       train.seed and data.seed: another run on other draws of the data\n"
    "--config.help         list all fields: type, default, meaning",
    "compressor": "--compressor.OPTION=VALUE       an option of all methods that have it\n"
    "--compressor.NAME.OPTION=VALUE  an option of one; `efficient-vlm methods NAME` lists them",
    "pictures": "--pictures.OPTION=VALUE  how pictures are cut or resized: max_visual_tokens,\n"
    "                         min_pixels, max_pixels (Qwen-VL), split (SmolVLM), max_tiles\n"
    "                         (InternVL), max_crops (Molmo), pan_and_scan (Gemma 3),\n"
    "                         skip_blank (SmolVLM, InternVL)",
}


class Given(NamedTuple):
    """Dotted options: "field=value" of --config.field=value, and likewise for the others."""

    config: tuple[str, ...] = ()
    compressor: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError, with the nearest name for a wrong one.

    Attributes:
      dotted: keys of DOTTED that the verb takes.
    """

    dotted: tuple[str, ...] = ()

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}", fix=f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks a value against `choices`; the error names the nearest of them."""
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else self.prog
            raise unknown(name, str(value), action.choices)

    def own_options(self) -> list[str]:
        """--name of every option but --help."""
        names = (action.option_strings[-1:] for action in self._actions)
        return [name for each in names for name in each if name != "--help"]

    def nested(self) -> Mapping[str, "Parser"]:
        """The parsers of nested verbs, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return {}

    def every(self) -> Iterator["Parser"]:
        """This parser and all nested ones."""
        yield self
        for parser in self.nested().values():
            yield from parser.every()


def add_verbs(parser: Parser, title: str, **options: Any) -> Any:
    """The group that `add_verb` adds verbs to; `options` are those of `add_subparsers`."""
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
    """Adds a verb and returns its parser.

    Args:
      verbs: from `add_verbs`.
      name, text: of the verb, for its help.
      run: executes the verb and returns the exit code; None if only nested verbs do.
      examples: commands that work, without the name of the program.
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


def add_revision(parser: Parser) -> None:
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a model on a hub (default: its main one)",
    )


def add_json(parser: Parser, text: str = "print as JSON") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_quiet(parser: Parser) -> None:
    parser.add_argument(
        "--quiet", action="store_true", help="no lines about what is being compiled"
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
    """Imports what --import names."""
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


# ---- names for shell completion ------------------------------------------------------------------


def complete_list(prefix: str, names: Sequence[str]) -> list[str]:
    """`names`, each after the part of `prefix` up to its last comma."""
    before = prefix[: prefix.rfind(",") + 1]
    return [before + name for name in names]


def method_names() -> list[str]:
    """The names of the methods, read from their sources: importing them would bring JAX."""
    folder = Path(__file__).resolve().parents[1] / "compressors"
    table, names, method = (folder / "methods.py").read_text(), [], ""
    for file in folder.rglob("*.py"):
        for line in file.read_text().splitlines():
            if match := re.match(r"class (\w+)\(", line):
                method = match[1]
            elif match := re.match(r'    label = "(\w+)"', line):
                # Parts of a method have labels, too, but no row in the table.
                names += [match[1]] * bool(re.search(rf"\b{method},", table))
    return sorted(names)


def preset_names() -> list[str]:
    """The names of the published models."""
    from efficient_vlm.families import published

    return list(published.names())


# ---- dotted options ------------------------------------------------------------------------------


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


def read_given(rest: Sequence[str], parser: Parser, everything: Parser) -> Given:
    """The dotted options among the words that a parser did not recognise.

    Args:
      rest: these words.
      parser: of the verb.
      everything: of the whole program; tells which other verb takes an option.

    Raises:
      UserError: any other word, an option without a value, or one that the verb does not take.
    """
    texts: dict[str, list[str]] = {key: [] for key in DOTTED}
    for word in rest:
        key = next((key for key in DOTTED if word.startswith(f"--{key}.")), None)
        if key is None:
            raise _unknown_option(word, parser, everything)
        text = word.removeprefix(f"--{key}.")
        if key not in parser.dotted:
            raise _not_taken(key, text, parser)
        if "=" not in text:
            raise UserError(f"{word}: no value", fix=f"write {word}=VALUE")
        texts[key].append(text)
    return Given(**{key: tuple(each) for key, each in texts.items()})


def _verb(parser: Parser) -> str:
    return parser.prog.removeprefix(f"{PROGRAM} ")


def _unknown_option(word: str, parser: Parser, everything: Parser) -> UserError:
    """The error for an option of other verbs, or of none."""
    name, own = word.split("=")[0], parser.own_options()
    takers = [f"`{_verb(each)}`" for each in everything.every() if name in each.own_options()]
    if takers:
        *first, last = takers
        listed = f"{', '.join(first)} and {last} take" if first else f"{last} takes"
        return UserError(
            f"{name}: `{_verb(parser)}` does not take it",
            allowed=", ".join(own),
            fix=f"only {listed} it",
        )
    guess = closest(name, [*own, "--help"])
    fix = f"did you mean {guess}?" if guess else f"see {parser.prog} --help"
    return UserError(f"unknown option {short(word)}", fix=fix)


def _not_taken(key: str, text: str, parser: Parser) -> UserError:
    """The error for a dotted option that a verb does not take."""
    verb = _verb(parser)
    if key == "config":
        return UserError(
            f"--config.{text}: {verb} takes no config",
            fix=f"leave it out; {verb} uses the config of the run",
        )
    if key == "compressor":
        return UserError(
            f"--compressor.{text}: {verb} takes no options of a compressor",
            allowed=", ".join(parser.own_options()) or None,
            fix="config fields are --config.model.compressor.FIELD=VALUE",
        )
    return UserError(f"--pictures.{text}: {verb} takes no options of pictures")
