# PYTHON_ARGCOMPLETE_OK
"""The command line: `efficient-vlm VERB ...`. Nothing heavy is imported before a verb runs."""

import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from efficient_vlm import __version__
from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Parser
from efficient_vlm.cli.verbs import (
    audit,
    checkpoints,
    compress,
    data,
    eval,
    generate,
    lists,
    report,
    train,
)
from efficient_vlm.errors import UserError, unknown

# In the order of the help.
_ADD = (
    train.add,
    eval.add,
    audit.add,
    compress.add,
    generate.add,
    checkpoints.add,
    lists.add_methods,
    lists.add_metrics,
    lists.add_presets,
    report.add,
    data.add,
    lists.add_doctor,
)


@functools.cache
def make_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=arguments.PROGRAM,
        description="Train, evaluate and audit token-efficient vision-language models.",
        epilog="`efficient-vlm VERB --help` has the options of a verb, with examples. Start: "
        "efficient-vlm train --config=configs/quickstart.py --workdir=runs/quickstart",
    )
    parser.add_argument("--version", action="version", version=f"efficient_vlm {__version__}")
    verbs = arguments.add_verbs(parser, "verbs", dest="verb", metavar="VERB")
    for add in _ADD:
        add(verbs)
    return parser


VERBS = tuple(make_parser().nested())


def run(argv: Sequence[str]) -> int:
    """Runs one command; raises UserError for a user's mistake."""
    everything = make_parser()
    if not argv:
        everything.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in VERBS:
        raise unknown("verb", argv[0], VERBS)
    words = arguments.joined(_nested_first(everything, argv))
    if request := _fields_request(everything, words):
        from efficient_vlm.cli.config_help import print_fields

        print_fields(**request)
        return 0
    args, rest = everything.parse_known_args(words)
    given = arguments.read_given(rest, getattr(args, "parser", everything), everything)
    if args.verb is None:
        raise UserError("no verb given", allowed=", ".join(VERBS), fix="see efficient-vlm --help")
    return args.run(args, given)


def _nested_first(parser: Parser, argv: Sequence[str]) -> list[str]:
    """`audit --preset=NAME aot` as `audit aot --preset=NAME`."""
    verb, *rest = argv
    below = parser.nested().get(verb)
    for place, word in enumerate(rest):
        if below is not None and word in below.nested():
            return [verb, word, *rest[:place], *rest[place + 1 :]]
    return list(argv)


def _fields_request(parser: Parser, words: Sequence[str]) -> dict[str, str | None]:
    """What `--config.help` or `--config.SECTION.help` requests, {} without one of them."""
    for word in words:
        match = re.fullmatch(r"--config\.(?:([\w.]+)\.)?help", word)
        if match is None:
            continue
        for verb in words:
            parser = parser.nested().get(verb, parser)
        if "config" not in parser.dotted:
            raise UserError(
                f"{word}: `{parser.prog}` takes no config", fix="efficient-vlm train --config.help"
            )
        values = dict(each.split("=", 1) for each in words if "=" in each)
        values |= dict(zip(words, words[1:]))
        given = {name: values.get(f"--{name}") for name in ("config", "preset")}
        return {"section": match[1], **given}
    return {}


def _hush_libtpu() -> None:
    """Prevents the warnings of libtpu on a host without a TPU (the tests install it).

    JAX loads libtpu wherever it is installed; with these variables set it looks for no metadata
    server, finds no chip and stays silent.
    """
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev").glob("vfio/[0-9]*")):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def main() -> int:
    """Console entry point. Exit codes: 0, 2 for a user's mistake, 130 or 143 for a signal."""
    if "_ARGCOMPLETE" in os.environ:  # A shell asks what could come next.
        import argcomplete

        argcomplete.autocomplete(make_parser())
    _hush_libtpu()
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone: `efficient-vlm ... | head`.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
