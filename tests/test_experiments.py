"""The scripts in experiments/, on a tiny run, and the files that they wrote."""

import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from efficient_vlm.cli import config_file as configs
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.errors import UserError
from efficient_vlm.train import loop

ROOT = Path(__file__).resolve().parents[1]
# Modules of published methods that need no training; the others of the room are simple pools.
PUBLISHED = re.compile(r"\.between\.(?!pooling|selectors|visionselector)|\.tome$")
QUICKSTART = ROOT / "configs" / "quickstart.py"


def imported(folder):
    """experiments/`folder`/run.py as a module, as `python experiments/folder/run.py` has it."""
    name, folder = f"experiments_{folder}_run", ROOT / "experiments" / folder
    spec = importlib.util.spec_from_file_location(name, folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def script():
    """experiments/training_free/run.py."""
    yield from imported("training_free")


@pytest.fixture(scope="module")
def quickstart():
    """experiments/quickstart/run.py."""
    yield from imported("quickstart")


# ---- the quickstart over seeds -------------------------------------------------------------------


def test_every_seed_of_the_quickstart_keeps_what_is_promised(quickstart):
    results = json.loads(quickstart.RESULTS.read_text())
    assert [seed["seed"] for seed in results["seeds"]] == list(range(10))
    assert len({seed["train"]["params_sha256"] for seed in results["seeds"]}) == 10
    for seed in results["seeds"]:
        assert quickstart.below(seed["eval"]) == [], seed["seed"]
        assert seed["train"]["steps"] == configs.load(str(QUICKSTART)).train.steps
    low = [{**row, "accuracy": 0.5} for row in results["seeds"][0]["eval"]]
    assert len(quickstart.below(low)) == len(quickstart.PROMISED)


def test_the_readme_shows_the_table_of_the_seeds(quickstart):
    table = quickstart.markdown(json.loads(quickstart.RESULTS.read_text()))
    assert table in (ROOT / "README.md").read_text()
    cells = table.splitlines()[2].split("|")
    needle = [
        row["accuracy"]
        for seed in json.loads(quickstart.RESULTS.read_text())["seeds"]
        for row in seed["eval"]
        if (row["compressor"], row["budget"], row["task"]) == ("none", 64, "needle")
    ]
    middle, lowest, highest = (100 * f(needle) for f in (statistics.median, min, max))
    assert cells[3].strip() == f"{middle:.1f} ({lowest:.1f}-{highest:.1f})"


@pytest.mark.parametrize(("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("0,5", [0, 5])])
def test_seeds_as_text(quickstart, text, seeds):
    assert quickstart.parse_seeds(text) == seeds
    with pytest.raises(SystemExit, match="0-9"):
        quickstart.parse_seeds(f"{text},x")


# ---- what is evaluated ---------------------------------------------------------------------------


def test_every_training_free_method_is_there(script):
    chosen, left_out = script.settings(64, 1, 2, (16, 4), trained=True)
    names = {setting.name for setting in chosen}
    free = {
        name
        for name, method in METHODS.items()
        if method.where == "decoder" or PUBLISHED.search(method.__module__)
    }
    assert free == {s.name for s in chosen if s.role == "method"} | set(left_out)
    assert set(left_out) == {"feather"}
    assert names >= {"none", "random", "stride", "pool", "downsample", "text_topk"}
    assert names | set(left_out) == set(script.SELECTABLE)
    assert not script.settings(64, 1, 3, (16, 4), trained=False)[1]


def test_all_settings_fit_the_quickstart_and_cost_what_their_block_says(script):
    config = configs.load(str(ROOT / "configs" / "quickstart.py"))
    model = loop.make_model(config, vocab_size=119)
    chosen, _ = script.settings(64, 1, 2, (16, 4), trained=True)
    blocks = {}
    for setting in chosen:
        variant = model.with_compressor(setting.name, **setting.options)
        cost = model_cost(variant, text_tokens=8)
        blocks.setdefault(cost.mean_visual_tokens, set()).add(setting.name)
        if variant.make_compressor().where == "decoder":
            assert cost.visual_tokens == 64 and cost.left in (16, 4, 0)
    assert set(blocks) == {64, 40, 34, 32, 16, 4}
    for tokens, names in blocks.items():
        assert tokens == 64 or names >= {"random", "stride", "pool"}
    assert (
        blocks[40]
        == blocks[34]
        == {
            *("random", "stride", "pool"),
            *("fastv", "pyramiddrop", "sparsevlm", "dart", "fitprune", "v2drop"),
        }
    )
    assert blocks[32] == {"random", "stride", "pool", "tome", "vtw"}


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(script, finished_run):
    said = []
    chosen = ("none", "random", "fastervlm")
    options = dict(images=16, methods=chosen, budgets=(8,), seeds=2, say=said.append)
    before = sorted(finished_run[0].rglob("*"))
    found = script.run(finished_run[0], **options)
    assert sorted(finished_run[0].rglob("*")) == before
    assert len(said) == len(found["rows"])
    return json.loads(json.dumps(found))


def test_rows_are_complete(script, results):
    rows = results["rows"]
    assert [(r["method"], r["options"]["budget"], r["position_policy"]) for r in rows] == [
        ("none", 16, "retain"),
        ("random", 8, "retain"),
        ("random", 8, "reindex"),
        ("fastervlm", 8, "reindex"),
    ]
    for row in rows:
        budget, seeds = row["options"]["budget"], 2 if row["method"] == "random" else 1
        assert row["entering"] == row["leaving"] == row["mean_processed"] == budget
        assert row["seeds"] == seeds
        assert set(row["accuracy"]) == {"needle", "global"} == set(results["tasks"])
        assert sum(score["n"] for score in row["accuracy"].values()) == seeds * 16 * 2
        for score in row["accuracy"].values():
            assert 0 <= score["ci95"][0] <= score["accuracy"] <= score["ci95"][1] <= 1
    work = [sum(row["flops"].values()) for row in rows]
    assert work[0] > work[1] == work[2] < work[3]  # fastervlm looks at the encoder's attention.
    assert results["images"] == 16 and "clustered by image" in results["protocol"]


def test_the_numbers_are_those_of_the_evaluation(results, finished_run):
    """`none` answers as `efficient-vlm eval` says for the same images."""
    from efficient_vlm.evaluation.run import evaluate_run

    methods = [dict(name="none", budgets=[16])]
    quiet = dict(say=lambda line: None)
    found = evaluate_run(finished_run[0], methods=methods, images=16, **quiet)
    for row in found["eval"]:
        score = results["rows"][0]["accuracy"][row["task"]]
        assert [score[key] for key in ("n", "accuracy", "ci95")] == [
            row[key] for key in ("n", "accuracy", "ci95")
        ]


def test_the_table_holds_the_numbers(script, results):
    text = script.table.markdown(results)
    assert re.findall(r"^## (\d+) visual", text, re.MULTILINE) == ["16", "8"]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    for line, row in zip(lines, results["rows"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0].startswith(f"`{row['method']}`")
        assert cells[1:3] == [str(row["entering"]), row["position_policy"]]
        for cell, task in zip(cells[3:5], results["tasks"], strict=True):
            assert float(cell.split()[0]) == pytest.approx(
                100 * row["accuracy"][task]["accuracy"], abs=0.051
            )
        assert float(cells[5].split()[0]) == pytest.approx(
            sum(row["flops"].values()) / 1e6, abs=0.051
        )
    assert "(100 %)" in lines[0] and "(100 %)" not in lines[1]


def test_marks_need_intervals_apart(script):
    def score(low, high):
        return {"accuracy": {"t": {"accuracy": (low + high) / 2, "ci95": [low, high]}}}

    cell, random = script.table.score_cell, [score(0.4, 0.6)]
    limits = [(0.7, 0.8), (0.5, 0.9), (0.0, 0.3)]
    assert [cell(score(*of), "t", random)[-1] for of in limits] == ["▲", ")", "▼"]
    assert cell(score(0.7, 0.8), "u", random) == "–"


# ---- the command ---------------------------------------------------------------------------------


def test_mistakes_are_told_without_a_traceback(script, tmp_path, capsys, finished_run):
    assert script.main([f"--workdir={tmp_path}"]) == 2
    assert "no run there" in capsys.readouterr().err
    assert script.main([f"--workdir={finished_run[0]}", "--methods=divprun"]) == 2
    assert "did you mean 'divprune'" in capsys.readouterr().err
    with pytest.raises(UserError):
        script.run(tmp_path, methods=["divprun"])


def test_methods_of_ones_own_are_evaluated_too(script, finished_run, tmp_path):
    """At each budget, by name or with all others."""
    known, out = dict(METHODS), tmp_path / "results.json"
    words = [f"--workdir={finished_run[0]}", "--images=4", f"--out={out}", "--methods=contrast"]
    try:
        assert script.main([*words, f"--import={ROOT / 'docs' / 'my_method.py'}"]) == 0
    finally:
        METHODS.clear()
        METHODS.update(known)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["role"], row["leaving"]) for row in rows] == [
        ("contrast", "method", 16),
        ("contrast", "method", 4),
    ]


def test_a_part_does_not_replace_the_whole(script, results, tmp_path, monkeypatch, capsys):
    whole = {name: tmp_path / name for name in ("RESULTS", "TABLE")}
    for name, path in whole.items():
        monkeypatch.setattr(script, name, path)
    monkeypatch.setattr(script, "run", lambda *arguments, **options: dict(results))
    assert script.main(["--workdir=x", "--methods=none"]) == 0
    said = capsys.readouterr().out
    assert "| `none`" in said and "None" not in said
    assert said.endswith("s. A part: nothing is written without --out and --table.\n")
    assert not any(path.exists() for path in whole.values())
    assert script.main(["--workdir=x", "--methods=none", f"--out={tmp_path / 'part.json'}"]) == 0
    assert capsys.readouterr().out.endswith(f"s. Results: {tmp_path / 'part.json'}\n")
    assert script.main(["--workdir=x"]) == 0
    assert f"Results: {whole['RESULTS']}  Table: {whole['TABLE']}" in capsys.readouterr().out
    assert json.loads(whole["RESULTS"].read_text())["rows"] == results["rows"]
    assert whole["TABLE"].read_text() == script.table.markdown(results)


# ---- what is committed ---------------------------------------------------------------------------


def test_the_committed_table_is_that_of_the_committed_results(script):
    results = json.loads(script.RESULTS.read_text())
    assert script.TABLE.read_text() == script.table.markdown(results)
    chosen, left_out = script.settings(64, 1, 2, script.BUDGETS, trained=True)
    listed = [(row["method"], row["options"]) for row in results["rows"]]
    for setting in chosen:
        assert (setting.name, json.loads(json.dumps(setting.options))) in listed
    assert len(listed) == len(chosen) and results["left_out"] == left_out
    assert results["images"] == 256
    assert {row["seeds"] for row in results["rows"] if row["method"] == "random"} == {10}
