"""`efficient-vlm audit`, and the audits below it."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given
from efficient_vlm.cli.verbs import audit_aot, audit_kernels, audit_sharding, subject_options


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "audit",
        "tokens, FLOPs and KV bytes of every layer, without weights, in seconds",
        run,
        examples=(
            "audit --preset=llava-1.5-7b --compressor=fastv --compressor.layer=2",
            "audit --preset=llava-1.5-7b --compressor=fastv,divprune --match=mean_processed:128",
            "audit --preset=qwen2-vl-2b --pictures.max_pixels=200704",
        ),
        dotted=subject_options.DOTTED,
    )
    subject_options.add_subject(parser, new=1)
    arguments.add_json(parser)
    below = arguments.add_verbs(parser, "other audits", dest="what", metavar="kernels|sharding|aot")
    for each in (audit_kernels, audit_sharding, audit_aot):
        each.add(below)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.audit import audit

    subject = subject_options.read_subject(args, given)
    chosen, target = subject_options.read_methods(args, given, subject)
    return audit(subject, chosen, target, as_json=args.json)
