"""`efficient-vlm compress`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "compress",
        "draw what a method keeps, merges and drops of a picture",
        run,
        examples=(
            "compress tests/samples/llava/00.jpg --compressor=divprune --compressor.budget=64 "
            "--out=runs/map.png",
            "compress tests/samples/llava/00.jpg --compressor=all --compressor.budget=16 "
            "--workdir=runs/quickstart --out=runs/all.png",
        ),
        dotted=("compressor",),
    )
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, GIF or BMP file")
    arguments.add_methods(parser, "method, several with commas, or all")
    parser.add_argument(
        "--out", default="map.png", metavar="FILE.png", help="picture to write (default: map.png)"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="run whose model sees the picture (default: none, statistics of pixels)",
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="for methods that read text, with --workdir"
    )
    parser.add_argument(
        "--grid",
        metavar="N",
        help="patches in a row, or ROWSxCOLUMNS, without a run (default: 24)",
    )
    arguments.add_imports(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.compress import compress

    arguments.import_methods(args)
    return compress(
        args.image,
        args.compressor or (),
        given.compressor,
        out=args.out,
        workdir=args.workdir,
        question=args.question,
        grid=args.grid,
        as_json=args.json,
    )
