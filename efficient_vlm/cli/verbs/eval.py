"""`efficient-vlm eval`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "eval",
        "evaluate the newest checkpoint of a run",
        run,
        examples=(
            "eval --workdir=runs/quickstart --compressor=average_pool --budget=16,4 --images=64",
            "eval --workdir=runs/quickstart --compressor=visionzip "
            "--compressor.attention=column_mean --budget=16 --images=64",
        ),
        dotted=("compressor",),
    )
    arguments.add_workdir(parser)
    arguments.add_methods(
        parser, "one method instead of the config's (those of eval.methods)", several=False
    )
    parser.add_argument("--budget", metavar="N,N", help="visual tokens, with --compressor")
    parser.add_argument(
        "--images", type=int, metavar="N", help="test images (default: the config's, 0 for all)"
    )
    parser.add_argument(
        "--control",
        choices=("blank", "shuffled"),
        help="a control for chance level: blank images, or answers of other images",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS:N,...",
        help="what devices share: fsdp:4,tensor:2 (default: as the run)",
    )
    arguments.add_imports(parser)
    arguments.add_distributed(parser)
    arguments.add_json(parser, "print results as JSON")


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.evaluate import evaluate

    return evaluate(
        args.workdir,
        imports=args.imports,
        method=args.compressor,
        options=given.compressor,
        budgets=args.budget,
        images=args.images,
        control=args.control,
        mesh=args.mesh,
        distributed=args.distributed,
        as_json=args.json,
    )
