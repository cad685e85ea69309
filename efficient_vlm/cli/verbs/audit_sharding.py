"""`efficient-vlm audit sharding`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given
from efficient_vlm.cli.verbs import subject_options

MESH = "fsdp:8"


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "sharding",
        "where each parameter, activation and cache lies on a mesh of devices",
        run,
        examples=(
            "audit sharding --preset=molmo-7b-d --mesh=fsdp:16,tensor:4",
            "audit sharding --config=configs/quickstart.py --mesh=data:2,expert:4",
        ),
        dotted=subject_options.DOTTED,
    )
    parser.add_argument(
        "--mesh",
        default=MESH,
        metavar="AXIS:N,...",
        help=f"devices along the axes data, fsdp, expert, sequence, tensor (default: {MESH})",
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        help="pictures on all devices together (default: one for each part of the rows)",
    )
    subject_options.add_subject(parser, new=1)
    arguments.add_json(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.audit_sharding import audit_sharding

    subject = subject_options.read_subject(args, given)
    chosen, target = subject_options.read_methods(args, given, subject)
    return audit_sharding(
        subject, chosen, target, mesh=args.mesh, batch=args.batch, as_json=args.json
    )
