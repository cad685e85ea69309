"""Another model as the teacher: before training it reads every row, with its own processor."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.skips import told
from efficient_vlm.data.sources import Source
from efficient_vlm.data.taught import Key, Taught, records_of
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.checks import check_compressor
from efficient_vlm.families.processor import Processor
from efficient_vlm.files import file_digest
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.gather import fitted
from efficient_vlm.processing.vocabularies import same_ids
from efficient_vlm.train.base import open_base
from efficient_vlm.train.distil import top_tokens
from efficient_vlm.train.objective import DistilConfig
from efficient_vlm.train.pretrained_fields import PretrainedFields

__all__ = ["Teacher", "open_teacher", "taught_by", "taught_on_disk"]

# The most likely tokens that are kept, unless the config says how many.
_TOP_K = 64
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that is asked.

    Attributes:
      model: with the teacher's compressor.
      processor: tokenizer, template and pictures.
      params: gives the parameters, as `model.apply` takes them.
      identity: gives the SHA-256 of its files: weights, tokenizer, template, settings.
    """

    model: VisionLanguageModel
    processor: Processor
    params: Callable[[], Any]
    identity: Callable[[], dict[str, str]] = dict


def open_teacher(config: DistilConfig, dtype: str) -> Teacher:
    """The teacher that a config names; weights of files are not read yet.

    Args:
      config: with `teacher`.
      dtype: of activations and parameters of a teacher that is read from files.

    Raises:
      UserError: no such model, or a compressor that it cannot have.
    """
    given = config.teacher
    if hasattr(given, "with_compressor"):  # A loaded model.
        loaded = given.with_compressor(**config.compressor)
        return Teacher(loaded.model, loaded.processor, lambda: loaded.fused)
    if not isinstance(given, str | Path):
        raise UserError(
            f"distil.teacher: {short(given)}",
            allowed="the directory of a published model, its name on a hub, or a loaded model",
        )
    fields = dict(pretrained=str(given), dtype=dtype, param_dtype=dtype, remat="none")
    try:
        base = open_base(PretrainedFields(**fields, compressor=config.compressor))
        check_compressor(base.model, base.processor.family.variable)
        _ = base.processor.tokenizer
    except UserError as error:
        raise _named(error) from None

    def params() -> Any:
        return unflatten_dict(base.parameters(), sep="/")

    def identity() -> dict[str, str]:
        files = sorted(base.processor.directory.iterdir())
        settings = [path for path in files if path.suffix in (".json", ".jinja")]
        return base.digests() | {path.name: file_digest(path)[1] for path in settings}

    return Teacher(base.model, base.processor, params, identity)


def _named(error: UserError) -> UserError:
    """An error about a model that says which one of the config."""
    problem, *rest = str(error).splitlines()
    problem = problem.removeprefix("model.pretrained: ").removeprefix("compressor.name: ")
    lines = (line.strip().partition(": ") for line in rest)
    return UserError(f"distil.teacher: {problem}", **{name: text for name, _, text in lines})


def taught_on_disk(
    workdir: Path,
    config: DistilConfig,
    base: Any,
    dtype: str,
    data: DataConfig,
    source: Source,
    say: Callable[[str], None],
) -> Taught:
    """As `taught_by`, kept in `workdir`/teacher: a run that resumes does not ask again.

    Args:
      workdir: of the run.
      base: what the run starts from, a `train.base.Base`.
      config, dtype, data, source, say: see `taught_by`.

    Raises:
      UserError: see there; or what is kept is of another teacher, of other data or settings.
    """
    teacher = open_teacher(config, dtype)
    same, k = _shared(config, teacher, base.model, base.processor)
    limits = ("max_length", "max_images", "max_pixels", "max_image_bytes")
    about = {
        "format": _FORMAT,
        "teacher": teacher.identity(),
        "tokenizer": base.processor.tokenizer.fingerprint,
        "data": {**source.fingerprint, "records": len(source)},
        "limits": {name: getattr(data, name) for name in limits},
        "top_k": k,
        "temperature": config.temperature,
        "compressor": dict(config.compressor),
        "dtype": dtype,
    }
    folder = workdir / "teacher"
    taught = Taught.read(folder, about, k)
    if taught is None:
        Taught.write(folder, _found(config, teacher, data, source, same, k, say), about)
        taught = Taught.read(folder, about, k)
    say(_summary(config, taught, k))
    return taught


def taught_by(
    config: DistilConfig,
    model: VisionLanguageModel,
    processor: Processor,
    dtype: str,
    data: DataConfig,
    source: Source,
    say: Callable[[str], None] = lambda line: None,
) -> Taught:
    """What a teacher says of every target of a source, in memory.

    It reads conversations as it does alone, with its own template, pictures and visual tokens; rows
    that it cannot read have no teacher. It is on one device.

    Args:
      config: with `teacher`.
      model, processor: of the student.
      dtype: see `open_teacher`.
      data: of the run: limits, and sizes of batches.
      source: of the run.
      say: receives lines for the user.

    Raises:
      UserError: see `open_teacher`; another tokenizer, or more of the most likely tokens than both
        models have.
    """
    teacher = open_teacher(config, dtype)
    same, k = _shared(config, teacher, model, processor)
    return Taught.of(_found(config, teacher, data, source, same, k, say), k)


def _shared(
    config: DistilConfig, teacher: Teacher, model: VisionLanguageModel, processor: Processor
) -> tuple[np.ndarray, int]:
    """Which of the teacher's ids mean the same to the student, and how many are kept."""
    sizes = tuple(m.decoder.get("head_size") or m.vocab_size for m in (model, teacher.model))
    tokenizers = (processor.tokenizer, teacher.processor.tokenizer)
    same = same_ids(*tokenizers, sizes, "distil.teacher")
    most = int(same.sum())
    if (config.top_k or 1) > most:
        raise UserError(
            f"distil.top_k: {config.top_k:,}",
            allowed=f"up to {most:,}, the tokens that teacher and student share",
            fix=f"distil.top_k={min(_TOP_K, most)}",
        )
    return same, config.top_k or min(_TOP_K, most)


def _found(
    config: DistilConfig,
    teacher: Teacher,
    data: DataConfig,
    source: Source,
    same: np.ndarray,
    k: int,
    say: Callable[[str], None],
) -> Iterator[tuple[Key, np.ndarray]]:
    """Every conversation that the teacher can read, with what it says."""
    # A row that it cannot read is no reason to stop: the student may.
    data = dataclasses.replace(data, max_skip_fraction=1.0, cache_mb=0)
    processor = teacher.processor
    say(f"Teacher: {_name(config)} reads {len(source):,} samples ...")
    try:
        pipeline = ChatPipeline(data, source, processor, [processor.seeing(teacher.model)])
    except UserError as error:
        raise _named(error) from None
    params = jax.device_put(teacher.params())
    for batch in pipeline.epoch():
        model = fitted(pipeline.model, batch.inputs.pictures, processor.family.variable)
        top = _asked(model, k, config.temperature, params, batch.inputs, same)
        yield from records_of(batch.inputs, batch.conversations, jax.device_get(top), same)
    if skipped := pipeline.skips.counts:
        say(f"Teacher: it cannot read {told(skipped, len(source), 'samples')}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _asked(model, k, temperature, params, inputs, same):
    logits = model.apply({"params": params}, inputs, rng=jax.random.key(0)).logits
    return top_tokens(logits, k, temperature=temperature, among=same)


def _summary(config: DistilConfig, taught: Taught, k: int) -> str:
    of = f"of {len(taught):,} targets in {taught.conversations:,} conversations"
    return f"Teacher: {_name(config)}, its {k} most likely tokens {of}"


def _name(config: DistilConfig) -> str:
    given = config.teacher
    return str(given) if isinstance(given, str | Path) else given.processor.family.name
