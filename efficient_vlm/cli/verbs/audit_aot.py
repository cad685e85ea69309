"""`efficient-vlm audit aot`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given
from efficient_vlm.cli.verbs import subject_options

TASKS = ("train", "prefill", "decode")
REMAT = ("none", "dots", "full")
NEW = 64


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "aot",
        "compile a step for a pod that need not be there: does it fit, and what bounds its time",
        run,
        examples=(
            "audit aot --preset=smolvlm-256m --task=decode --topology=v5e-8 --batch=8",
            "audit aot --preset=smolvlm-256m --task=prefill --topology=v5e-4 --batch=4 "
            "--compressor=none,divprune,fastv --match=mean_processed:208",
        ),
        dotted=subject_options.DOTTED,
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="the training step; the stages up to the first token; or one token of decoding",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="Cloud TPU's accelerator type or a shape: v5e-8 or v5e:2x4, v5p-128 or v5p:4x4x4, "
        "v6e-16, v4-8, tpu7x-8; or GPUs of one host: a100:8, h100:8, h200:8, b200:8, b300:8",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS:N,...",
        help="devices along the axes data, fsdp, expert, sequence, tensor (default: all along "
        "fsdp in training, else along data)",
    )
    parser.add_argument(
        "--batch",
        metavar="N[,N]",
        help="pictures on all devices together (default: one a device); several with --search",
    )
    parser.add_argument(
        "--remat",
        choices=REMAT,
        help="what a training step computes again: nothing, all but products, all (default: full)",
    )
    parser.add_argument(
        "--adapt",
        metavar="NAME",
        help="in training: lora, qlora, dora, bias, ...: what is frozen has no moments "
        "(default: all parameters are trained)",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of adapters (default: 16)")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, the batches, and in training remat"
    )
    subject_options.add_subject(parser, new=NEW)
    arguments.add_quiet(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli import audit_aot

    wanted = audit_aot.read_plan(
        task=args.task,
        topology=args.topology,
        mesh=args.mesh,
        batch=args.batch,
        remat=args.remat,
        adapt=args.adapt,
        rank=args.rank,
        search=args.search,
    )
    subject = subject_options.read_subject(args, given)
    chosen, target = subject_options.read_methods(args, given, subject)
    return audit_aot.audit_aot(subject, chosen, target, wanted, quiet=args.quiet, as_json=args.json)
