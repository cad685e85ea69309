"""`efficient-vlm data build` and `efficient-vlm data inspect`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given
from efficient_vlm.errors import UserError


def add(verbs: Any) -> None:
    parser = arguments.add_verb(verbs, "data", "build or look at a data set", None)
    below = arguments.add_verbs(
        parser, "actions", dest="action", metavar="build|inspect", required=True
    )
    _add_build(below)
    _add_inspect(below)


def _add_build(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "build",
        "build the data set of a config",
        run_build,
        examples=("data build --config=configs/spatial.py:smoke",),
        dotted=("config",),
    )
    arguments.add_config(parser)


def _add_inspect(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "inspect",
        "write a contact sheet of images, questions and answers",
        run_inspect,
        examples=(
            "data inspect --config=configs/quickstart.py:smoke --out=runs/contact_sheet.png",
        ),
        dotted=("config",),
    )
    arguments.add_config(parser)
    parser.add_argument(
        "--out",
        default="contact_sheet.png",
        metavar="FILE.png",
        help="picture to write (default: contact_sheet.png)",
    )
    parser.add_argument(
        "--split", default="train", choices=("train", "test"), help="(default: train)"
    )
    parser.add_argument(
        "--count", type=int, default=12, metavar="N", help="images to show (default: 12)"
    )


def run_build(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli import data

    data.build(data.read_data(args.config, given.config))
    return 0


def run_inspect(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli import data

    if args.count < 1:
        raise UserError(f"--count: {args.count}", allowed="1 or more")
    config = data.read_data(args.config, given.config)
    data.inspect(config, split=args.split, output=args.out, images=args.count)
    return 0
