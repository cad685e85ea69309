"""`efficient-vlm generate`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "generate",
        "ask a published or an imported model about pictures",
        run,
        examples=(
            'generate tests/samples/smolvlm "What is on the table?" '
            "--image=tests/samples/llava/00.jpg --max-new-tokens=8",
            'generate tests/samples/smolvlm "What is it?" --image=tests/samples/llava/00.jpg '
            "--compressor=divprune --compressor.budget=2 --pictures.split=false "
            "--max-new-tokens=8",
        ),
        dotted=("compressor", "pictures"),
    )
    parser.add_argument("model", metavar="MODEL", help="folder with config.json and weights")
    parser.add_argument("question", metavar="QUESTION", help="what to ask")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="a picture; may be repeated"
    )
    arguments.add_methods(parser, "method, such as visionzip (default: all tokens)", several=False)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="the most tokens of the answer (default: 64)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="(default: that of generation_config.json)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of weights and activations (default: float32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of random compressors (default: 0)"
    )
    parser.add_argument(
        "--points", metavar="FILE.png", help="draw the points of the answer (Molmo)"
    )
    arguments.add_imports(parser)
    arguments.add_json(parser, "print answer, times and tokens as JSON")


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.published import generate

    arguments.import_methods(args)
    return generate(
        args.model,
        args.question,
        args.image or (),
        method=args.compressor,
        options=given.compressor,
        pictures=given.pictures,
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        dtype=args.dtype,
        seed=args.seed,
        points=args.points,
        as_json=args.json,
    )
