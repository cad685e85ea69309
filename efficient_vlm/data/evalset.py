"""A finite, ordered set of batches with the answers as text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from efficient_vlm.data import transforms
from efficient_vlm.data.config import DataConfig, validate
from efficient_vlm.data.pipeline import make_spec, make_tokenizer
from efficient_vlm.data.records import Record
from efficient_vlm.data.skips import SkipCounter
from efficient_vlm.data.sources import Source, open_source
from efficient_vlm.errors import UserError
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.tokenizer import Tokenizer


class EvalSet:
    """Batches in the order of the source; see `make_eval`.

    Attributes:
      batches: list of batches for the model; the last is filled up with empty rows (index -1,
        lengths 0).
      answers: `answers[k][q]`, the answer of slot q of row k, counted over all batches (row b of
        batch n is k = n * batch_size + b); [] for the empty rows at the end.
      prompts: the same for the questions.
      tokenizer, tasks, spec, source: as in `Pipeline`.
      skipped: records left out, by reason.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        spec: transforms.Spec,
        batch_size: int,
        limit: int,
        max_skip_fraction: float,
    ):
        self.source, self.tokenizer, self.spec = source, tokenizer, spec
        self.tasks = source.tasks
        self.answers: list[list[str]] = []
        self.prompts: list[list[str]] = []
        skips = SkipCounter(len(source), max_skip_fraction)
        rows = []
        for index in range(len(source)):
            if limit and len(rows) == limit:
                break
            try:
                record = source[index]
                texts = transforms.text_arrays(record, spec, tokenizer)
                pictures = transforms.image_arrays(record, spec)
            except BadRecord as error:
                skips.add(index, error)
                continue
            skips.add(index, None)
            chosen = range(min(spec.questions, len(record.conversations)))
            texts = transforms.choose(texts, list(chosen), spec, tokenizer.pad_id)
            rows.append(texts | pictures | {"index": np.int64(index)})
            self.answers.append([first_answer(record, q) for q in chosen])
            self.prompts.append([record.conversations[q].prompt for q in chosen])
        self.skipped = skips.counts
        if not rows:
            raise UserError("data: no sample to evaluate", fix="raise data.test_fraction")
        missing = -len(rows) % batch_size
        rows += [transforms.empty(spec, tokenizer.pad_id)] * missing
        self.answers += [[] for _ in range(missing)]
        self.prompts += [[] for _ in range(missing)]
        starts = range(0, len(rows), batch_size)
        self.batches = [transforms.stack(rows[at : at + batch_size]) for at in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.batches)

    def record(self, index: int) -> Record:
        """Record number `index` (as in `batch["index"]`), with encoded images and meta."""
        return self.source[index]

    def image(self, index: int) -> np.ndarray:
        """Images of a record as the model sees them, uint8 [M, H, W, 3]."""
        return transforms.image_arrays(self.source[index], self.spec)["images"]


def first_answer(record: Record, number: int) -> str:
    """The first non-empty answer of conversation `number`: that of the first target tokens."""
    turns = record.conversations[number].turns
    return next((answer for _, answer in turns if answer.strip()), "")


def make_eval(
    config: DataConfig,
    split: str = "test",
    *,
    limit: int = 0,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    placed: bool = False,
) -> EvalSet:
    """Data for evaluation, held in memory (uint8 images), in the order of the source.

    Each image comes with the first `questions_per_image` questions of its pool.

    Args:
      config: see `DataConfig`.
      split: "test" or "train".
      limit: number of records; 0 takes all.
      workdir: where `make_train` keeps a trained tokenizer.
      tokenizer: of the training data; None makes it.
      placed: whether the model was trained with pictures among the text, see `transforms.Spec`.

    Raises:
      UserError: as `make_train`.
    """
    validate(config)
    source = open_source(config, split)
    if not len(source):
        raise UserError(
            f"data: {config.eval_path or config.path or config.source} has no {split} samples",
            fix="set data.eval_path, or raise data.test_fraction",
        )
    if tokenizer is None:
        trained_on = source if split == "train" else open_source(config, "train")
        tokenizer = make_tokenizer(config, trained_on, workdir)
    spec = make_spec(config, source.tasks, placed or source.placed)
    return EvalSet(source, tokenizer, spec, config.batch_size, limit, config.max_skip_fraction)
