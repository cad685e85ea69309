"""Published models on benchmarks from files: budgets side by side, under one protocol."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from efficient_vlm.errors import UserError, short_path, unknown
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.benchmark_file import Benchmark, check_metric, options_of
from efficient_vlm.evaluation.file_answers import COUNTED, TIMED, Asked, answer, ask, cost
from efficient_vlm.evaluation.protocol import write_jsonl
from efficient_vlm.evaluation.settings import EvalConfig, labels_of, settings_of
from efficient_vlm.evaluation.stats import accuracy_interval, paired_predictions
from efficient_vlm.files import write_atomic
from efficient_vlm.inference.pretrained import Pretrained

CONTROLS = ("blank",)
PROTOCOL = (
    "Greedy generation of at most {new} tokens; white space around answers is taken off. Metric "
    "{metric}: {sentence} ({source}). 95 % intervals and differences are clustered by image. "
    "FLOPs and milliseconds are for one question and its pictures: FLOPs counted for up to "
    "{counted} questions spread over the file, milliseconds medians over a second run of up to "
    "{timed} batches of {batch} questions on {device}."
)


def evaluate_file(
    vlm: Pretrained,
    benchmark: Benchmark,
    metric: str,
    *,
    methods: Sequence[Mapping[str, Any]] = (),
    control: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    prompt_suffix: str = "",
    seeds: int = 3,
    by_category: bool = False,
    workdir: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Answers the questions of a file with every method at every budget, and scores them.

    All visual tokens ("none") come first, and every method is compared with them; `downsample`
    among the methods is the baseline of smaller pictures at equal tokens, for families that it
    works with.

    Args:
      vlm: from `from_pretrained`.
      benchmark: from `read_benchmark`.
      metric: name in `metrics.METRICS`.
      methods: {"name", "budgets", options}, see `settings.EvalConfig.methods`.
      control: "blank" shows grey pictures: what then is right needs no picture.
      max_new_tokens: the most tokens of an answer.
      batch_size: questions at once.
      prompt_suffix: behind every question, on a line of its own, such as "Answer the question using
        a single word or phrase."
      seeds: draws of a random compressor, pooled.
      by_category: whether each category of questions gets rows of its own, beside those of all.
      workdir: where results.json and predictions go; None for nowhere.
      say: receives lines for the user.
      check_stop: called between batches; may raise.

    Returns:
      As results.json of a run: {"eval": rows of task, n, accuracy (the mean score), ci95, and
      "difference" to all tokens; "cost": rows; "protocol": text}, and "summary": what the metric
      makes of the scores of each method, "benchmark": what was read of the file, "metric".

    Raises:
      UserError: a metric that the file cannot serve, an unknown method, option or control, a budget
        that the model cannot reach, or a model without pictures.
    """
    if control is not None and control not in CONTROLS:
        raise unknown("control", control, CONTROLS)
    known = metrics.find(metric)
    check_metric(metric, benchmark)
    config = EvalConfig(batch_size=batch_size, new_tokens=max_new_tokens, seeds=seeds)
    variants = _variants(vlm, methods, config)
    asked = ask(benchmark, prompt_suffix, control)
    folder = None if workdir is None else Path(workdir)
    results: dict[str, Any] = {"eval": [], "cost": [], "summary": []}
    baseline: list[dict[str, Any]] = []
    for (name, budget), variant in variants:
        predictions, outputs = answer(variant, asked, config, check_stop)
        _score(metric, asked, predictions)
        setting = {"compressor": name, "budget": budget}
        predictions = [{**setting, **row, "task": metric} for row in predictions]
        row = _evaluated(predictions, metric)
        if baseline:
            row["difference"] = _difference(predictions, baseline)
        baseline = baseline or predictions
        results["eval"].append({**setting, **row})
        if by_category:
            results["eval"] += [{**setting, **each} for each in _of_categories(predictions)]
        results["cost"].append({**setting, **cost(variant, asked, config, outputs)})
        results["summary"].append({**setting, **metrics.summary(metric, predictions)})
        if folder is not None:
            stem = f"{name}-{budget}".replace(" ", "_") + (f"-{control}" if control else "")
            write_jsonl(folder / "predictions" / f"{stem}.jsonl", list(map(_stored, predictions)))
        say(f"  {f'{name} at {budget}':<22}{metric} {row['accuracy']:.3f}")
    results["protocol"] = PROTOCOL.format(
        new=max_new_tokens,
        metric=metric,
        sentence=known.sentence,
        source=known.source,
        counted=COUNTED,
        timed=TIMED,
        batch=batch_size,
        device=jax.devices()[0].device_kind,
    )
    results["metric"] = metric
    results["benchmark"] = _facts(benchmark, prompt_suffix, control)
    if folder is not None:
        stem = f"results-{control}" if control else "results"
        path = folder / f"{stem}.json"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())
    return results


def rescore(path: str | os.PathLike, metric: str) -> dict[str, Any]:
    """Scores stored predictions again, with any metric: no model runs.

    Args:
      path: of a file in `predictions/` that `evaluate_file` wrote.
      metric: name in `metrics.METRICS`; those that need masks are not served, which are not stored.

    Returns:
      {"n", "accuracy", "ci95", "summary"}.

    Raises:
      UserError: no such file, or one of another kind.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        given = [(row["prediction"], row["references"]) for row in rows]
        options = [{name: row[name] for name in _columns_of(metric)} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"rescore: {short_path(path)} holds no predictions ({type(error).__name__}: {error})",
            allowed="a file of predictions/ that `efficient-vlm eval --benchmark` wrote",
        ) from None
    if not rows:
        raise UserError(f"rescore: {short_path(path)} is empty")
    _measured(metric, rows, given, options)
    return {**_evaluated(rows, metric), "summary": metrics.summary(metric, rows)}


# ---- methods ----


def _variants(
    vlm: Pretrained, methods: Sequence[Mapping[str, Any]], config: EvalConfig
) -> list[tuple[tuple[str, int], Pretrained]]:
    """(label, model) of every method at every budget, all tokens first."""
    if vlm.model.encoder is None:
        raise UserError(f"model: {vlm.family.name} is a language model without pictures")
    rest = [method for method in methods if method.get("name") != "none"]
    config = dataclasses.replace(config, methods=[{"name": "none"}, *rest])
    models = settings_of(config, vlm.model)
    labels = labels_of(models)
    return [
        (label, vlm.with_compressor(**model.compressor))
        for label, model in zip(labels, models, strict=True)
    ]


# ---- scores --------------------------------------------------------------------------------------


def _columns_of(metric: str) -> list[str]:
    """What a metric reads of stored rows; masks are not stored."""
    return [n for n in metrics.find(metric).options if n in metrics.COLUMNS and n != "masks"]


def _score(metric: str, asked: Sequence[Asked], predictions: list[dict[str, Any]]) -> None:
    """Adds to each prediction what is known of its question, and its score."""
    rows = {(each.index, each.slot): each.row for each in asked}
    of = [rows[prediction["index"], prediction["slot"]] for prediction in predictions]
    for prediction, row in zip(predictions, of, strict=True):
        prediction |= {"references": list(row.references), "options": list(row.options)}
        prediction |= {"category": row.category, "group": row.group}
        prediction["answer"] = str(row.references[0]) if row.references else ""
    given = [(p["prediction"], p["references"]) for p in predictions]
    _measured(metric, predictions, given, [options_of(metric, row) for row in of])


def _measured(
    metric: str,
    rows: list[dict[str, Any]],
    given: Sequence[tuple[str, Sequence[Any]]],
    options: Sequence[Mapping[str, Any]],
) -> None:
    """Writes "parsed", "score", "more" and "correct" into rows."""
    if metrics.find(metric).corpus is None:
        pairs = zip(given, options, strict=True)
        found = [metrics.measure(metric, *each, **more) for each, more in pairs]
    else:
        every = metrics.scores(metric, [p for p, _ in given], [r for _, r in given])
        found = [metrics.Measured(score) for score in every]
    for row, measured in zip(rows, found, strict=True):
        row |= {"parsed": measured.parsed, "score": measured.score, "more": dict(measured.more)}
        row["correct"] = measured.score >= 1


def _evaluated(predictions: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    mean, low, high = accuracy_interval(
        [p["score"] for p in predictions], [p["index"] for p in predictions]
    )
    interval = [round(low, 4), round(high, 4)]
    return {"task": metric, "n": len(predictions), "accuracy": round(mean, 4), "ci95": interval}


def _of_categories(predictions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each category, where there are several."""
    names = sorted({str(row["category"]) for row in predictions})
    for name in names if len(names) > 1 else ():
        yield _evaluated([row for row in predictions if str(row["category"]) == name], name)


def _difference(predictions: Sequence[Mapping], baseline: Sequence[Mapping]) -> dict[str, Any]:
    """To all tokens, on the same questions."""
    found, _ = paired_predictions(predictions, baseline)
    interval = [round(found.lo, 4), round(found.hi, 4)]
    return {"mean": round(found.mean, 4), "ci95": interval, "p": round(found.p, 5)}


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction as its file holds it: "more" only where there is some."""
    return {key: value for key, value in row.items() if key != "more" or value}


def _facts(benchmark: Benchmark, suffix: str, control: str | None) -> dict[str, Any]:
    facts = {"file": benchmark.path.name, "sha256": benchmark.sha256, "rows": benchmark.total}
    facts |= {"questions": len(benchmark.rows), "skipped": dict(benchmark.skipped)}
    facts |= {"columns": dict(benchmark.columns), "prompt_suffix": suffix, "control": control}
    return facts
