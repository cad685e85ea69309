"""A published model on a benchmark from a file, against the model asked directly."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.benchmark_file import read_benchmark
from efficient_vlm.evaluation.metrics import METRICS, Metric
from efficient_vlm.evaluation.metrics.base import Measured
from efficient_vlm.evaluation.on_file import evaluate_file, rescore
from efficient_vlm.evaluation.stats import accuracy_interval
from efficient_vlm.inference.load import from_pretrained
from efficient_vlm.report import records
from efficient_vlm.report.report import write_report

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
OPTIONS = dict(max_new_tokens=3, batch_size=4, seeds=2, prompt_suffix="Short.")


def vowels(prediction, references):
    """Something that nonsense can have: the share of its bytes that are odd."""
    del references
    data = prediction.encode()
    return Measured(sum(byte % 2 for byte in data) / max(1, len(data)), len(data))


@pytest.fixture(scope="module")
def odd():
    """A metric that random weights do not all fail."""
    METRICS["odd"] = Metric("The share of odd bytes", "this test", vowels)
    yield "odd"
    del METRICS["odd"]


@pytest.fixture(scope="module")
def vlm():
    return from_pretrained(SAMPLES / "smolvlm", split=False)


@pytest.fixture(scope="module")
def benchmark():
    read = read_benchmark(SAMPLES / "llava" / "shapes.jsonl", limit=6)
    # Of different lengths, so that the order in which they run is another.
    rows = [
        dataclasses.replace(row, question=row.question + " Look." * (3 - k % 4))
        for k, row in enumerate(read.rows)
    ]
    return dataclasses.replace(read, rows=tuple(rows))


@pytest.fixture(scope="module")
def done(vlm, benchmark, odd, tmp_path_factory):
    """(results, workdir) of all tokens and two methods at one token."""
    workdir = tmp_path_factory.mktemp("runs") / "file"
    methods = [dict(name="random", budgets=[1]), dict(name="downsample", budgets=[1])]
    lines = []
    results = evaluate_file(
        vlm, benchmark, odd, methods=methods, workdir=workdir, say=lines.append, **OPTIONS
    )
    assert len(lines) == 3
    return results, workdir


def stored(workdir, name):
    lines = (workdir / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_answers_are_those_of_the_model_asked_directly(done, vlm, benchmark):
    rows = {row["id"]: row for row in stored(done[1], "none-4")}
    assert set(rows) == {row.id for row in benchmark.rows}
    for asked in benchmark.rows[:2]:
        answer = vlm.generate(f"{asked.question}\nShort.", list(asked.images), max_new_tokens=3)
        found = rows[asked.id]
        assert found["prediction"] == answer.strip() and "seed" not in found
        assert found["references"] == list(asked.references)
        assert found["score"] == vowels(answer.strip(), ()).score
        assert found["category"] == asked.category and found["group"] == asked.group


def test_scores_and_intervals_are_those_of_the_stored_answers(done, benchmark):
    results, workdir = done
    expected = [("none", 4, 6), ("random", 1, 12), ("downsample", 1, 6)]
    assert [(r["compressor"], r["budget"], r["n"]) for r in results["eval"]] == expected
    groups = {row.id: row.group for row in benchmark.rows}
    means = {}
    for row, summary in zip(results["eval"], results["summary"], strict=True):
        name = f"{row['compressor']}-{row['budget']}"
        answers = stored(workdir, name)
        scores = [vowels(a["prediction"], ()).score for a in answers]
        mean, low, high = accuracy_interval(scores, [groups[a["id"]] for a in answers])
        assert row["accuracy"] == round(mean, 4) and row["ci95"] == [round(low, 4), round(high, 4)]
        assert summary["score"] == pytest.approx(mean) and set(summary["by_category"]) == {
            *("shape", "colour")
        }
        means[name] = mean
        if name != "none-4":
            assert row["difference"]["mean"] == pytest.approx(mean - means["none-4"], abs=1e-4)
    assert {a["seed"] for a in stored(workdir, "random-1")} == {0, 1}


def test_costs(done):
    full, random, smaller = done[0]["cost"]
    assert full["visual_tokens"] == 4 and random["visual_tokens"] == smaller["visual_tokens"] == 1
    assert full["flops"]["encoder"] == random["flops"]["encoder"] > smaller["flops"]["encoder"]
    assert full["kv_bytes"] > random["kv_bytes"] == smaller["kv_bytes"]
    assert all(value > 0 for value in full["ms"].values())


def test_what_was_read_is_stored(done, benchmark):
    results, workdir = done
    assert json.loads((workdir / "results.json").read_text()) == results
    assert results["benchmark"]["sha256"] == benchmark.sha256
    assert results["benchmark"]["columns"]["references"] == "answers"
    assert "The share of odd bytes" in results["protocol"]


def test_the_report_draws_it(done):
    page = write_report(done[1]).read_text()
    run = records.read_run(done[1])
    assert not run.problems and len(run.predictions) == 6 + 12 + 6
    assert records.tasks_of(run.results) == ["odd"]
    assert "downsample" in page and "clustered by image" in page


def test_answers_are_scored_again(done, odd):
    results, workdir = done
    path = workdir / "predictions" / "none-4.jsonl"
    again = rescore(path, odd)
    assert again.pop("summary")["score"] == pytest.approx(again["accuracy"], abs=1e-4)
    assert again == {k: results["eval"][0][k] for k in ("task", "n", "accuracy", "ci95")}
    answers = [(row["prediction"], row["references"]) for row in stored(workdir, "none-4")]
    expected = np.mean([metrics.score("anls", *answer) for answer in answers])
    assert rescore(path, "anls")["accuracy"] == round(expected, 4)
    with pytest.raises(UserError, match="one of yes and no"):
        rescore(path, "yes_no")
    with pytest.raises(UserError, match="holds no predictions"):
        rescore(workdir / "results.json", odd)


def test_blank_pictures(vlm, benchmark, odd, tmp_path):
    """The same question about any picture of one size then has one answer."""
    rows = [dataclasses.replace(row, question="What?") for row in benchmark.rows[:4]]
    alike = dataclasses.replace(benchmark, rows=tuple(rows))
    options = dict(control="blank", workdir=tmp_path, say=lambda line: None)
    results = evaluate_file(vlm, alike, odd, **options, **OPTIONS)
    answers = stored(tmp_path, "none-4-blank")
    assert len({row["prediction"] for row in answers}) == 1
    assert results["benchmark"]["control"] == "blank"
    assert (tmp_path / "results-blank.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(control="blnk"), ["did you mean 'blank'"]),
        (dict(methods=[dict(name="divprun", budgets=[1])]), ["did you mean 'divprune'"]),
        (dict(methods=[dict(name="divprune", budgets=[9])]), ["9"]),
        (dict(methods=[dict(name="resampler", budgets=[1])]), ["weights of its own"]),
        (dict(batch_size=0), ["batch_size"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(vlm, benchmark, odd, options, words):
    with pytest.raises(UserError) as error:
        evaluate_file(vlm, benchmark, odd, **{**OPTIONS, **options})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_metric_that_does_not_fit(vlm, benchmark):
    with pytest.raises(UserError, match="no column of masks"):
        evaluate_file(vlm, benchmark, "points_lmms_eval", **OPTIONS)
