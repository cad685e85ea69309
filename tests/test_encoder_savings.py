"""experiments/encoder_savings: rows fit the model; the table says who beats a smaller picture."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_vlm.cli import config_file as configs
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.train import loop

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "encoder_savings"


@pytest.fixture(scope="module")
def parts():
    """(savings_methods, savings_table) as the script has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield [importlib.import_module(f"savings_{name}") for name in ("methods", "table")]


def test_all_rows_fit_the_model(parts):
    methods, _ = parts
    model = loop.make_model(configs.load(str(FOLDER / "config.py")), vocab_size=119)
    encoder = model.make_encoder()
    assert encoder.depth >= 6 and encoder.grid == (16, 16) and model.slot_grid == (8, 8)
    costs = {}
    for row in methods.ROWS:
        for line in (row.evaluated()[-1], row.taught()[-1]):
            cost = model_cost(model.with_compressor(**line), text_tokens=1)
        costs[row.label] = cost.visual_tokens, cost.flops["encoder"] + cost.flops["compressor"]
    assert len(costs) == len(methods.ROWS)
    assert costs["none"][0] == costs["pixelprune_0.0"][0] == methods.TOKENS
    for score in methods.SCORES:
        for keep in (0.5, 0.25):
            tokens, flops = costs[f"cut_{score}_{keep}"]
            assert tokens == 64 * keep and flops < costs["none"][1]
    assert {t for t, _ in costs.values()} >= set(methods.SMALLER)


def test_draws_that_are_learned_are_not_those_that_are_evaluated(parts):
    methods, _ = parts
    (row,) = methods.rows("cut_random_0.5")
    seeds = [{line["seed"] for line in lines} for lines in (row.evaluated(), row.taught())]
    assert len(seeds[0]) == 10 and not seeds[0] & seeds[1]
    with pytest.raises(SystemExit, match="cut_randm"):
        methods.rows("none,cut_randm")


def answers(method, kind, right, seed=0):
    """A result of one question about each of 100 pictures, of which so many are right."""
    return {
        "method": method,
        "kind": kind,
        "seed": seed,
        "quick": False,
        "draws": 1,
        "accuracy": {"needle": {"accuracy": right / 100}},
        "images": list(range(100)),
        "right": "".join(str(int(index < right)) for index in range(100)),
    }


def test_who_beats_a_smaller_picture(parts):
    _, table = parts
    cost = dict(flops=1e6, quartiles=[0.9, 1.1])
    costs = {
        "none": cost | dict(tokens=64, ratio=1.0),
        "downsample_36": cost | dict(tokens=36, ratio=0.5),
        "downsample_16": cost | dict(tokens=16, ratio=0.2),
        "better": cost | dict(tokens=16, ratio=0.5),
        "slow": cost | dict(tokens=16, ratio=0.99),
    }
    right = {"none": 95, "downsample_36": 50, "downsample_16": 20, "better": 80, "slow": 80}
    kinds = {"none": "whole", "better": "encoder", "slow": "behind"}
    results = {"free": {}, "tuned": {}, "scratch": {}}
    for name, count in right.items():
        kind = kinds.get(name, "picture")
        results["free"][name] = [answers(name, kind, count, seed) for seed in (0, 1)]
    known = list(costs)
    assert table.rivals("better", costs, known) == dict(
        budget="downsample_16", time="downsample_36"
    )
    # As fast as the whole picture within what counts as no slower.
    assert table.rivals("slow", costs, known)["time"] == "none"
    assert table.rivals("downsample_36", costs, known)["budget"] == "none"
    page = table.markdown(results, {"rows": costs, "turns": 3})
    assert "| `better` | 16 | 80.0 | 1 | 0.50 (0.90-1.10) | 2 | +60.0 (" in page
    assert "at equal time** (1 of 2): `slow`." in page
    # Fine-tuned, it meets the better of a picture's two trainings.
    results["tuned"] = results["free"]
    results["scratch"]["downsample_36"] = [answers("downsample_36", "picture", 85)]
    page = table.markdown(results, {"rows": costs, "turns": 3})
    assert "at equal time** (1 of 2): `slow`." in page
    assert "at equal time** (2 of 2): `better`, `slow`." in page


def test_results_of_other_questions_are_refused(parts, tmp_path):
    _, table = parts
    asked = [[index, 0, "needle"] for index in range(100)]
    known = table.keep_questions(tmp_path, asked)
    path = tmp_path / "seed0" / "free" / "none.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(answers("none", "whole", 5) | {"questions": known, "mode": "free"}))
    (found,) = table.gathered(tmp_path)["free"]["none"]
    assert found["images"] == list(range(100))
    asked[0][0] = 7
    assert table.keep_questions(tmp_path, asked) != known
    (tmp_path / table.QUESTIONS).write_text(json.dumps(asked))
    with pytest.raises(SystemExit, match="other questions"):
        table.gathered(tmp_path)


@pytest.mark.slow
def test_the_whole_script_in_a_few_steps(tmp_path, data_dir):
    runs = tmp_path / "runs"
    words = [sys.executable, "experiments/encoder_savings/run.py", "--quick", f"--runs={runs}"]
    words += ["--methods=none,downsample_16,cut_attention_0.25,pixelprune_1.0"]
    words += [f"--set=data.dir={data_dir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for again in (False, True):
        options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        done = subprocess.run(words, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        # What has results is not done again.
        assert ("seed 0, tuned   cut_attention_0.25" in done.stdout) is not again
    page = (runs / "results" / "table.md").read_text()
    assert "these numbers mean nothing" in page and page.count("| `cut_attention_0.25` | 16 |") == 2
    found = json.loads((runs / "results/seed0/free/none.json").read_text())
    asked = json.loads((runs / "results/questions.json").read_text())
    assert len(found["right"]) == len(asked) == 32 * 8
