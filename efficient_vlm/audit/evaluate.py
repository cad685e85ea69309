"""Evaluation: quality and cost of every (compressor, budget) under one protocol."""

import collections
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_vlm.audit import maps
from efficient_vlm.audit.flops import model_cost
from efficient_vlm.audit.stats import accuracy_interval
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.data.evalset import EvalSet
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.vlm import VisionLanguageModel

CONTROLS = ("blank", "shuffled")
PROTOCOL = (
    "Greedy generation; an answer is right if it equals the reference after stripping and "
    "lower-casing. 95 % intervals are clustered by image. FLOPs and milliseconds are for one "
    "question about one image; milliseconds are medians over batches of {questions} questions "
    "about {images} images on {device}, the first batch of each program left out."
)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated.

    Attributes:
      images: test images; 0 for all.
      batch_size: images per batch.
      new_tokens: the most tokens of an answer, end token included.
      methods: {"name", "budgets", options of the compressor}.
      seeds: draws of a random compressor, pooled.
      map_questions: example questions whose token maps go into the report.
    """

    images: int = 256
    batch_size: int = 32
    new_tokens: int = 8
    methods: Sequence[Mapping[str, Any]] = ()
    seeds: int = 3
    map_questions: int = 4

    def __post_init__(self):
        for name in ("batch_size", "new_tokens", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name}: {getattr(self, name)}", allowed="1 or more")
        for name in ("images", "map_questions"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name}: {getattr(self, name)}", allowed="0 or more")


def settings_of(config: EvalConfig, model: VisionLanguageModel) -> list[VisionLanguageModel]:
    """The model at every (compressor, budget) of `config.methods`; by default its own.

    Raises:
      UserError: an unknown method or option, or a budget that it cannot reach.
    """
    found = []
    for i, method in enumerate(config.methods or [{**model.compressor, "budgets": None}]):
        if not isinstance(method, Mapping):
            raise UserError(f"eval.methods[{i}]: {method!r}", allowed="name, budgets, options")
        options = dict(method)
        name = options.pop("name", None)
        if name not in METHODS:
            raise unknown(f"eval.methods[{i}].name", str(name), METHODS)
        budgets = options.pop("budgets", None) or [options.get("budget")]
        budgets = budgets if isinstance(budgets, list | tuple) else [budgets]
        options.pop("budget", None)
        for budget in budgets:
            found.append(model.with_compressor(name, budget, **options))
            found[-1].make_compressor()  # Wrong options and budgets are told before any work.
    return found


def evaluate(
    model: VisionLanguageModel,
    params: Any,
    data: EvalSet,
    config: EvalConfig,
    *,
    control: str | None = None,
    workdir: Path | None = None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Answers every question with every method, and measures what that costs.

    Args:
      model, params: what to evaluate.
      data: test images and questions.
      config: methods and sizes.
      control: "blank" (grey images) or "shuffled" (the answers of another image): accuracy must
        fall to chance.
      workdir: where predictions and token maps are written; None for nowhere.
      say: receives a line per method.
      check_stop: called between batches; may raise.

    Returns:
      {"eval": rows, "cost": rows, "protocol": text}, as in results.json.
    """
    if control is not None and control not in CONTROLS:
        raise unknown("control", control, CONTROLS)
    references = [[normalise(a) for a in row] for row in data.answers]
    if control == "shuffled":
        references = _shuffled(references, data)
    chosen = _map_questions(data, config.map_questions) if workdir else []
    results: dict[str, Any] = {"eval": [], "cost": []}
    cells: dict[tuple[int, int], list[maps.Cell]] = {place: [] for place in chosen}
    variants = settings_of(config, model)
    check_trained(variants, parameter_shapes(params))
    for variant in variants:
        name, budget = variant.compressor["name"], variant.compressor["budget"]
        predictions, cost = _run_method(
            variant, params, data, references, config, control, cells, check_stop
        )
        rows = score(predictions, data.tasks)
        results["eval"] += [{"compressor": name, "budget": budget, **row} for row in rows]
        results["cost"].append({"compressor": name, "budget": budget, **cost})
        if workdir is not None:
            stem = f"{name}-{budget}" + (f"-{control}" if control else "")
            write_jsonl(workdir / "predictions" / f"{stem}.jsonl", predictions)
        shown = "  ".join(f"{row['task']} {row['accuracy']:.3f}" for row in rows)
        say(f"  {name + ' at ' + str(budget):<22}{shown}")
    images = data.batches[0]["images"].shape
    results["protocol"] = PROTOCOL.format(
        questions=images[0] * data.spec.questions,
        images=images[0] * images[1],
        device=jax.devices()[0].device_kind,
    )
    if workdir is not None and control is None:
        maps.write_maps(workdir, [_example(data, place, cells[place]) for place in chosen])
    return results


def _run_method(variant, params, data, references, config, control, cells, check_stop):
    name, budget = variant.compressor["name"], variant.compressor["budget"]
    seeds = config.seeds if name == "random" else 1
    predictions, times, kv_bytes = [], [], 0
    for seed in range(seeds):
        for number, batch in enumerate(data.batches):
            check_stop()
            images = np.full_like(batch["images"], 128) if control == "blank" else batch["images"]
            prompts, lengths = prompts_of(batch, data.tokenizer.pad_id)
            answer = functools.partial(
                generate,
                variant,
                params,
                images,
                batch["image_mask"],
                prompts,
                lengths,
                new_tokens=config.new_tokens,
                eos_id=data.tokenizer.eos_id,
                rng=jax.random.fold_in(jax.random.key(seed), number),
            )
            out = answer()
            times.append(out.seconds)
            kv_bytes = out.kv_bytes // max(lengths.size, 1)
            first = number * len(images)
            for b, q in zip(*np.nonzero(lengths), strict=True):
                text = data.tokenizer.decode(out.tokens[b, q])
                reference = references[first + b][q]
                predictions.append(
                    {
                        "compressor": name,
                        "budget": budget,
                        "index": int(batch["index"][b]),
                        "slot": int(q),
                        "task": data.tasks[batch["task"][b, q]],
                        "question": data.prompts[first + b][q],
                        "answer": reference,
                        "prediction": text,
                        "correct": normalise(text) == reference,
                        **({"seed": seed} if seeds > 1 else {}),
                    }
                )
                if (first + b, q) in cells and seed == 0:
                    source = np.asarray(out.visual.source[b * lengths.shape[1] + q])
                    cell = maps.Cell(name, budget, source, text, grid=_grid(variant, source))
                    cells[first + b, q].append(cell)
    if len(times) == 1:
        times.append(answer().seconds)  # The only batch has compiled: once more, for the clock.
    counted = model_cost(
        variant,
        text_tokens=prompts.shape[-1],
        new_tokens=config.new_tokens,
        images=images.shape[1],
        image_size=images.shape[2:4],
    )
    cost = {
        "visual_tokens": counted.visual_tokens,
        "flops": counted.flops,
        "decode_flops": counted.decode_flops,
        "kv_bytes": kv_bytes,
        "ms": _milliseconds(times, images=images.shape[0], questions=lengths.size),
    }
    return predictions, cost


def score(predictions: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Exact match per task with 95 % intervals clustered by image, from predictions."""
    rows = []
    for task in tasks:
        of_task = [p for p in predictions if p["task"] == task]
        if of_task:
            accuracy, low, high = accuracy_interval(
                [p["correct"] for p in of_task], [p["index"] for p in of_task]
            )
            interval = [round(low, 4), round(high, 4)]
            rows.append(
                {"task": task, "n": len(of_task), "accuracy": round(accuracy, 4), "ci95": interval}
            )
    return rows


def normalise(text: str) -> str:
    """What exact match compares: stripped, single spaces, lower case."""
    return " ".join(text.lower().split())


def prompts_of(batch: Mapping[str, np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Questions without their answers: int32 [B, Q, P] and lengths [B, Q], 0 for empty slots."""
    lengths = np.where(batch["lengths"] > 0, batch["prompt_lengths"], 0)
    tokens = batch["tokens"]
    inside = np.arange(tokens.shape[-1]) < lengths[..., None]
    return np.where(inside, tokens, pad_id), lengths


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _milliseconds(times: Sequence[Mapping[str, Any]], *, images: int, questions: int) -> dict:
    """Medians per image (encode) or per question, without the batch that compiled."""
    warm = times[1:]

    def median(stage: str, per: int) -> float:
        return round(1e3 * statistics.median(t[stage] for t in warm) / per, 5)

    decode = [s for t in warm for s in t["decode"]]
    return {
        "encode": median("encode", images),
        "compress": median("compress", questions),
        "prefill": median("prefill", questions),
        "decode_per_token": round(1e3 * statistics.median(decode) / questions, 5)
        if decode
        else None,
    }


def _shuffled(references: list[list[str]], data: EvalSet) -> list[list[str]]:
    """Each question gets the answer of a question of the same task about another image."""
    places: dict[int, list[tuple[int, int]]] = {}
    tasks = np.concatenate([batch["task"] for batch in data.batches])
    for row, answers in enumerate(references):
        for slot in range(len(answers)):
            places.setdefault(int(tasks[row, slot]), []).append((row, slot))
    shuffled = [list(row) for row in references]
    rng = np.random.default_rng(0)
    for of_task in places.values():
        # Images in a random order, then each takes the answers of one further on: by as many
        # places as one image has at most, so that none is its own neighbour.
        rank = rng.permutation(len(references))
        ordered = sorted(of_task, key=lambda place: rank[place[0]])
        shift = max(collections.Counter(row for row, _ in of_task).values())
        for k, (row, slot) in enumerate(ordered):
            other = ordered[(k + shift) % len(ordered)]
            shuffled[row][slot] = references[other[0]][other[1]]
    return shuffled


def _map_questions(data: EvalSet, count: int) -> list[tuple[int, int]]:
    """(row, slot) of example questions: tasks in turn, each about an image of its own."""
    tasks = np.concatenate([batch["task"] for batch in data.batches])
    chosen: list[tuple[int, int]] = []
    for row in range(len(data.answers)):
        wanted = len(chosen) % len(data.tasks)
        slots = np.nonzero(tasks[row] == wanted)[0]
        if len(chosen) < count and len(slots) and data.answers[row]:
            chosen.append((row, int(slots[0])))
    return chosen


def _example(data: EvalSet, place: tuple[int, int], cells: list[maps.Cell]) -> maps.Example:
    row, slot = place
    size = len(data.batches[0]["images"])
    batch = data.batches[row // size]
    return maps.Example(
        image=batch["images"][row % size, 0],
        question=data.prompts[row][slot],
        answer=data.answers[row][slot],
        cells=cells,
        task=data.tasks[batch["task"][row % size, slot]],
        record=int(batch["index"][row % size]),
    )


def _grid(variant: VisionLanguageModel, source: np.ndarray) -> tuple[int, int]:
    rows, columns = variant.make_encoder().grid
    return (source.size // columns, columns)


def check_trained(
    variants: Sequence[VisionLanguageModel], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError for the first method whose parameters are not all among `given`.

    Args:
      variants: from `settings_of`.
      given: paths and shapes of what is (or will be) trained, from `parameter_shapes`.
    """
    for variant in variants:
        needed = parameter_shapes(init_shapes(variant))
        name, budget = variant.compressor["name"], variant.compressor["budget"]
        missing = [path for path in needed if path not in given]
        if missing:
            raise UserError(
                f"compressor {name!r} at {budget}: no trained parameters ({missing[0]}, ...)",
                allowed="methods without parameters, or those of train.elastic",
                fix=f"add dict(name={name!r}, budget={budget}) to train.elastic and train",
            )
        other = [path for path, shape in needed.items() if given[path] != shape]
        if other:
            raise UserError(
                f"compressor {name!r} at {budget}: {other[0]} has shape {needed[other[0]]}, "
                f"trained was {given[other[0]]}",
                fix="give the options and budgets that it was trained with",
            )


def init_shapes(model: VisionLanguageModel) -> Any:
    """The shapes of a model's parameters, without computing anything."""
    from flax import linen as nn

    encoder = model.make_encoder()
    rows, columns = (side * encoder.patch_size for side in encoder.grid)
    inputs = {
        "images": np.zeros((1, 1, rows, columns, 3), np.uint8),
        "image_mask": np.ones((1, 1), bool),
        "tokens": np.zeros((1, 1, 2), np.int32),
        "lengths": np.full((1, 1), 2, np.int32),
        "prompt_lengths": np.ones((1, 1), np.int32),
    }
    made = jax.eval_shape(lambda key: model.init(key, **inputs)["params"], jax.random.key(0))
    return nn.unbox(made)


def parameter_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
