"""Evaluation: quality and cost of every (compressor, budget) under one protocol."""

import collections
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_vlm import sharding
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.data.evalset import EvalSet
from efficient_vlm.errors import unknown
from efficient_vlm.evaluation import heat
from efficient_vlm.evaluation.answers import is_right, normalise
from efficient_vlm.evaluation.settings import (
    EvalConfig,
    check_trained,
    labels_of,
    parameter_shapes,
    settings_of,
)
from efficient_vlm.evaluation.stats import accuracy_interval
from efficient_vlm.evaluation.token_maps import Cell, Example, write_maps
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.train.processes import agreed, whole

CONTROLS = ("blank", "shuffled")
PROTOCOL = (
    "Greedy generation; an answer is right if it equals the reference after stripping and "
    "lower-casing. 95 % intervals are clustered by image. FLOPs and milliseconds are for one "
    "question about one image; milliseconds are medians over batches of {questions} questions "
    "about {images} images on {device}, the first batch of each program left out."
)


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

    Parameters may lie on a mesh, which then is active; several processes call this alike.

    Args:
      model, params: what to evaluate.
      data: test images and questions.
      config: methods and sizes.
      control: "blank" (grey images) or "shuffled" (the answers of another image): accuracy must
        fall to chance.
      workdir: where the first process writes predictions and token maps; None for nowhere.
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
    cells: dict[tuple[int, int], list[Cell]] = {place: [] for place in chosen}
    variants = settings_of(config, model)
    labels = labels_of(variants)
    check_trained(variants, parameter_shapes(params))
    # On a mesh stacks stay as they are: layers are gathered one at a time.
    params = params if sharding.auto_axes() else unstack(params)
    for variant, (name, budget) in zip(variants, labels, strict=True):
        predictions, cost = _run_method(
            variant, (name, budget), params, data, references, config, control, cells, check_stop
        )
        rows = score(predictions, data.tasks)
        results["eval"] += [{"compressor": name, "budget": budget, **row} for row in rows]
        results["cost"].append({"compressor": name, "budget": budget, **cost})
        if workdir is not None:
            stem = f"{name}-{budget}".replace(" ", "_") + (f"-{control}" if control else "")
            path = workdir / "predictions" / f"{stem}.jsonl"
            agreed(functools.partial(write_jsonl, path, predictions))
        shown = "  ".join(f"{row['task']} {row['accuracy']:.3f}" for row in rows)
        say(f"  {name + ' at ' + str(budget):<22}{shown}")
    images, device = data.batches[0]["images"].shape, jax.devices()[0].device_kind
    count = math.prod(sharding.auto_axes().values())  # Of those that share the work.
    results["protocol"] = PROTOCOL.format(
        questions=images[0] * data.spec.questions,
        images=images[0] * images[1],
        device=device if count == 1 else f"{count} x {device}",
    )
    if workdir is not None and control is None:
        examples = [_example(data, place, cells[place]) for place in chosen]
        agreed(functools.partial(write_maps, workdir, examples))
    return results


def _run_method(variant, label, params, data, references, config, control, cells, check_stop):
    name, budget = label
    seeds = config.seeds if variant.make_compressor().draws else 1
    predictions, times, kv_bytes = [], [], 0
    for seed in range(seeds):
        for number, batch in enumerate(data.batches):
            check_stop()
            images = np.full_like(batch["images"], 128) if control == "blank" else batch["images"]
            inputs = question_inputs({**batch, "images": images}, variant)
            lengths = inputs.lengths.reshape(batch["lengths"].shape)
            answer = functools.partial(
                generate,
                variant,
                params,
                inputs,
                new_tokens=config.new_tokens,
                eos_id=data.tokenizer.eos_ids,
                rng=jax.random.fold_in(jax.random.key(seed), number),
            )
            out = answer()
            times.append(out.seconds)
            kv_bytes = out.kv_bytes // max(lengths.size, 1)
            first = number * len(images)
            for b, q in zip(*np.nonzero(lengths), strict=True):
                text = data.tokenizer.answer(out.tokens[b, q]).strip()
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
                        "correct": is_right(text, reference),
                        **({"seed": seed} if seeds > 1 else {}),
                    }
                )
                if (first + b, q) in cells and seed == 0:
                    row = b * lengths.shape[1] + q
                    asked, sources = inputs.row(row), [whole(s[row]) for s in out.sources]
                    cells[first + b, q].append(
                        _cell(variant, params, asked, sources, label=label, text=text)
                    )
    if len(times) == 1:
        times.append(answer().seconds)  # The only batch has compiled: once more, for the clock.
    counted = model_cost(
        variant,
        text_tokens=inputs.text.shape[-1],
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


def _cell(variant, params, asked, sources, *, label, text) -> Cell:
    """The token map of one question, and the heat map where the method has one."""
    ended, found = heat.where_ended(sources), heat.heat(variant, params, asked, sources)
    scores, meaning = found if found is not None else (None, "")
    columns = variant.slot_grid[1]
    grid = (ended.size // columns, columns)
    return Cell(*label, ended, text, grid=grid, scores=scores, meaning=meaning)


def _example(data: EvalSet, place: tuple[int, int], cells: list[Cell]) -> Example:
    row, slot = place
    size = len(data.batches[0]["images"])
    batch = data.batches[row // size]
    images = batch["images"][row % size]
    return Example(
        image=images.reshape(-1, *images.shape[2:]),  # Below each other, as their patches are.
        question=data.prompts[row][slot],
        answer=data.answers[row][slot],
        cells=cells,
        task=data.tasks[batch["task"][row % size, slot]],
        record=int(batch["index"][row % size]),
    )
