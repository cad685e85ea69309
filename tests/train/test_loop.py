"""The loop: what a run leaves behind, and that stopping, resuming and damage do not change it."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import make_tiny_config

import efficient_vlm as evlm
from efficient_vlm.checkpoints.leaves import state_sha256
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.cli import run as commands
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.run import evaluate_run
from efficient_vlm.families.imported import import_model
from efficient_vlm.fields import to_dict
from efficient_vlm.files import write_index
from efficient_vlm.train import loop
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.guards import TrainingDiverged, check_workdir_config
from efficient_vlm.train.metrics import read_metrics
from efficient_vlm.train.parameters import load_params
from efficient_vlm.train.trained import restore

TRAIN_METRICS = {
    *("step", "split", "time", "loss", "accuracy", "grad_norm", "lr", "images_per_second"),
    *("step_seconds", "data_wait_fraction", "budget", "load_balance", "router_z", "expert_load"),
    "skipped",
}


def run(config, workdir, stop=None):
    """(trained, lines said): the loop alone, without evaluation."""
    lines = []
    workdir.mkdir(exist_ok=True)
    stop = stop or SimpleNamespace(requested=False, exit_code=None)
    return loop.train(config, workdir, stop=stop, say=lines.append), lines


def stop_in(monkeypatch, step, exit_code=143):
    """A StopSignal's double, for which the signal comes while `step` is under way."""
    stop, draw = SimpleNamespace(requested=False, exit_code=None), loop.draw_arm

    def watching(arms, seed, number, steps):
        if number == step:
            stop.requested, stop.exit_code = True, exit_code
        return draw(arms, seed, number, steps)

    monkeypatch.setattr(loop, "draw_arm", watching)
    return stop


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data_dir):
    """(workdir, trained) of six steps without interruption."""
    workdir = tmp_path_factory.mktemp("loop") / "reference"
    return workdir, run(make_tiny_config(data_dir), workdir)[0]


def steps_in(workdir):
    return [row["step"] for row in read_metrics(workdir)]


def without_clock(workdir):
    """Metrics that must not depend on how fast the machine was."""
    clock = {"time", "images_per_second", "step_seconds", "data_wait_fraction", "goodput"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(workdir)]


def flip_a_byte(folder):
    """Damages the largest file of a checkpoint: its arrays."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


# ---- what a run leaves behind ------------------------------------------------------------------


def test_a_run_leaves_the_files_that_are_promised(finished_run):
    workdir, _ = finished_run
    names = {path.name for path in workdir.iterdir()}
    promised = {"checkpoints", "config.json", "metrics.jsonl", "results.json", "report.html"}
    assert promised | {"predictions"} <= names
    committed = {p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()}
    assert committed == {"50", "100", "150"}
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["train"]["steps"] == 150 and stored["data"]["tasks"] == ["needle", "global"]
    assert (workdir / "report.html").stat().st_size > 10_000


def test_results_have_the_promised_form(finished_run):
    workdir, returned = finished_run
    results = json.loads((workdir / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    train = results["train"]
    assert train["steps"] == 150 and train["seconds"] > 0 and train["params"] > 1000
    assert len(train["params_sha256"]) == 64 and int(train["params_sha256"], 16)
    assert train["compilations"] == {"none@16": 1, "random@4": 1}
    assert train["seeds"] == {"train": 0, "data": 0, "dataset": 0}
    assert train["skipped_steps"] == 0 and train["skipped_samples"] == {}
    pairs = [("none", 16), ("random", 4)]
    expected = [(*pair, task) for pair in pairs for task in ("needle", "global")]
    assert [(r["compressor"], r["budget"], r["task"]) for r in results["eval"]] == expected
    for row in results["eval"]:
        assert set(row) == {"compressor", "budget", "task", "n", "accuracy", "ci95"}
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1 and row["n"] > 0
    assert [(r["compressor"], r["budget"]) for r in results["cost"]] == pairs
    for row in results["cost"]:
        assert row["visual_tokens"] == row["budget"]
        assert set(row["flops"]) == {"encoder", "compressor", "decoder", "head"}
        assert set(row["ms"]) == {"encode", "compress", "prefill", "decode_per_token"}
        assert all(math.isfinite(value) and value >= 0 for value in row["ms"].values())
    full, few = results["cost"]
    assert full["kv_bytes"] > few["kv_bytes"] > 0
    assert full["flops"]["encoder"] == few["flops"]["encoder"]
    assert full["flops"]["decoder"] > few["flops"]["decoder"]


def test_metrics_have_the_promised_form(reference):
    workdir, trained = reference
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert set(row) >= TRAIN_METRICS and row["split"] == "train"
        assert np.shape(row["expert_load"]) == (1, 2)
        assert sum(row["expert_load"][0]) == pytest.approx(1, abs=1e-5)
        assert 0 <= row["data_wait_fraction"] <= 1 and row["step_seconds"] > 0
        per_second = row["images_per_second"] * row["step_seconds"]
        assert per_second == pytest.approx(8)  # The batch.
    # Warm-up over 2 steps to 0.01, then a cosine over the other 4.
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose([row["lr"] for row in rows], [0, 0.005, *cosine], atol=1e-8)
    arms = [(row["compressor"], row["budget"]) for row in rows]
    assert set(arms) == {("none", 16), ("random", 4)}
    assert trained.summary["compilations"] == {"none@16": 1, "random@4": 1}


def test_the_hash_is_that_of_the_newest_checkpoint(reference):
    workdir, trained = reference
    params = jax.tree.map(np.asarray, trained.params)
    stored = load_params(workdir, params)
    assert state_sha256(stored) == trained.summary["params_sha256"] == state_sha256(params)


# ---- stopping and resuming ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_run_resumes_bit_for_bit(reference, tiny_config, tmp_path, monkeypatch, step):
    """Stopped between checkpoints (3) and at one (4)."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(loop.Stopped) as stopped:
        run(tiny_config, workdir, stop_in(patch, step))
    assert (stopped.value.exit_code, stopped.value.step) == (143, step)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert max(checkpoints.committed()) == step
    assert steps_in(workdir) == list(range(1, step + 1))
    trained, lines = run(tiny_config, workdir)
    assert f"Resuming from step {step} of 6" in lines
    assert trained.summary["params_sha256"] == reference[1].summary["params_sha256"]
    assert without_clock(workdir) == without_clock(reference[0])


def test_lines_behind_the_checkpoint_are_written_again_not_twice(reference, tiny_config, tmp_path):
    """As after SIGKILL at step 5: metrics go further than the newest checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    index = workdir / "checkpoints" / "index.json"
    index.unlink()  # Rebuilt from the folders.
    trained, lines = run(tiny_config, workdir)
    assert "Resuming from step 4 of 6" in lines
    assert trained.summary["params_sha256"] == reference[1].summary["params_sha256"]
    assert without_clock(workdir) == without_clock(reference[0])


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    reference, tiny_config, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    flip_a_byte(workdir / "checkpoints" / "6")
    trained, lines = run(tiny_config, workdir)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "6 is damaged" in said and "falling back to step 4" in said
    assert "Resuming from step 4 of 6" in lines
    assert trained.summary["params_sha256"] == reference[1].summary["params_sha256"]
    assert without_clock(workdir) == without_clock(reference[0])


def test_a_finished_run_is_not_trained_again(reference, tiny_config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    trained, lines = run(tiny_config, workdir)
    assert any("already finished" in line for line in lines), lines
    assert trained.summary["compilations"] == {}  # No step has run.
    assert trained.summary["params_sha256"] == reference[1].summary["params_sha256"]
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    seconds = reference[1].summary["seconds"]
    assert trained.summary["seconds"] == pytest.approx(seconds, abs=1.0)


def test_another_config_is_refused_and_named(finished_run, tmp_path):
    from ml_collections import ConfigDict

    workdir = tmp_path / "run"
    shutil.copytree(finished_run[0], workdir)
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    config.train.optimizer.learning_rate = 0.5
    config.data.seed = 7
    with pytest.raises(UserError) as caught:
        commands.fit(config, workdir, say=lambda line: None)
    message = str(caught.value)
    assert "data.seed: absent in the workdir, 7 now" in message
    assert "train.optimizer.learning_rate: 0.01 in the workdir, 0.5 now" in message
    assert len(message.splitlines()) <= 3


def test_a_mistake_does_not_claim_the_workdir(tiny_config, tmp_path):
    """After a mistake that only the data show, the mended config is not refused as another one."""
    mended = tiny_config.copy_and_resolve_references()
    tiny_config.data.max_count = 9
    with pytest.raises(UserError, match="data.max_count"):
        commands.fit(tiny_config, tmp_path / "run", say=lambda line: None)
    for name in ("tokenizer.json", "base.json"):
        (tmp_path / "run" / name).write_text("of the config of before")
    assert check_workdir_config(tmp_path / "run", to_dict(mended))
    assert not list((tmp_path / "run").glob("[bt]*.json"))
    # A workdir that has saved a step keeps its config, whatever is asked of it later.
    ended = tmp_path / "ended"
    check_workdir_config(ended, {"seed": 1})
    (ended / "checkpoints").mkdir()
    write_index(ended / "checkpoints", {}, [], [])
    assert check_workdir_config(ended, {"seed": 2})
    write_index(ended / "checkpoints", {3: None}, [], [])  # Its folder was moved away.
    with pytest.raises(UserError, match="another config"):
        check_workdir_config(ended, {"seed": 3})
    shutil.rmtree(ended / "checkpoints")
    assert check_workdir_config(ended, {"seed": 4})
    (ended / "results.json").write_text("{}")
    with pytest.raises(UserError, match="another config"):
        check_workdir_config(ended, {"seed": 5})
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    mended.train.seed = 3
    with pytest.raises(UserError, match="another config"):
        commands.fit(mended, tmp_path / "run", say=lambda line: None)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["tint"] == 0.8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("ema", 2.0),
        ("ema", float("nan")),
        ("save_failures", 0),
        ("router_z", float("inf")),
        ("optimizer.learning_rate", -1.0),
        ("optimizer.warmup_steps", -1),
        ("optimizer.clip_norm", 0.0),
        ("optimizer.b2", 1.0),
    ],
)
def test_numbers_that_no_run_can_have(field, value, tiny_config, tmp_path):
    tiny_config.train.update(ema=0.9)
    *sections, name = field.split(".")
    section = tiny_config.train
    for each in sections:
        section = section[each]
    section[name] = value
    with pytest.raises(UserError, match=f"train.{field}: ") as caught:
        commands.fit(tiny_config, tmp_path / "run", say=lambda line: None)
    assert len(str(caught.value).splitlines()) <= 3 and not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(tiny_config, tmp_path, monkeypatch):
    """Told before anything is made; a run that was made elsewhere is evaluated all the same."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    tiny_config.train.tensorboard = True
    with pytest.raises(UserError, match="train.tensorboard=True"):
        commands.fit(tiny_config, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()
    assert TrainConfig(steps=1, tensorboard=True).tensorboard


def test_a_method_that_cannot_be_evaluated_is_told_before_training(tiny_config, tmp_path):
    tiny_config.eval.methods = [
        dict(name="none", budgets=[16]),
        dict(name="resampler", budgets=[4]),
    ]
    with pytest.raises(UserError, match="train.elastic") as caught:
        commands.fit(tiny_config, tmp_path / "run", say=lambda line: None)
    assert "resampler" in str(caught.value) and not (tmp_path / "run").exists()


# ---- options -----------------------------------------------------------------------------------


def test_a_dense_decoder_and_micro_batches_are_a_value_away(tiny_config, tmp_path):
    """That accumulated gradients are exact is shown in test_step.py."""
    tiny_config.train.update(elastic=[], accumulate=2, steps=2)
    tiny_config.model.decoder.moe = None
    trained, _ = run(tiny_config, tmp_path / "run")
    assert trained.summary["compilations"] == {"none@16": 1}
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    assert not {"expert_load", "load_balance", "router_z"} & rows[0].keys()
    assert not any("moe" in jax.tree_util.keystr(p) for p, _ in _leaves(trained.params))


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_start_from_another_run_and_average(reference, tiny_config, tmp_path):
    """One step from where the other run ended; what is evaluated is the average of both ends."""
    tiny_config.train.update(init_from=str(reference[0]), ema=0.5, steps=1, elastic=[])
    tiny_config.train.optimizer.learning_rate = 0.01
    workdir = tmp_path / "run"
    trained, lines = run(tiny_config, workdir)
    assert any(str(reference[0]) in line for line in lines)
    before = jax.tree.map(np.asarray, reference[1].params)
    after = load_params(workdir, before)
    digest = trained.summary["params_sha256"]
    assert state_sha256(after) == digest != reference[1].summary["params_sha256"]
    average = restore(tiny_config, workdir, trained.pipeline).params
    assert state_sha256(average) == state_sha256(trained.params) != digest
    moved = 0.0
    for old, new, mean in zip(*map(jax.tree.leaves, (before, after, average)), strict=True):
        np.testing.assert_allclose(mean, (old + new) / 2, atol=1e-6)
        # Adam's first step is the rate at most, and the decay is a hundredth of a hundredth.
        assert np.abs(new - old).max() < 0.0102
        moved = max(moved, float(np.abs(new - old).max()))
    assert moved > 0.009
    # A resumed run does not need the other one any more.
    again = tiny_config.copy_and_resolve_references()
    again.train.init_from = str(tmp_path / "gone")
    assert run(again, workdir)[0].summary["params_sha256"] == digest


def test_starting_from_nothing_or_from_another_shape_is_an_error(reference, tiny_config, tmp_path):
    tiny_config.train.init_from = str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent"):
        run(tiny_config, tmp_path / "a")
    tiny_config.train.init_from = str(reference[0])
    tiny_config.model.encoder.mlp_dim = 48
    with pytest.raises(UserError, match="vit") as caught:
        run(tiny_config, tmp_path / "b")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("kind", ["published", "imported"])
def test_published_models_are_no_runs(kind, tiny_config, tmp_path):
    """What training takes is said at once; what the advice names works."""
    folder = Path(__file__).parents[1] / "samples" / "smolvlm"
    if kind == "imported":
        import_model(folder, tmp_path / "imported")
        folder = tmp_path / "imported"
    tiny_config.train.init_from = str(folder)
    wrong = [
        lambda: run(tiny_config, tmp_path / "a"),
        lambda: check_workdir_config(folder, to_dict(tiny_config)),
        lambda: evaluate_run(folder),
    ]
    for action in wrong:
        with pytest.raises(UserError, match="a published model") as caught:
            action()
        assert len(str(caught.value).splitlines()) == 3
    assert evlm.from_pretrained(folder).params


def test_a_diverging_run_ends_and_keeps_its_weights_finite(tiny_config, tmp_path):
    tiny_config.train.update(steps=20, nonfinite_limit=2, elastic=[])
    tiny_config.train.optimizer.update(learning_rate=3e38, warmup_steps=0, clip_norm=None)
    workdir = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match="diverged") as caught:
        run(tiny_config, workdir)
    assert len(str(caught.value).splitlines()) <= 3
    rows = read_metrics(workdir)
    assert rows[0]["skipped"] == 0
    # The step whose count ends the run is told by the error, the ones before it by the metrics.
    assert [row["skipped"] for row in rows if row["skipped"]] == [1]
    dumps = sorted((workdir / "bad_batches").glob("step_*.npz"))
    assert len(dumps) == 2
    with np.load(dumps[0]) as dump:
        assert dump["images"].shape == (8, 1, 32, 32, 3)


def test_arms_are_drawn_by_weight_and_alike_on_every_run():
    arms = [loop.Arm(None, weight) for weight in (1.0, 3.0)]
    steps = range(1, 2001)

    def draw(seed, arms=arms):
        return [loop.draw_arm(arms, seed, step, len(steps)) for step in steps]

    drawn = draw(5)
    # Binomial(2000, 3/4): six standard deviations are 116.
    assert abs(sum(drawn) - 1500) < 116
    assert drawn == draw(5) != draw(6)
    # One that starts later is not drawn before, and by its weight from then on.
    late = draw(5, [arms[0], loop.Arm(None, 3.0, start=0.5)])
    assert sum(late[:1000]) == 0
    assert late[1000:] == drawn[1000:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.steps": 0}, "train.steps: 0"),
        ({"train.accumulate": 3}, "divisors of data.batch_size=8"),
        ({"train.elastic": [{"budget": 4}]}, r"train.elastic\[0\].name"),
        ({"train.elastic": [{"name": "none", "budget": 16, "weight": 0}]}, "above 0"),
        ({"train.elastic": [{"name": "none", "budget": 16, "start": 1.5}]}, "start: 1.5"),
        ({"train.elastic": [{"name": "none", "budget": 16, "start": 0.5}]}, "starts at 0"),
        ({"train.elastic": [{"name": "nome", "budget": 16}]}, "none"),
        ({"train.elastic": [{"name": "average_pool", "budget": 5}]}, "5"),
        ({"train.keep": 0}, "keep"),
        ({"train.nonfinite_limit": 0}, "nonfinite_limit"),
    ],
)
def test_wrong_settings_are_named(tiny_config, tmp_path, change, words):
    ((field, value),) = change.items()
    with tiny_config.unlocked():
        tiny_config.train[field.removeprefix("train.")] = value
    with pytest.raises(UserError, match=words) as caught:
        run(tiny_config, tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= 3
