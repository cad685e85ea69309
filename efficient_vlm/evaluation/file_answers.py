"""Questions of a benchmark put to a published model: answers, and what they cost."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from efficient_vlm.costs.flops import Cost, model_cost
from efficient_vlm.costs.stages import STAGES
from efficient_vlm.evaluation.benchmark_file import Benchmark
from efficient_vlm.evaluation.benchmark_rows import BenchmarkRow
from efficient_vlm.evaluation.settings import EvalConfig
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.processing import decode_image

# Questions whose FLOPs are counted, and batches that run once more for the clock.
COUNTED, TIMED = 8, 3
_BLANK = 128


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as the model gets it.

    Attributes:
      row: of the benchmark.
      prompt, images: see `BenchmarkRow.conversation`.
      index, slot: number of its group, and its own within that.
    """

    row: BenchmarkRow
    prompt: Any
    images: Sequence[Any]
    index: int
    slot: int

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


@dataclasses.dataclass
class Outputs:
    """What the answers of one method took: visual tokens of each, and bytes of the caches."""

    visual: list[int] = dataclasses.field(default_factory=list)
    kv_bytes: list[float] = dataclasses.field(default_factory=list)


def ask(benchmark: Benchmark, suffix: str, control: str | None) -> list[Asked]:
    """Questions with their pictures; those alike in length stand together, to share programs."""
    groups: dict[str, int] = {}
    counts: dict[str, int] = {}
    found = []
    for row in benchmark.rows:
        prompt, images = row.conversation(suffix)
        if control == "blank":
            images = [np.full_like(decode_image.decode(image), _BLANK) for image in images]
        counts[row.group] = counts.get(row.group, -1) + 1
        index = groups.setdefault(row.group, len(groups))
        found.append(Asked(row, prompt, images, index, counts[row.group]))
    return sorted(found, key=lambda asked: (len(asked.images), len(asked.text)))


def _batches(asked: Sequence[Asked], size: int) -> Iterator[Sequence[Asked]]:
    for start in range(0, len(asked), size):
        yield asked[start : start + size]


def _run(vlm: Pretrained, batch: Sequence[Asked], config: EvalConfig, seed: int, number: int):
    """Answers to a batch; the last of a file is filled up, for it to run the others' program."""
    filled = list(batch)
    if number:
        filled += [batch[-1]] * (config.batch_size - len(batch))
    return vlm.run(
        [asked.prompt for asked in filled],
        [list(asked.images) for asked in filled],
        max_new_tokens=config.new_tokens,
        rng=jax.random.fold_in(jax.random.key(seed), number),
    )


def answer(
    vlm: Pretrained, asked: Sequence[Asked], config: EvalConfig, check_stop: Callable[[], None]
) -> tuple[list[dict[str, Any]], Outputs]:
    """Answers of a model to all questions, once, or once for each seed of a random compressor.

    Returns:
      A row for each answer: id, index, slot, question, prediction, seed; and what they took.
    """
    seeds = config.seeds if vlm.model.make_compressor().draws else 1
    predictions, outputs = [], Outputs()
    for seed in range(seeds):
        for number, batch in enumerate(_batches(asked, config.batch_size)):
            check_stop()
            out = _run(vlm, batch, config, seed, number)
            rows = len(out.tokens)
            outputs.visual += np.asarray(out.visual.mask).sum(1).tolist()[: len(batch)]
            outputs.kv_bytes.append(out.kv_bytes / rows)
            for each, text in zip(batch, vlm.answers(out)[: len(batch)], strict=True):
                row = {"id": each.row.id, "index": each.index, "slot": each.slot}
                row |= {"question": each.text, "prediction": text.strip()}
                predictions.append({**row, **({"seed": seed} if seeds > 1 else {})})
    return predictions, outputs


# ---- costs ---------------------------------------------------------------------------------------


def cost(
    vlm: Pretrained, asked: Sequence[Asked], config: EvalConfig, outputs: Outputs
) -> dict[str, Any]:
    """A row of "cost" in results.json: means for one question."""
    counted = [_count(vlm, each, config) for each in _spread(asked, COUNTED)]
    return {
        "visual_tokens": round(statistics.mean(outputs.visual)),
        "flops": {s: round(statistics.mean(c.flops[s] for c in counted)) for s in STAGES},
        "decode_flops": round(statistics.mean(c.decode_flops for c in counted)),
        "kv_bytes": round(statistics.mean(outputs.kv_bytes)),
        "ms": _milliseconds(vlm, asked, config),
    }


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` values, evenly spread."""
    places = np.linspace(0, len(values) - 1, min(count, len(values)))
    return [values[round(place)] for place in places]


def _count(vlm: Pretrained, asked: Asked, config: EvalConfig) -> Cost:
    """FLOPs of one question, with the padding of its own shape."""
    request = vlm.request([asked.prompt], [list(asked.images)])
    pictures = request.inputs.pictures
    pool = None if pictures is None else pictures.pool_index
    return model_cost(
        request.model,
        text_tokens=request.inputs.text.shape[-1],
        new_tokens=config.new_tokens,
        images=0 if pictures is None else pictures.mask.shape[1],
        pooled=None if pool is None else pool.shape[1],
    )


def _milliseconds(
    vlm: Pretrained, asked: Sequence[Asked], config: EvalConfig
) -> dict[str, float | None]:
    """Medians for a question over batches that ran before, so that nothing is compiled."""
    batches = list(enumerate(_batches(asked, config.batch_size)))
    times: dict[str, list[float]] = {"encode": [], "compress": [], "prefill": [], "decode": []}
    for number, batch in _spread(batches, TIMED):
        out = _run(vlm, batch, config, 0, number)
        rows = len(out.tokens)
        for stage in ("encode", "compress", "prefill"):
            times[stage].append(1e3 * out.seconds[stage] / rows)
        times["decode"] += [1e3 * step / rows for step in out.seconds["decode"]]
    found = {s: round(statistics.median(v), 5) if v else None for s, v in times.items()}
    return {**{s: found[s] for s in ("encode", "compress", "prefill")},
            "decode_per_token": found["decode"]}  # fmt: skip
