"""The verbs import, export and generate of the command line."""

import argparse
import dataclasses
import json
import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_vlm.cli import verify
from efficient_vlm.cli.compress import read_methods
from efficient_vlm.errors import UserError, first_line
from efficient_vlm.families.architecture import build_model, read_config
from efficient_vlm.families.imported import import_model, read_carried
from efficient_vlm.families.table import family_of
from efficient_vlm.inference import answers, pretrained
from efficient_vlm.inference.options import SamplingOptions
from efficient_vlm.nn.kv_cache import CacheOptions
from efficient_vlm.nn.stack import unstack


def import_checkpoint(args: argparse.Namespace) -> int:
    """`efficient-vlm import HF_DIR OUT [--verify=io.npz]`: 1 if the comparison fails."""
    io = None if args.verify is None else read_npz(args.verify)
    sha256 = None if args.sha256 is None else read_sha256(args.sha256)
    model, params = import_model(args.source, args.out, sha256=sha256)
    config = read_config(args.out)
    family = family_of(config)
    used = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    carried = sum(value.size for value in read_carried(Path(args.out)).values())
    report: dict[str, Any] = {"family": family.name, "params": used + carried}
    if carried:
        report["params_unused"] = carried
    if io is None:
        print(json.dumps(report))
        return 0
    whole = jax.tree.map(lambda p: np.asarray(p, np.float32), unstack(params))
    found = verify.verify(family, config, build_model(config), whole, io)
    ok = found.pop("ok")
    # JSON has no NaN; an error that is no number is null.
    numbers = {k: None if v is None or not np.isfinite(v) else v for k, v in found.items()}
    print(json.dumps(report | numbers))
    if not ok:
        print(
            f"error: {args.out} is imported, but differs from {args.verify} "
            f"(allowed: {verify.TOLERANCE} of the largest logit, identical tokens)",
            file=sys.stderr,
        )
    return 0 if ok else 1


def export_checkpoint(args: argparse.Namespace) -> int:
    """`efficient-vlm export CKPT HF_DIR`: the way back."""
    folder = Path(args.checkpoint)
    if (folder / "checkpoints").is_dir() and not (folder / "dtypes.json").is_file():
        raise UserError(
            f"{folder}: a run of efficient-vlm train, whose model has no published layout",
            allowed="what efficient-vlm import wrote, fine-tuned or not",
        )
    vlm = pretrained.from_pretrained(args.checkpoint, param_dtype=args.dtype or "stored")
    for path in vlm.save(args.out):
        print(path)
    return 0


def generate(
    args: argparse.Namespace, options: Sequence[str], picture_options: Sequence[str]
) -> int:
    """`efficient-vlm generate MODEL QUESTION --image=FILE`."""
    from efficient_vlm.cli.run import enable_compilation_cache
    from efficient_vlm.processing import pointing

    enable_compilation_cache()
    _check(args)
    if options and args.compressor is None:
        raise UserError(
            f"--compressor.{options[0]}: no method", fix="add --compressor=NAME, such as visionzip"
        )
    compressor = None
    if args.compressor is not None:
        compressor, *more = read_methods([args.compressor], options)
        if more:
            raise UserError(f"--compressor={args.compressor}: one method at a time")
    pictures = dict(option.split("=", 1) for option in picture_options)
    pictures = {name: read_literal(f"--pictures.{name}", value) for name, value in pictures.items()}
    vlm = pretrained.from_pretrained(
        args.model, compressor=compressor, dtype=args.dtype, **pictures
    )
    stream = None
    if not args.json:

        def stream(text: str) -> None:
            print(text, end="", flush=True)

    asked, options = (args.do_sample, _sampling(args)), dict(cache=_cache(args))
    out = vlm.run(
        [args.question],
        [args.image or []],
        max_new_tokens=args.max_new_tokens,
        stream=stream,
        rng=jax.random.key(args.seed or 0),
        do_sample=asked[0],
        **asked[1],
        **options,
    )
    (answer,) = answers.answers(vlm.tokenizer, out, vlm.sampling_options(1, *asked))
    if args.json:
        print(json.dumps(_report(vlm, out, answer)))
    else:
        print()
        for token in answer.logprobs or ():
            print(_line(token))
    if args.points is not None:
        _draw_points(vlm, pointing, answer.text, args)
    return 0


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingOptions` that were given."""
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    given = {name: getattr(args, name, None) for name in names}
    if args.logit_bias:
        given["logit_bias"] = dict(map(read_bias, args.logit_bias))
    return {name: value for name, value in given.items() if value is not None}


def _cache(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `CacheOptions` that were given."""
    given = {name: getattr(args, f"cache_{name}") for name in ("kind", "page", "dtype")}
    return {name: value for name, value in given.items() if value is not None}


def read_bias(text: str) -> tuple[int, float]:
    """ID=NUMBER of the command line."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(
            f"--logit-bias={text!r:.40}", allowed="ID=NUMBER, such as 17=-100; may be repeated"
        ) from None


def _line(token: answers.TokenLogprob) -> str:
    """A token, its log-probability and the alternatives to it."""
    top = "  ".join(f"{text!r} {value:.3f}" for _, text, value in token.top)
    return f"{token.logprob:9.3f}  {token.text!r:<16} {top}".rstrip()


def _check(args: argparse.Namespace) -> None:
    """What would fail only behind the answer."""
    given = _sampling(args)
    for name, value in given.items():
        try:
            SamplingOptions(**{name: value})
        except UserError as error:
            error.args = (f"--{name.replace('_', '-')}{str(error)[len(name) :]}",)
            raise
    CacheOptions.of(_cache(args))
    if args.points is None:
        return
    if len(args.image or []) != 1:
        raise UserError("--points: needs one picture", fix="give --image=FILE once")
    from PIL import Image

    path, known = Path(args.points), Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--points={path}", allowed=".png, .jpg and what else Pillow writes")
    if not path.parent.is_dir():
        raise UserError(f"--points={path}: no directory {path.parent}", fix="make it first")


def read_literal(option: str, text: str) -> int | bool:
    """A whole number or a truth value of the command line."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise UserError(f"{option}: {text!r}", allowed="a whole number, true or false")


def _report(vlm: pretrained.Pretrained, out: Any, answer: answers.Answer) -> dict[str, Any]:
    decode = out.seconds["decode"]
    seconds = {stage: out.seconds[stage] for stage in ("encode", "compress", "prefill")}
    report = {
        "answer": answer.text,
        "finish": answer.finish,
        "family": vlm.family.name,
        "compressor": dict(vlm.model.compressor),
        "visual_tokens": int(np.asarray(out.visual.mask).sum()),
        "kv_bytes": out.kv_bytes,
        "seconds": seconds | {"decode_step": float(np.median(decode)) if decode else None},
    }
    if answer.logprobs is not None:
        report["logprobs"] = [dataclasses.asdict(token) for token in answer.logprobs]
    return report


def _draw_points(vlm: pretrained.Pretrained, pointing: Any, answer: str, args: Any) -> None:
    from efficient_vlm.processing.pictures.base import load_picture

    found = pointing.parse(answer)
    if not found.points:
        print(f"no points in the answer; {args.points} is not written", file=sys.stderr)
        return
    drawn = pointing.draw(found.points, load_picture(args.image[0]))
    try:
        drawn.save(args.points)
    except (OSError, ValueError) as error:
        raise UserError(f"--points={args.points}: {first_line(error)}") from None
    print(f"{len(found.points)} points: {args.points}", file=sys.stderr)


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Arrays of an npz file; UserError if it is none, or holds Python objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--verify: {path} cannot be read ({error})",
            allowed="an npz file as tests/parity/make_fixtures.py writes it",
        ) from None


def read_sha256(path: str) -> dict[str, str]:
    """File name -> digest, from the output of sha256sum."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sha256: {path} cannot be read ({error})") from None
    digests = {}
    for line in filter(str.strip, lines):
        digest, _, name = line.strip().partition(" ")
        if len(digest) != 64 or not name.strip():
            raise UserError(f"--sha256: {line!r}", allowed="lines of sha256sum: digest, file name")
        digests[Path(name.strip().lstrip("*")).name] = digest
    return digests
