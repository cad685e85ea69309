"""The command line: `efficient-vlm VERB ...`. Nothing heavy is imported before a verb runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from efficient_vlm import __version__
from efficient_vlm.errors import UserError, closest, unknown

VERBS = (
    "train",
    "eval",
    "audit",
    "compress",
    "generate",
    "import",
    "export",
    "presets",
    "report",
    "data",
    "doctor",
)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, with the nearest name."""

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}", fix=f"see {self.prog} --help")


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="WHERE",
        help="join the other processes of a job: alone on Slurm, TPU pods and MPI; "
        "or ADDRESS:PORT,PROCESSES,NUMBER",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """How `generate` draws an answer, where the answer ends, and how the cache keeps it."""
    parser.add_argument(
        "--do-sample",
        action="store_true",
        default=None,
        help="draw as the model's generation_config.json says, but for what is given here",
    )
    numbers = {
        "temperature": "0 takes the likeliest token, 1 draws as trained (0)",
        "top-k": "draw from the N most likely tokens; 0 for all (0)",
        "top-p": "draw from the likeliest tokens that make up X together (1)",
        "min-p": "draw from tokens at least X times as likely as the likeliest (0)",
        "repetition-penalty": "above 1 repeats less (that of generation_config.json)",
        "frequency-penalty": "less for each time that a token was generated (0)",
        "presence-penalty": "less for tokens that were generated (0)",
    }
    for name, text in numbers.items():
        kind, shown = (int, "N") if name == "top-k" else (float, "X")
        parser.add_argument(f"--{name}", type=kind, metavar=shown, help=text)
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of drawn answers, each time another one unless given; of random compressors (0)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends the answer and is no part of it; may be repeated",
    )
    parser.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=X",
        help="added to a token's logit: -100 all but bans it; may be repeated",
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities, with N alternatives a token"
    )
    parser.add_argument(
        "--cache.kind", dest="cache_kind", metavar="KIND", help="contiguous or paged (contiguous)"
    )
    parser.add_argument(
        "--cache.page", dest="cache_page", type=int, metavar="N", help="slots of a page (128)"
    )
    parser.add_argument(
        "--cache.dtype", dest="cache_dtype", metavar="TYPE", help="int8 (the model's)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="efficient-vlm",
        description="Train, evaluate and audit token-efficient vision-language models.",
        epilog="Any config field is an option: --config.train.steps=500. "
        "Start: efficient-vlm train --config=configs/quickstart.py --workdir=runs/quickstart",
    )
    parser.add_argument("--version", action="version", version=f"efficient_vlm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str, *, config: bool = False, workdir: bool = False):
        sub = verbs.add_parser(name, help=text, description=text)
        if config:
            sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="config file")
        if workdir:
            sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
        return sub

    sub = verb(
        "train",
        "train a model, evaluate it, write a report; run it again to resume",
        config=True,
        workdir=True,
    )
    _add_distributed(sub)
    sub = verb("eval", "evaluate the newest checkpoint of a run", workdir=True)
    _add_distributed(sub)
    sub.add_argument(
        "--mesh", metavar="AXIS:N,...", help="what devices share: fsdp:4,tensor:2 (the run's)"
    )
    sub.add_argument(
        "--compressor",
        metavar="NAME",
        help="one method instead of the config's; --compressor.OPTION=VALUE sets its options",
    )
    sub.add_argument("--budget", metavar="N,N", help="visual tokens, with --compressor")
    sub.add_argument("--images", type=int, metavar="N", help="test images")
    sub.add_argument("--control", choices=("blank", "shuffled"), help="a control for chance level")
    sub.add_argument("--json", action="store_true", help="print results as JSON")
    sub = verb("audit", "tokens, FLOPs and KV bytes of every layer, without weights, in seconds")
    sub.add_argument(
        "what",
        nargs="?",
        choices=("kernels", "sharding", "aot"),
        help="kernels: compile every kernel for a TPU that need not be there; "
        "sharding: where each parameter lies on a mesh of devices; "
        "aot: compile a step for a pod that need not be there, and say whether it fits",
    )
    sub.add_argument(
        "--topology",
        metavar="NAME",
        help="of kernels and aot: v5e:16x16, v6e:2x2, v5p:4x4x4; kernels also all, h100; "
        "aot also h100:8",
    )
    sub.add_argument("--quick", action="store_true", help="kernels at one size only")
    sub.add_argument("--mesh", metavar="AXIS:N,...", help="of sharding, aot: fsdp:64,tensor:4")
    sub.add_argument("--task", metavar="TASK", help="of aot: train, prefill or decode")
    sub.add_argument(
        "--batch", metavar="N", help="of sharding, aot: pictures on all devices together"
    )
    sub.add_argument("--remat", metavar="NAME", help="of aot: none, dots or full (full)")
    sub.add_argument("--search", action="store_true", help="of aot: try meshes, batches, remat")
    sub.add_argument("--preset", metavar="NAME", help="a published model, such as llava-1.5-7b")
    sub.add_argument("--config", metavar="FILE.py[:ARG]", help="config file, instead of --preset")
    sub.add_argument(
        "--compressor",
        action="append",
        metavar="NAME[,NAME]",
        help="methods; --compressor.OPTION=VALUE for all that have it, "
        "--compressor.NAME.OPTION=VALUE for one",
    )
    sub.add_argument("--text", type=int, metavar="N", help="text tokens of the prompt")
    sub.add_argument("--new", type=int, metavar="N", help="generated tokens")
    sub.add_argument("--images", type=int, metavar="N", help="images (tiles, crops) of a picture")
    sub.add_argument(
        "--match",
        metavar="MEASURE:VALUE",
        help="set each method to equal mean_processed:TOKENS or flops:SHARE",
    )
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub = verb("compress", "draw what a method keeps, merges and drops of a picture")
    sub.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, GIF or BMP file")
    sub.add_argument(
        "--compressor",
        action="append",
        metavar="NAME",
        help="method, or all; --compressor.OPTION=VALUE sets its options",
    )
    sub.add_argument("--out", default="map.png", metavar="FILE.png", help="picture to write")
    sub.add_argument("--workdir", metavar="DIR", help="run whose model sees the picture")
    sub.add_argument("--question", metavar="TEXT", help="what methods that read text are asked")
    sub.add_argument("--grid", metavar="N", help="patches in a row, without a run (24)")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub = verb("generate", "ask a published or an imported model about pictures")
    sub.add_argument("model", metavar="MODEL", help="folder with config.json and weights")
    sub.add_argument("question", metavar="QUESTION", help="what to ask")
    sub.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture; may be repeated; --pictures.OPTION=VALUE sets max_pixels, split, "
        "max_tiles or max_crops, where the model has it",
    )
    sub.add_argument(
        "--compressor",
        metavar="NAME",
        help="method, such as visionzip; --compressor.OPTION=VALUE sets its options",
    )
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(64)")
    _add_sampling(sub)
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    sub.add_argument("--points", metavar="FILE.png", help="draw the points of the answer (Molmo)")
    sub.add_argument("--json", action="store_true", help="print answer, times and tokens as JSON")
    sub = verb("import", "turn a Hugging Face checkpoint into one of ours")
    sub.add_argument("source", metavar="HF_DIR", help="folder with config.json and safetensors")
    sub.add_argument("out", metavar="OUT", help="folder to write")
    sub.add_argument(
        "--verify", metavar="IO.npz", help="compare with what the reference gave; 1 if it differs"
    )
    sub.add_argument("--sha256", metavar="FILE", help="digests, as sha256sum prints them")
    sub = verb("export", "turn an imported model, fine-tuned or not, back into safetensors")
    sub.add_argument("checkpoint", metavar="CKPT", help="what import wrote")
    sub.add_argument("out", metavar="HF_DIR", help="folder to write")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as imported")
    sub = verb("presets", "list published models: parameters, visual tokens")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    verb("report", "write report.html from what a run has left", workdir=True)
    sub = verbs.add_parser("data", help="build or look at a data set")
    data = sub.add_subparsers(dest="action", metavar="build|inspect", parser_class=_Parser)
    data.required = True
    for action, text in (
        ("build", "build the data set of a config"),
        ("inspect", "write a contact sheet of images, questions and answers"),
    ):
        sub = data.add_parser(action, help=text, description=text)
        sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="config file")
        if action == "inspect":
            sub.add_argument("--out", default="contact_sheet.png", metavar="FILE.png")
            sub.add_argument("--split", default="train", choices=("train", "test"))
            sub.add_argument("--count", type=int, default=12, metavar="N", help="images to show")
    sub = verb("doctor", "print versions, devices and disk, and whether they fit")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """`--compressor.layer 2` as one word, so that the value is not taken for a file's name."""
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        option = last.startswith(("--config.", "--compressor.", "--pictures.")) and "=" not in last
        if option and not word.startswith("--"):
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def _split_overrides(rest: Sequence[str]) -> tuple[list[str], ...]:
    """("section.field=value" of --config., "option=value" of --compressor. and of --pictures.)."""
    found: dict[str, list[str]] = {"--config.": [], "--compressor.": [], "--pictures.": []}
    known = ("--config", "--workdir", "--help", "--version")
    pending = None
    for word in rest:
        prefix = next((p for p in found if word.startswith(p)), None)
        if pending is not None:
            found[pending[0]].append(f"{pending[1]}={word}")
            pending = None
        elif prefix is not None:
            name = word.removeprefix(prefix)
            if "=" in name:
                found[prefix].append(name)
            else:
                pending = prefix, name
        else:
            guess = closest(word.split("=")[0], known)
            raise UserError(
                f"unknown option {word!r}",
                fix=f"did you mean {guess}?" if guess else "config fields are --config.FIELD=VALUE",
            )
    if pending is not None:
        option = "".join(pending)
        raise UserError(f"{option}: no value", fix=f"write {option}=VALUE")
    return tuple(found.values())


def run(argv: Sequence[str]) -> int:
    """Runs one command; raises UserError for a user's mistake."""
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in VERBS:
        raise unknown("verb", argv[0], VERBS)
    args, rest = parser.parse_known_args(_joined(argv))
    overrides, options, pictures = _split_overrides(rest)
    if args.verb is None:
        raise UserError("no verb given", allowed=", ".join(VERBS), fix="see efficient-vlm --help")
    if overrides and "config" not in args:
        raise UserError(
            f"--config.{overrides[0]}: {args.verb} takes no config",
            fix=f"leave it out; the run's own config is used by {args.verb}",
        )
    if options and args.verb not in ("audit", "eval", "compress", "generate"):
        raise UserError(
            f"--compressor.{options[0]}: {args.verb} takes no options of a compressor",
            fix="config fields are --config.model.compressor.FIELD=VALUE",
        )
    if pictures and args.verb != "generate":
        raise UserError(f"--pictures.{pictures[0]}: {args.verb} takes no options of pictures")
    args.options = options
    if args.verb == "audit" and args.what == "kernels":
        from efficient_vlm.cli.audit_kernels import audit_kernels

        return audit_kernels(args)
    if args.verb == "audit":
        if args.quick:
            raise UserError("--quick: only `audit kernels` takes it")
        if args.what == "aot":
            from efficient_vlm.cli.audit_aot import audit_aot

            return audit_aot(args, overrides)
        for name in ("topology", "task", "remat", "search"):
            if getattr(args, name):
                raise UserError(f"--{name}: only `audit aot` takes it")
        if args.what == "sharding":
            from efficient_vlm.cli.audit_sharding import audit_sharding

            return audit_sharding(args, overrides)
        for name in ("mesh", "batch"):
            if getattr(args, name):
                raise UserError(f"--{name}: only `audit sharding` and `audit aot` take it")
        from efficient_vlm.cli import audit as command

        return command.audit(args, overrides)
    if args.verb in ("import", "export", "generate"):
        from efficient_vlm.cli import published

        if args.verb == "generate":
            return published.generate(args, options, pictures)
        return getattr(published, f"{args.verb}_checkpoint")(args)
    if args.verb == "presets":
        from efficient_vlm.cli.presets import presets_command

        return presets_command(as_json=args.json)
    if args.verb == "doctor":
        from efficient_vlm.cli import doctor

        return doctor.main(as_json=args.json)
    if args.verb == "report":
        from efficient_vlm.report.report import write_report

        print(f"Report: {write_report(args.workdir)}")
        return 0
    from efficient_vlm.cli import run as commands

    return getattr(commands, args.verb)(args, overrides)


def _hush_libtpu() -> None:
    """Where libtpu is installed (the tests need it) and no TPU is, JAX tries it and it complains.

    Told what it would be asked for, it finds no chip and says nothing.
    """
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev").glob("vfio/[0-9]*")):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def main() -> int:
    """Console entry point. Exit codes: 0, 2 for a user's mistake, 130 or 143 for a signal."""
    _hush_libtpu()
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone: `efficient-vlm ... | head`.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
