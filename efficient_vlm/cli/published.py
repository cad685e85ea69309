"""The verbs import, export and generate of the command line."""

import dataclasses
import json
import math
import os
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from efficient_vlm.cli import verify
from efficient_vlm.cli.methods import method_fields
from efficient_vlm.cli.pictures import picture_options
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.families.architecture import build_model, read_config
from efficient_vlm.families.card import Card, read_base
from efficient_vlm.families.card_facts import of_workdir
from efficient_vlm.families.imported import import_model, is_tuned, read_carried
from efficient_vlm.families.table import family_of
from efficient_vlm.inference import answers
from efficient_vlm.inference.load import from_pretrained
from efficient_vlm.inference.options import SamplingOptions
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.nn.kv_cache import CacheOptions
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing import pointing
from efficient_vlm.processing.pictures.base import load_picture
from efficient_vlm.runtime import enable_compilation_cache


def import_checkpoint(
    source: str,
    out: str,
    *,
    revision: str | None = None,
    verify_with: str | None = None,
    sha256: str | None = None,
) -> int:
    """`efficient-vlm import HF_DIR OUT [--verify=io.npz]`: 1 if the comparison fails."""
    io = None if verify_with is None else read_npz(verify_with)
    digests = None if sha256 is None else read_sha256(sha256)
    model, params = import_model(source, out, revision=revision, sha256=digests)
    config = read_config(out)
    family = family_of(config)
    used = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    carried = sum(value.size for value in read_carried(Path(out)).values())
    report: dict[str, Any] = {"family": family.name, "params": used + carried}
    if carried:
        report["params_unused"] = carried
    if io is None:
        print(json.dumps(report))
        return 0
    whole = jax.tree.map(lambda p: np.asarray(p, np.float32), unstack(params))
    comparison = verify.verify(family, config, build_model(config), whole, io)
    ok = comparison.pop("ok")
    # JSON has no NaN: non-finite errors are null.
    numbers = {k: None if v is None or not np.isfinite(v) else v for k, v in comparison.items()}
    print(json.dumps(report | numbers))
    if not ok:
        print(
            f"error: {out} is imported, but differs from {verify_with} "
            f"(allowed: {verify.TOLERANCE} of the largest logit, identical tokens)",
            file=sys.stderr,
        )
    return 0 if ok else 1


def export_checkpoint(
    checkpoint: str,
    out: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    form: str = "hf",
) -> int:
    """`efficient-vlm export CKPT HF_DIR`: the way back.

    Args:
      checkpoint: what was imported, a fine-tuned run, or a published model.
      out: folder to write.
      revision: of a model on a hub.
      dtype: of the weights; None for those that are stored.
      form: "hf" writes the whole model, adapters merged; "peft" the adapters alone.
    """
    folder = Path(checkpoint)
    ours = (folder / "checkpoints").is_dir() and not (folder / "dtypes.json").is_file()
    if ours and not is_tuned(folder):
        raise UserError(
            f"{folder}: a run of efficient-vlm train, whose model has no published layout",
            allowed="a run that started from a published model, or what efficient-vlm import wrote",
        )
    if form == "peft" and dtype is not None:
        raise UserError(f"--dtype={dtype}: adapters are written as they are", fix="leave it out")
    vlm = from_pretrained(checkpoint, revision=revision, param_dtype=dtype or "stored")
    command = shlex.join(["efficient-vlm", *sys.argv[1:]])
    if form == "peft":
        paths = vlm.save_adapter(out)
        _card(folder, vlm, command).write(Path(out))
    elif is_tuned(folder):
        given = {} if dtype is None else {"dtype": dtype}
        paths = vlm.merge().save(out, card=_card(folder, vlm, command), **given)
    else:
        paths = vlm.save(out, command=command)
    for path in paths:
        print(path)
    return 0


def _card(folder: Path, vlm: Any, command: str) -> Card:
    """The card of a fine-tuned run, or of what else has adapters."""
    base = read_base(vlm.source)
    if not is_tuned(folder):
        return Card(base=base, relation="adapter", command=command)
    return of_workdir(folder, base)


def generate(
    model: str,
    question: str,
    images: Sequence[str],
    *,
    revision: str | None = None,
    method: str | None = None,
    options: Sequence[str] = (),
    pictures: Sequence[str] = (),
    max_new_tokens: int = 64,
    do_sample: bool | None = None,
    sampling: Mapping[str, Any] | None = None,
    cache: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    adapter: str | None = None,
    points: str | None = None,
    as_json: bool = False,
) -> int:
    """`efficient-vlm generate MODEL QUESTION --image=FILE`.

    Args:
      model: folder with config.json and weights, or "org/name" on a hub.
      question: what to ask.
      images: files.
      revision: of a model on a hub.
      method, options: name of a method, and "option=value" of it.
      pictures: "option=value" of the picture processor.
      max_new_tokens, do_sample, cache: see `Pretrained.generate`.
      sampling: fields of `SamplingOptions`; the seed is that of random compressors as well.
      dtype, adapter: see `from_pretrained`.
      points: picture to write with the points of the answer, or None.
      as_json: print answer, times and tokens as JSON.
    """
    enable_compilation_cache()
    sampling = sampling or {}
    _check(sampling, cache, points, images)
    vlm = from_pretrained(
        model,
        revision=revision,
        compressor=_one_method(method, options),
        dtype=dtype,
        adapter=adapter,
        **picture_options(pictures),
    )
    stream = None
    if not as_json:

        def stream(text: str) -> None:
            print(text, end="", flush=True)

    out = vlm.run(
        [question],
        [[_at_home(image) for image in images]],
        max_new_tokens=max_new_tokens,
        stream=stream,
        rng=jax.random.key(sampling.get("seed", 0)),
        cache=cache,
        do_sample=do_sample,
        **sampling,
    )
    options = vlm.sampling_options(1, do_sample, sampling)
    (answer,) = answers.answers(vlm.tokenizer, out, options)
    if as_json:
        print(json.dumps(_report(vlm, out, answer)))
    else:
        print()
        for token in answer.logprobs or ():
            print(_line(token))
    if points is not None:
        _draw_points(answer.text, images[0], points)
    return 0


def _line(token: answers.TokenLogprob) -> str:
    """A token, its log-probability and the alternatives to it."""
    top = "  ".join(f"{text!r} {value:.3f}" for _, text, value in token.top)
    return f"{token.logprob:9.3f}  {token.text!r:<16} {top}".rstrip()


def _one_method(method: str | None, options: Sequence[str]) -> dict[str, Any] | None:
    """--compressor and its options, None for none."""
    if method is None:
        if options:
            raise UserError(
                f"--compressor.{options[0]}: no method",
                fix="add --compressor=NAME, such as visionzip",
            )
        return None
    fields, *more = method_fields([method], options)
    if more:
        raise UserError(f"--compressor={method}: one method at a time")
    return fields


def _check(
    sampling: Mapping[str, Any],
    cache: Mapping[str, Any] | None,
    points: str | None,
    images: Sequence[str],
) -> None:
    """Errors that would come only after the model is loaded, or after the answer."""
    for name, value in sampling.items():
        try:
            SamplingOptions(**{name: value})
        except UserError as error:
            error.args = (f"--{name.replace('_', '-')}{str(error)[len(name) :]}",)
            raise
    CacheOptions.of(cache)
    if points is None:
        return
    if len(images) != 1:
        raise UserError("--points: needs one picture", fix="give --image=FILE once")
    path, known = Path(points), Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--points={path}", allowed=".png, .jpg and what else Pillow writes")
    if not path.parent.is_dir():
        raise UserError(f"--points={path}: no directory {path.parent}", fix="make it first")


def _report(vlm: Pretrained, out: Any, answer: answers.Answer) -> dict[str, Any]:
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


def _draw_points(answer: str, image: str, out: str) -> None:
    parsed = pointing.parse(answer)
    if not parsed.points:
        print(f"no points in the answer; {out} is not written", file=sys.stderr)
        return
    drawn = pointing.draw(parsed.points, load_picture(image))
    try:
        drawn.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--points={out}: {first_line(error)}") from None
    print(f"{len(parsed.points)} points: {out}", file=sys.stderr)


def _at_home(image: str) -> str:
    """Shells leave "~" as it is in --image=~/a.png."""
    return os.path.expanduser(image) if image.startswith("~/") else image


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
            raise UserError(
                f"--sha256: {short(line)}", allowed="lines of sha256sum: digest, file name"
            )
        digests[Path(name.strip().lstrip("*")).name] = digest
    return digests
