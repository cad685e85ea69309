"""`efficient-vlm generate`."""

import argparse
from typing import Any

from efficient_vlm.cli import arguments
from efficient_vlm.cli.arguments import Given


def add(verbs: Any) -> None:
    parser = arguments.add_verb(
        verbs,
        "generate",
        "ask a published or an imported model about pictures",
        run,
        examples=(
            'generate tests/samples/smolvlm "What is on the table?" '
            "--image=tests/samples/llava/00.jpg --max-new-tokens=8",
            'generate tests/samples/smolvlm "What is it?" --image=tests/samples/llava/00.jpg '
            "--compressor=divprune --compressor.budget=2 --pictures.split=false "
            "--max-new-tokens=8",
            'generate tests/samples/smolvlm "What is it?" --temperature=0.7 --top-p=0.9 --seed=1 '
            "--stop=. --max-new-tokens=8",
        ),
        dotted=("compressor", "pictures"),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder with config.json and weights, or org/name on a hub"
    )
    arguments.add_revision(parser)
    parser.add_argument("question", metavar="QUESTION", help="what to ask")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="a picture; may be repeated"
    )
    arguments.add_methods(parser, "method, such as visionzip (default: all tokens)", several=False)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="the most tokens of the answer (default: 64)",
    )
    parser.add_argument("--adapter", metavar="DIR", help="folder with an adapter of PEFT's")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of weights and activations (default: float32)",
    )
    parser.add_argument(
        "--points", metavar="FILE.png", help="draw the points of the answer (Molmo)"
    )
    _add_sampling(parser.add_argument_group("how tokens are drawn, and where the answer ends"))
    _add_cache(parser.add_argument_group("how keys and values are stored"))
    arguments.add_imports(parser)
    arguments.add_json(parser, "print answer, times and tokens as JSON")


# Fields of `SamplingOptions` that are one number: type, and what the help says.
_NUMBERS = {
    "temperature": (float, "0 takes the most likely token, 1 draws as trained (default: 0)"),
    "top_k": (int, "draw from the N most likely tokens; 0: from all (default: 0)"),
    "top_p": (float, "draw from the most likely tokens that add up to probability X (default: 1)"),
    "min_p": (float, "draw from tokens at least X times as likely as the likeliest (default: 0)"),
    "repetition_penalty": (
        float,
        "above 1, tokens of prompt and answer are repeated less "
        "(default: that of generation_config.json)",
    ),
    "frequency_penalty": (float, "taken off for each time a token was generated (default: 0)"),
    "presence_penalty": (float, "taken off if a token was generated (default: 0)"),
    "seed": (
        int,
        "of drawn answers (default: another one each time) and of random compressors (default: 0)",
    ),
    "logprobs": (int, "log-probabilities of the tokens, with N alternatives to each"),
}


def _add_sampling(group: Any) -> None:
    group.add_argument(
        "--do-sample",
        action="store_true",
        default=None,
        help="draw as generation_config.json says, unless given here",
    )
    for name, (kind, text) in _NUMBERS.items():
        option, shown = f"--{name.replace('_', '-')}", "N" if kind is int else "X"
        group.add_argument(option, type=kind, metavar=shown, help=text)
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=X",
        help="added to the logit of a token, -100 all but bans it; may be repeated",
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends the answer, without being a part of it; may be repeated",
    )


def _add_cache(group: Any) -> None:
    group.add_argument(
        "--cache.kind",
        dest="kind",
        metavar="KIND",
        help="contiguous or paged (default: contiguous)",
    )
    group.add_argument(
        "--cache.page", dest="page", type=int, metavar="N", help="slots per page (default: 128)"
    )
    group.add_argument(
        "--cache.dtype", dest="dtype_kept", metavar="TYPE", help="int8 (default: the model's)"
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not ID=NUMBER") from None


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingOptions` that were given."""
    given = {name: getattr(args, name) for name in (*_NUMBERS, "stop")}
    given["logit_bias"] = None if args.logit_bias is None else dict(args.logit_bias)
    return {name: value for name, value in given.items() if value is not None}


def run(args: argparse.Namespace, given: Given) -> int:
    from efficient_vlm.cli.published import generate

    arguments.import_methods(args)
    cache = dict(kind=args.kind, page=args.page, dtype=args.dtype_kept)
    return generate(
        args.model,
        args.question,
        args.image or (),
        revision=args.revision,
        method=args.compressor,
        options=given.compressor,
        pictures=given.pictures,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        sampling=_sampling(args),
        cache={name: value for name, value in cache.items() if value is not None},
        dtype=args.dtype,
        adapter=args.adapter,
        points=args.points,
        as_json=args.json,
    )
