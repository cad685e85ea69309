"""Whole runs through disks that are full, steps that are not finite, readers that fail, signals."""

import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_models import make_tiny_config

from efficient_vlm.checkpoints import leaves
from efficient_vlm.cli import run as commands
from efficient_vlm.data import DataConfig, make_train
from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import NO_LABEL
from efficient_vlm.train import loop
from efficient_vlm.train import prepare as preparing
from efficient_vlm.train import step as steps
from efficient_vlm.train.guards import TrainingDiverged
from efficient_vlm.train.metrics import read_metrics


def run(config, workdir):
    workdir.mkdir(exist_ok=True)
    stop = SimpleNamespace(requested=False, exit_code=None)
    return loop.train(config, workdir, stop=stop, say=lambda line: None)


@pytest.fixture
def config(data_dir):
    """Six steps at one budget, a checkpoint every second one."""
    config = make_tiny_config(data_dir)
    config.train.elastic = []
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    config = make_tiny_config(data_dir)
    config.train.elastic = []
    return run(config, tmp_path_factory.mktemp("survival") / "run")


def committed(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


# ---- disks --------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while(config, undisturbed, tmp_path, monkeypatch, capsys):
    """Two checkpoints in a row are lost, with a warning each; training goes on to the same end."""
    real, times = shutil.disk_usage, [0]

    def full(path):
        times[0] += 1
        return real(path)._replace(free=0) if times[0] <= 2 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    trained = run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("disk full") == 2 and "the next checkpoint tries again" in said
    assert committed(tmp_path / "run") == [6]
    assert trained.summary["state_sha256"] == undisturbed.summary["state_sha256"]


def test_a_disk_that_stays_full_ends_the_run_and_loses_nothing(config, tmp_path, monkeypatch):
    config.train.update(steps=20, save_failures=2)
    real, times = shutil.disk_usage, [0]

    def full(path):
        times[0] += str(path).endswith("checkpoints")
        return real(path)._replace(free=0) if times[0] > 1 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(UserError, match="step 2 is safe") as caught:
        run(config, tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= 3
    assert committed(tmp_path / "run") == [2]
    monkeypatch.undo()
    assert run(config, tmp_path / "run").summary["steps"] == 20


def test_writing_that_fails_in_the_background_counts(config, tmp_path, monkeypatch, capsys):
    """A quota or a bad disk is seen when bytes are written: the same number of failures ends it."""
    config.train.update(steps=20, save_failures=2)
    real = leaves.save_leaves

    def broken(folder, stored):
        if ".tmp-2" not in str(folder):
            raise OSError(122, "Disk quota exceeded")
        real(folder, stored)

    monkeypatch.setattr(leaves, "save_leaves", broken)
    with pytest.raises(UserError, match="Disk quota exceeded") as caught:
        run(config, tmp_path / "run")
    assert "step 2 is safe" in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    said = capsys.readouterr().out
    assert said.count("Disk quota exceeded") == 2
    assert committed(tmp_path / "run") == [2]
    monkeypatch.undo()
    assert run(config, tmp_path / "run").summary["steps"] == 20


# ---- steps that are not finite ------------------------------------------------------------------


def poison(monkeypatch, kind, records):
    """Makes the loss, or only its gradient, NaN for batches that hold one of some records."""
    real, inputs_of = steps.loss_fn, preparing.training_inputs

    def marked(batch, model):
        """The inputs of a batch; another number for "no label" says that it holds a record."""
        inputs = inputs_of(batch, model)
        assert inputs.labels[0, 0] == NO_LABEL  # The first token of a prompt predicts none.
        if np.isin(batch["index"], records).any():
            inputs.labels[0, 0] = NO_LABEL - 1
        return inputs

    def loss_fn(model, params, inputs, rng, aux):
        total, metrics = real(model, params, inputs, rng, aux)
        hit = (inputs.labels == NO_LABEL - 1).any()
        if kind == "loss":
            bad = jnp.where(hit, jnp.nan, 0.0)
            summed, count = metrics["loss"]
            return total + bad, {**metrics, "loss": (summed + bad, count)}
        leaf = jax.tree.leaves(params)[0]
        # The value is 0, its derivative 0 times infinity.
        zero = jax.lax.cond(hit, lambda x: jnp.sqrt(0.0 * x.sum()), lambda x: 0.0, leaf)
        return total + zero, metrics

    monkeypatch.setattr(preparing, "training_inputs", marked)
    monkeypatch.setattr(steps, "loss_fn", loss_fn)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_record_is_skipped_counted_and_dumped(config, tmp_path, monkeypatch, kind, capsys):
    """A record of the third batch: its step changes nothing, and the others go on."""
    batches = iter(make_train(DataConfig.from_mapping(config.data.to_dict())))
    bad = [next(batches)["index"].tolist() for _ in range(3)][2][1]
    poison(monkeypatch, kind, [bad])
    trained = run(config, tmp_path / "run")
    dumps = sorted((tmp_path / "run" / "bad_batches").glob("step_*.npz"))
    assert [path.stem for path in dumps] == ["step_3"]
    assert trained.summary["skipped_steps"] == 1
    for path in dumps:
        with np.load(path) as dump:
            assert bad in dump["index"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained.params))
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == len(dumps)
    assert "update skipped" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_bad_records_without_end_abort_the_run(config, tmp_path, monkeypatch, kind):
    """After `nonfinite_limit` in a row, with their numbers; what is saved is finite."""
    config.train.update(steps=20, nonfinite_limit=3)
    poison(monkeypatch, kind, list(range(10_000)))
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*records \d+") as caught:
        run(config, tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= 3
    dumps = list((tmp_path / "run" / "bad_batches").glob("*.npz"))
    assert {path.stem for path in dumps} == {"step_1", "step_2", "step_3"}
    with np.load(tmp_path / "run" / "bad_batches" / "step_3.npz") as dump:
        assert caught.value.records == dump["index"].tolist()


# ---- data ---------------------------------------------------------------------------------------


def test_a_reader_that_fails_once_changes_nothing(
    config, undisturbed, tmp_path, monkeypatch, capsys
):
    load, failures = Pipeline._load, []

    def broken(self, number, records):
        if number == 3 and not failures:
            failures.append(number)
            raise OSError(errno.ESTALE, "Stale file handle")
        return load(self, number, records)

    monkeypatch.setattr(Pipeline, "_load", broken)
    trained = run(config, tmp_path / "run")
    assert failures == [3] and "restarting at that batch" in capsys.readouterr().out
    assert trained.summary["state_sha256"] == undisturbed.summary["state_sha256"]


# ---- another config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.seed", 7),
        ("data.batch_size", 4),
        ("data.train_images", 32),
        ("data.seed", 1),
        ("model.decoder.width", 64),
        ("model.encoder.depth", 3),
        ("model.dtype", "bfloat16"),
        ("train.optimizer.b2", 0.5),
    ],
)
def test_a_run_goes_on_only_as_it_began(finished_run, tmp_path, field, value):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run[0], workdir)
    changed = ConfigDict(json.loads((workdir / "config.json").read_text()))
    *sections, name = field.split(".")
    node = changed
    for section in sections:
        node = node[section]
    with node.unlocked():
        node[name] = value
    with pytest.raises(UserError) as caught:
        commands.fit(changed, workdir, say=lambda line: None)
    assert field in str(caught.value) and len(str(caught.value).splitlines()) <= 3
