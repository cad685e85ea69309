"""What the audits of a model take: which model, with which methods, how long its texts are."""

import argparse
from typing import TYPE_CHECKING

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given, Parser

if TYPE_CHECKING:
    from efficient_vlm.cli.methods import Chosen
    from efficient_vlm.cli.subject import Subject
    from efficient_vlm.costs.match import Target

DOTTED = ("config", "compressor", "pictures")
# What --match takes, the keys of `costs.match.MEASURES`.
MEASURES = ("mean_processed", "mean_written", "entering", "flops", "kv_bytes")
TEXT_DEFAULT = "of the prompt (default: 64; of a config, the longest question)"


def add_subject(parser: Parser, *, new: int) -> None:
    """The options of what is audited.

    Args:
      parser: of an audit.
      new: default of --new.
    """
    action = parser.add_argument(
        "--preset", metavar="NAME", help="a published model, such as llava-1.5-7b; see presets"
    )
    action.completer = lambda **_: arguments.preset_names()
    arguments.add_config(parser, required=False)
    arguments.add_methods(
        parser, "methods, see `efficient-vlm methods` (default: the config's own, or none)"
    )
    action = parser.add_argument(
        "--match",
        metavar="MEASURE:VALUE",
        help="set each method to equal cost: mean_processed, mean_written or entering:TOKENS; "
        "flops or kv_bytes:SHARE of the model without it, up to 1, or a number",
    )
    action.completer = lambda **_: [f"{measure}:" for measure in MEASURES]
    parser.add_argument("--text", type=int, metavar="N", help=f"text tokens {TEXT_DEFAULT}")
    parser.add_argument(
        "--new", type=int, default=new, metavar="N", help=f"generated tokens (default: {new})"
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images (tiles, crops) of a picture (default: those of --picture; of a config, "
        "data.max_images)",
    )
    parser.add_argument(
        "--picture",
        metavar="HxW",
        help="height and width of the picture, in pixels, that a preset sees (default: 768x1024)",
    )
    arguments.add_imports(parser)


def read_subject(args: argparse.Namespace, given: Given) -> "Subject":
    """What is audited, after --import."""
    from efficient_vlm.cli.subject import read_subject

    arguments.import_methods(args)
    return read_subject(
        preset=args.preset,
        config=args.config,
        overrides=given.config,
        text=args.text,
        new=args.new,
        images=args.images,
        picture=args.picture,
        pictures=given.pictures,
    )


def read_methods(
    args: argparse.Namespace, given: Given, subject: "Subject"
) -> tuple[list["Chosen"], "Target | None"]:
    """The methods that are audited, and what they are matched to."""
    from efficient_vlm.cli.methods import read_methods
    from efficient_vlm.costs.match import parse_target

    target = parse_target(args.match) if args.match else None
    return read_methods(subject, args.compressor, given.compressor), target
