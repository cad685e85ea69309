"""The verbs that only print: methods, metrics, presets, doctor."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add_methods(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "methods",
        "list the methods that make visual tokens fewer, or the options of one",
        run_methods,
        examples=("methods", "methods fastv"),
    )
    action = parser.add_argument(
        "name", nargs="?", metavar="NAME", help="method whose options to list"
    )
    action.completer = lambda **_: arguments.method_names()
    arguments.add_imports(parser)
    arguments.add_json(parser)


def add_metrics(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "metrics",
        "list the metrics for benchmarks from files, or what one does and needs",
        run_metrics,
        examples=("metrics", "metrics relaxed_accuracy"),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="metric to describe")
    arguments.add_json(parser)


def add_presets(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "presets",
        "list published models: parameters, visual tokens",
        run_presets,
        examples=("presets",),
    )
    arguments.add_json(parser)


def add_doctor(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "doctor",
        "say which verbs this machine can run, and what to type for the others; exit code 0 or 1",
        run_doctor,
        examples=("doctor", "doctor audit kernels"),
    )
    parser.add_argument(
        "verbs",
        nargs="*",
        metavar="VERB",
        help="one verb, with what its parts need (default: all verbs)",
    )
    arguments.add_json(parser)


def run_methods(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.list_methods import list_methods

    del given
    arguments.import_methods(args)
    return list_methods(args.name, as_json=args.json)


def run_metrics(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.list_metrics import list_metrics

    del given
    return list_metrics(args.name, as_json=args.json)


def run_presets(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.presets import presets_command

    del given
    return presets_command(as_json=args.json)


def run_doctor(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli import doctor

    del given
    return doctor.main(" ".join(args.verbs) or None, as_json=args.json)
