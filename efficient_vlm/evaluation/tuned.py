"""Evaluation of a fine-tuned run on the rows that it held out."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.record_messages import record_messages
from efficient_vlm.data.sources import Source, open_source
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.benchmark_file import Benchmark
from efficient_vlm.evaluation.benchmark_rows import BenchmarkRow
from efficient_vlm.evaluation.on_file import evaluate_file
from efficient_vlm.evaluation.settings import EvalConfig, labels_of, settings_of
from efficient_vlm.families.weights import Weights
from efficient_vlm.fields import section
from efficient_vlm.inference.finetune import mean_loss
from efficient_vlm.inference.load import from_pretrained
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.train.trained import Trained

__all__ = ["evaluate_tuned"]


def evaluate_tuned(
    workdir: Path,
    config: Mapping[str, Any],
    evaluation: EvalConfig,
    *,
    trained: Trained | None = None,
    control: str | None = None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The newest parameters of a run on its held-out rows, with every method at every budget.

    Answers are generated from the conversation up to the last answer, and scored by `eval.metric`;
    with the control "blank" of grey pictures, and without losses.

    Args:
      trained: what the run ended with, fresh from training; None to read it from the files.

    Returns:
      {"losses": rows of compressor, budget, loss (mean per target token, in nats) and targets,
      "test_samples": {"samples", "skipped"}}, and what `on_file.evaluate_file` returns.
    """
    began = time.monotonic()
    if trained is not None and trained.mesh is None:  # It is there: no second copy is read.
        weights = Weights(unstack(trained.params))
        vlm = Pretrained(trained.model, weights, trained.processor, {}, changed=True)
    else:
        vlm = from_pretrained(workdir)
    data = DataConfig.from_mapping(section(config, "data"))
    found: dict[str, Any] = {"losses": [], "eval": [], "cost": []}
    source = held_out(data, evaluation.images)
    if source is None:
        say("Evaluation: no rows are held out (data.eval_path, data.test_fraction)")
        return found
    variants = settings_of(evaluation, vlm.model)
    labelled = [] if control else zip(variants, labels_of(variants), strict=True)
    for variant, (name, budget) in labelled:
        check_stop()
        loss, targets, skips = _loss(vlm.with_model(variant), source, data, check_stop)
        row = {"compressor": name, "budget": budget, "loss": loss, "targets": targets}
        found["losses"].append(row)
        found["test_samples"] = {"samples": len(source), "skipped": skips}
        say(f"  {f'{name} at {budget}':<22}loss {loss:.4f} over {targets:,} tokens")
    rows = list(_questions(source))
    if rows:
        given = dict(max_new_tokens=evaluation.new_tokens, batch_size=evaluation.batch_size)
        methods = evaluation.methods or [_own(vlm)]
        asked = Benchmark(tuple(rows), {}, {}, len(rows), Path(data.path), "")
        found |= evaluate_file(
            vlm,
            asked,
            evaluation.metric,
            methods=methods,
            seeds=evaluation.seeds,
            by_category=True,
            control=control,
            workdir=None,
            say=say,
            check_stop=check_stop,
            **given,
        )
        found.pop("benchmark")
    say(f"Evaluation: {time.monotonic() - began:.1f} s")
    return found


def _own(vlm: Pretrained) -> dict[str, Any]:
    """The model's compressor as an entry of `eval.methods`."""
    options = dict(vlm.model.compressor)
    budget = options.pop("budget", None)
    return options | ({} if budget is None else {"budgets": [budget]})


def _questions(source: Source) -> Iterator[BenchmarkRow]:
    """The last question of every conversation that can be read, with its answer."""
    for index in range(len(source)):
        try:
            record = source[index]
        except BadRecord:
            continue
        group = hashlib.sha256(b"".join(record.images) or record.id.encode()).hexdigest()
        for number, conversation in enumerate(record.conversations):
            *messages, answer = record_messages(conversation, record.images)
            for message in messages:
                if isinstance(message["content"], list):
                    message["content"] = [
                        {"type": "image"} if part["type"] == "image" else part
                        for part in message["content"]
                    ]
            name = f"{record.id}-{number}" if number else record.id
            # Tables may have several right answers to their one question.
            several = record.meta.get("answers") if len(record.conversations) == 1 else None
            references = tuple(several) if several else (answer["content"],)
            given = dict(group=group, category=conversation.task, messages=tuple(messages))
            yield BenchmarkRow(name, record.images, "", references, **given)


def held_out(data: DataConfig, most: int) -> Source | None:
    """The rows for evaluation, at most `most` of them (0 for all); None if there are none."""
    if not data.eval_path and not data.test_fraction:
        return None
    source = open_source(data, "test")
    if not len(source):
        return None
    return First(source, most) if 0 < most < len(source) else source


class First:
    """The first records of a source; a `sources.Source`."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.tasks, self.placed = source.tasks, source.placed
        self.fingerprint = {**source.fingerprint, "first": count}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._source[index]

    def texts(self) -> Any:
        """Questions and answers."""
        return itertools.islice(self._source.texts(), self._count)


def _loss(
    vlm: Pretrained, source: Source, data: DataConfig, check_stop: Callable[[], None]
) -> tuple[float, int, dict[str, int]]:
    model = vlm.processor.seeing(vlm.model)
    pipeline = ChatPipeline(data, source, vlm.processor, [model], soft=vlm.soft_ids)
    total, count = mean_loss(vlm, pipeline, check_stop)
    if not count:
        raise UserError(
            "eval: no held-out row has an answer that fits",
            fix="see `efficient-vlm data inspect` for the reasons",
        )
    loss = total / count
    return (loss if math.isfinite(loss) else math.nan), int(count), pipeline.skips.counts
