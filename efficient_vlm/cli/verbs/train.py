"""`efficient-vlm train`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "train",
        "train a model, evaluate it, write a report; run it again to resume",
        run,
        examples=(
            "train --config=configs/quickstart.py --workdir=runs/quickstart",
            "train --config=configs/quickstart.py:smoke --workdir=runs/dense "
            "--config.model.decoder.moe=None",
            "train --config=configs/finetune.py --config.model.pretrained=tests/samples/smolvlm "
            "--config.data.path=tests/samples/llava/my.json --workdir=runs/ft",
        ),
        dotted=("config",),
    )
    arguments.add_config(parser)
    arguments.add_workdir(parser)
    arguments.add_imports(parser)
    arguments.add_distributed(parser)


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.run import train

    return train(
        args.config,
        args.workdir,
        overrides=given.config,
        imports=args.imports,
        distributed=args.distributed,
    )
