"""Records to batches: shuffled, resumable, and in an order that no number of processes changes.

    shuffle -> repeat -> mix -> batch (of record numbers) -> own rows -> decode and tokenize

The state of the iterator is the number of the next batch. Everything random is a function of
(seed, position in the global order), so a resumed run continues exactly. A record that cannot be
used is replaced by the next usable one of its source, which depends on the data alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.data import questions, transforms
from efficient_vlm.data.config import DataConfig, validate
from efficient_vlm.data.mixture import MixtureSource, neighbours_of, order_of
from efficient_vlm.data.skips import SkipCounter
from efficient_vlm.data.sources import Source, layout_of, longest_words, open_source
from efficient_vlm.errors import UserError, short
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing import plain_tokenizer as tokenizing
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.tokenizer import Tokenizer

# Part of the fingerprint: raise it when the same config gives other batches.
FORMAT = 1
_ARRAY_OVERHEAD = 150  # Bytes of an array object and its place in a dict.


class Pipeline:
    """Endless training batches; see `make_train`.

    Attributes:
      tokenizer: text to ids and back.
      tasks: names; `batch["task"]` is an index into them.
      fingerprint: everything that defines content and order; store it with the iterator state.
      source: the records.
      spec: shapes and limits of an example.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenizer: Tokenizer,
        rows: Sequence[int] | None = None,
    ):
        self.config = config
        self.source = source
        self.tokenizer = tokenizer
        self.tasks = source.tasks
        self.spec = make_spec(config, source.tasks, source.placed)
        self.fingerprint = make_fingerprint(config, source, tokenizer, self.spec)
        self._skips = SkipCounter(len(source), config.max_skip_fraction)
        self._cache: dict[int, tuple] = {}
        self._cache_left = config.cache_mb * 2**20
        self._rows = range(config.batch_size) if rows is None else rows

    @property
    def skips(self) -> SkipCounter:
        """What is known of unusable records; a checkpoint carries its state."""
        return self._skips

    @property
    def skipped(self) -> dict[str, int]:
        """Records found unusable so far by this process, and those before it, by reason."""
        return self._skips.counts

    def by_source(self, steps: int) -> list[dict[str, Any]]:
        """What each source of a mixture gave to `steps` steps; see `MixtureSource.summary`.

        Skipped records are those that this process knows of. [] for a single source.
        """
        if not isinstance(self.source, MixtureSource):
            return []
        bad = [index for numbers in self._skips.state().values() for index in numbers]
        return self.source.summary(steps * self.config.batch_size, bad)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """A Grain iterator over batches: `next`, `get_state`, `set_state`; Orbax saves it."""
        import grain

        order = order_of(self.source, self.config.seed)
        batches = order.batch(self.config.batch_size).map_with_index(self._load)
        options = grain.ReadOptions(
            num_threads=self.config.num_threads,
            prefetch_buffer_size=self.config.prefetch if self.config.num_threads else 0,
        )
        return iter(batches.to_iter_dataset(options))

    def _load(self, number: int, records: np.ndarray) -> dict[str, np.ndarray]:
        """This process's rows of global batch `number`, whose records are `records`."""
        first = number * len(records)
        examples = [self._example(first + row, int(records[row])) for row in self._rows]
        return transforms.stack(examples)

    def _example(self, position: int, index: int) -> dict[str, np.ndarray]:
        """Example at `position` of the global order: record `index`, or the next usable one."""
        among = neighbours_of(self.source, index)
        for step in range(len(among)):
            candidate = among[(index - among.start + step) % len(among)]
            if self._skips.known_bad(candidate):
                continue
            try:
                texts, pictures = self._prepare(candidate)
            except BadRecord as error:
                self._skips.add(candidate, error)
                continue
            rng = np.random.default_rng((self.config.seed, position))
            choice = rng.permutation(len(texts["task"]))[: self.spec.questions]
            chosen = transforms.choose(texts, choice, self.spec, self.tokenizer.pad_id)
            return chosen | pictures | {"index": np.int64(candidate)}
        raise UserError(
            f"data: none of the {len(among)} samples can be used",
            fix="see `efficient-vlm data inspect` for the reasons",
        )

    def _prepare(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Arrays of all conversations and images of a record, cached within `cache_mb`."""
        if index in self._cache:
            return self._cache[index]
        record = self.source[index]
        texts = transforms.text_arrays(record, self.spec, self.tokenizer)
        pictures = transforms.image_arrays(record, self.spec)
        self._skips.add(index, None)
        arrays = (texts, pictures)
        # Nothing is evicted: in random order no rule would choose better samples to keep.
        size = sum(a.nbytes + _ARRAY_OVERHEAD for part in arrays for a in part.values())
        if size <= self._cache_left:
            self._cache_left -= size
            self._cache[index] = arrays
        return arrays


def make_train(
    config: DataConfig,
    *,
    rows: Sequence[int] | None = None,
    workdir: str | Path | None = None,
) -> Pipeline:
    """The training data.

    Args:
      config: see `DataConfig`.
      rows: those of every global batch of `batch_size` that this process reads, see
        `sharding.own_rows`; None for all.
      workdir: a trained tokenizer is stored here as tokenizer.json, and reused if it exists.

    Raises:
      UserError: bad config, no data, damaged data.
    """
    validate(config)
    source = open_source(config, "train")
    if not len(source):
        raise UserError(
            f"data: {short(config.path or config.source)} has no training samples",
            fix="add samples, or set data.eval_path (or a smaller data.test_fraction)",
        )
    tokenizer = make_tokenizer(config, source, workdir)
    return Pipeline(config, source, tokenizer, rows)


def make_tokenizer(
    config: DataConfig, source: Source | None, workdir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer of `config`; one that is trained on the data is stored in `workdir`."""
    if config.tokenizer:
        return tokenizing.load(config.tokenizer)
    if config.generated:
        return tokenizing.word_level(questions.vocabulary())
    path = Path(workdir) / "tokenizer.json" if workdir else None
    if path and path.is_file():
        return tokenizing.load(path)
    trained = tokenizing.train(source.texts(), config.vocab_size)
    if path:
        trained.save(path)
    return trained


def preview(config: DataConfig) -> tuple[transforms.Spec, Tokenizer] | None:
    """Shapes and tokenizer of `make_train`'s batches, or None if they depend on the data.

    A program can then be compiled while the data are being built.
    """
    if not config.generated:
        return None
    return make_spec(config, config.tasks), make_tokenizer(config, None)


def make_spec(config: DataConfig, tasks: tuple[str, ...], placed: bool = False) -> transforms.Spec:
    """Shapes and limits, with the automatic values filled in.

    Args:
      config: of the data.
      tasks, placed: of the source.
    """
    bench = config.generated
    length = config.max_length or (max(8, longest_words(config) + 1) if bench else 256)
    questions = config.questions_per_image or (8 if bench else 1)
    if bench and questions > config.question_pool:
        raise UserError(
            f"data.questions_per_image: {questions} of a pool of {config.question_pool}",
            allowed=f"up to data.question_pool={config.question_pool}",
            fix=f"data.question_pool={questions}",
        )
    if placed and questions > 1:
        # Conversations of a row share one copy of its pictures, which then have one place.
        raise UserError(
            f"data.questions_per_image: {questions}, but some rows have pictures among their text",
            allowed="1 for such data",
            fix="data.questions_per_image=1",
        )
    return transforms.Spec(
        image_size=config.size,
        resize=config.resize,
        max_images=config.max_images,
        questions=questions,
        max_length=length,
        max_pixels=config.max_pixels,
        max_bytes=config.max_image_bytes,
        tasks=tasks,
        placed=placed,
    )


def make_fingerprint(
    config: DataConfig, source: Source, tokenizer: Tokenizer, spec: transforms.Spec
) -> dict[str, Any]:
    """What defines the content and the order of the batches, as plain JSON values."""
    # Lists, not tuples, so that it equals a fingerprint that was stored as JSON.
    shapes = {k: list(v) if isinstance(v, tuple) else v for k, v in spec._asdict().items()}
    if not spec.placed:  # Checkpoints of before know no such field.
        del shapes["placed"]
    return {
        "format": FORMAT,
        "preprocessing": images.STANDARD,
        "source": layout_of(config),
        **source.fingerprint,
        "records": len(source),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "tokenizer": tokenizer.fingerprint,
        **shapes,
    }


def check_fingerprint(
    stored: Mapping[str, Any], current: Mapping[str, Any], allow: bool = False
) -> None:
    """Compares the fingerprint of a checkpoint with that of the run that resumes it.

    Args:
      stored: as saved.
      current: of this run.
      allow: True accepts any difference (`data.allow_data_change`).

    Raises:
      UserError: names every field that differs.
    """
    if allow:
        return
    keys = sorted({*stored, *current}, key=str)
    different = [key for key in keys if stored.get(key) != current.get(key)]
    if different:
        changes = ", ".join(
            f"{key} was {stored.get(key)!r}, is {current.get(key)!r}" for key in different
        )
        raise UserError(
            f"data: the data differ from those of the checkpoint: {changes}",
            fix="restore these fields, or --config.data.allow_data_change=True",
        )
