"""`efficient-vlm eval`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given
from efficient_vlm.errors import UserError


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "eval",
        "evaluate the newest checkpoint of a run, or a published model on a benchmark from a file",
        run,
        examples=(
            "eval --workdir=runs/quickstart --compressor=average_pool --budget=16,4 --images=64",
            "eval --workdir=runs/quickstart --compressor=visionzip "
            "--compressor.attention=column_mean --budget=16 --images=64",
            "eval tests/samples/smolvlm --benchmark=tests/samples/llava/shapes.jsonl --metric=anls "
            "--compressor=divprune,downsample --budget=1 --limit=8 --max-new-tokens=4",
        ),
        dotted=("compressor", "pictures"),
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a published model, with --benchmark"
    )
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run")
    arguments.add_methods(
        parser,
        "one method instead of the config's (those of eval.methods); with --benchmark one or "
        "several with commas",
        several=False,
    )
    parser.add_argument(
        "--budget", metavar="N,N", help="visual tokens, with --compressor or --benchmark"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="test images (default: the config's, 0 for all)"
    )
    parser.add_argument(
        "--control",
        choices=("blank", "shuffled"),
        help="a control for chance level: blank images, or answers of other images (of runs)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS:N,...",
        help="what devices share: fsdp:4,tensor:2 (default: as the run)",
    )
    _add_benchmark(parser.add_argument_group("benchmarks from files"))
    arguments.add_imports(parser)
    arguments.add_distributed(parser)
    arguments.add_json(parser, "print results as JSON")


def _add_benchmark(group: Any) -> None:
    group.add_argument(
        "--benchmark",
        metavar="FILE",
        help="questions and references: .jsonl, .json, .csv, .tsv or .parquet (docs/metrics.md)",
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="one of `efficient-vlm metrics`; for --workdir of a fine-tuned run as well",
    )
    group.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="FIELD=NAME,...",
        help="columns that are not found by their names: question=query,references=label",
    )
    group.add_argument(
        "--image-folder", metavar="DIR", help="of pictures named by paths (default: the file's)"
    )
    group.add_argument("--question", metavar="TEXT", help="of all rows, for files of captions")
    group.add_argument(
        "--suffix", default="", metavar="TEXT", help="behind every question, on a line of its own"
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="the most tokens of an answer (default: 32)",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)"
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of weights and activations (default: float32)",
    )
    group.add_argument("--out", metavar="DIR", help="for results.json, predictions and report.html")


# Options that only one of the two kinds of evaluation takes, with what they are without a value.
_OF_RUNS = {"workdir": None, "images": None, "mesh": None, "distributed": None}
_OF_FILES = {"model": None, "columns": [], "image_folder": None, "question": None,
             "suffix": "", "limit": None, "out": None}  # fmt: skip


def run(args: argparse.Namespace, given: Given) -> int:
    if args.benchmark is None:
        return _run_workdir(args, given)
    from efficient_vlm.cli.evaluate_file import evaluate_on_file

    _refuse(args, _OF_RUNS, "of runs; --benchmark evaluates MODEL, without it")
    if args.model is None:
        raise UserError(
            "eval --benchmark: no model",
            fix=f"efficient-vlm eval MODEL_FOLDER --benchmark={args.benchmark} --metric=NAME",
        )
    if args.control == "shuffled":
        raise UserError("--control=shuffled: of runs", allowed="blank, with --benchmark")
    return evaluate_on_file(
        args.model,
        benchmark=args.benchmark,
        metric=args.metric,
        imports=args.imports,
        method=args.compressor,
        options=given.compressor,
        budgets=args.budget,
        columns=args.columns,
        image_folder=args.image_folder,
        question=args.question,
        suffix=args.suffix,
        limit=args.limit,
        control=args.control,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        dtype=args.dtype,
        pictures=given.pictures,
        out=args.out,
        as_json=args.json,
    )


def _run_workdir(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.evaluate import evaluate

    _refuse(args, _OF_FILES, "goes with --benchmark=FILE; a run is evaluated by --workdir=DIR")
    if given.pictures:
        raise UserError(f"--pictures.{given.pictures[0]}: goes with --benchmark=FILE")
    if args.workdir is None:
        raise UserError(
            "eval: neither --workdir nor --benchmark is given",
            fix="--workdir=DIR of a run, or MODEL --benchmark=FILE --metric=NAME",
        )
    return evaluate(
        args.workdir,
        imports=args.imports,
        method=args.compressor,
        options=given.compressor,
        budgets=args.budget,
        images=args.images,
        control=args.control,
        metric=args.metric,
        mesh=args.mesh,
        distributed=args.distributed,
        as_json=args.json,
    )


def _refuse(args: argparse.Namespace, names: dict[str, Any], why: str) -> None:
    """Raises UserError for an option of the other kind of evaluation."""
    for name, nothing in names.items():
        if getattr(args, name) != nothing:
            word = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise UserError(f"{word}: {why}", fix="see efficient-vlm eval --help")
