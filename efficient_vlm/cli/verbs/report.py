"""`efficient-vlm report`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "report",
        "write report.html from what a run has left",
        run,
        examples=("report --workdir=runs/quickstart",),
    )
    arguments.add_workdir(parser)
    arguments.add_imports(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.report.report import write_report

    del given
    arguments.import_methods(args)
    print(f"Report: {write_report(args.workdir)}")
    return 0
