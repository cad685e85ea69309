"""`efficient-vlm import` and `efficient-vlm export`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    _add_import(verbs)
    _add_export(verbs)


def _add_import(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "import",
        "turn a Hugging Face checkpoint into one of ours",
        run_import,
        examples=("import tests/golden/llava runs/llava --verify=tests/golden/llava/io.npz",),
    )
    parser.add_argument(
        "source",
        metavar="HF_DIR",
        help="folder with config.json and safetensors, or org/name on a hub",
    )
    arguments.add_revision(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--verify",
        metavar="IO.npz",
        help="compare with the reference's results; 1 if they differ",
    )
    parser.add_argument("--sha256", metavar="FILE", help="digests, as sha256sum prints them")


def _add_export(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "export",
        "write a fine-tuned run, or an imported model, in the hub's layout",
        run_export,
        examples=("export runs/llava runs/llava_hf", "export runs/ft adapter --format=peft"),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a run that started from a published model, what import wrote, or a published model",
    )
    arguments.add_revision(parser)
    parser.add_argument("out", metavar="HF_DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as imported)",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: the whole model, adapters merged; peft: the adapters alone (default: hf)",
    )


def run_import(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.published import import_checkpoint

    del given
    given = dict(revision=args.revision, verify_with=args.verify, sha256=args.sha256)
    return import_checkpoint(args.source, args.out, **given)


def run_export(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.published import export_checkpoint

    del given
    given = dict(revision=args.revision, dtype=args.dtype, form=args.format)
    return export_checkpoint(args.checkpoint, args.out, **given)
