"""`efficient-vlm audit kernels`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given

TOPOLOGY = "v5e:2x2"


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "kernels",
        "compile every kernel for an accelerator that need not be there",
        run,
        examples=(
            "audit kernels --topology=v5e:2x2 --quick",
            "audit kernels --topology=h100 --quick",
        ),
    )
    parser.add_argument(
        "--topology",
        default=TOPOLOGY,
        metavar="NAME",
        help="v5e:2x2, v5e-4, v6e-4, v5p-8, v4-8, tpu7x-8, ...; all: four of them; or a GPU: a100, "
        f"h100, h200, b200, b300 (default: {TOPOLOGY})",
    )
    parser.add_argument("--quick", action="store_true", help="one size of each kernel only")
    arguments.add_quiet(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.audit_kernels import audit_kernels

    del given
    return audit_kernels(args.topology, quick=args.quick, quiet=args.quiet, as_json=args.json)
