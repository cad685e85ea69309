"""Runs that are killed or told to stop, at any moment, end where an undisturbed run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from efficient_vlm.data import DataConfig, make_train
from efficient_vlm.exact_json import decode_json
from efficient_vlm.files import read_index
from efficient_vlm.train.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLS = 150, 5, 20
# What is evaluated does not matter here, only that it is the same in both runs.
COMMAND = (
    *("-m", "efficient_vlm.cli.main", "train", "--config=configs/quickstart.py:smoke"),
    *(f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}"),
    *("--config.train.log_every=1", "--config.train.keep=2", "--config.data.batch_size=8"),
    "--config.train.elastic=[]",  # One program to trace at each start.
    *("--config.eval.images=2", "--config.eval.batch_size=2", "--config.eval.map_questions=0"),
    '--config.eval.methods=[{"name": "none", "budgets": [64]}]',
)


class Run:
    """`efficient-vlm train` in a process of its own."""

    def __init__(self, workdir, environment):
        self.workdir, self.log = workdir, workdir.with_suffix(f".{time.monotonic_ns()}.log")
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, *COMMAND, f"--workdir={workdir}"],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def until(self, happened, seconds=120):
        """Waits, in steps far shorter than a save, until `happened()` is true."""
        end = time.monotonic() + seconds
        while not happened():
            if (code := self.process.poll()) is not None:
                pytest.fail(f"ended with {code} before it could be disturbed:\n{self.text}")
            if time.monotonic() > end:
                pytest.fail(f"did not come that far in {seconds} s:\n{self.text}")
            time.sleep(0.001)

    def send(self, number):
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds=180):
        code = self.process.wait(seconds)
        self._file.close()
        return code

    @property
    def text(self):
        return self.log.read_text()


def metrics_reach(workdir, step):
    return lambda: any(row["step"] >= step for row in read_metrics(workdir))


def saving(workdir):
    """The unfinished folders of saves that are under way."""
    return list((workdir / "checkpoints").glob(".tmp-*"))


def committed(workdir):
    """The steps that may be resumed from."""
    index = read_index(workdir / "checkpoints")
    return [int(step) for step in index["steps"]] if index else []


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "EFFICIENT_VLM_DATA": str(shared / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    """results.json of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run = Run(workdir, environment)
    assert run.wait() == 0, run.text
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    return json.loads((workdir / "results.json").read_text()) | {"workdir": workdir}


def finish(workdir, environment, undisturbed):
    """Runs the same command once more, to its end, and compares."""
    run = Run(workdir, environment)
    assert run.wait() == 0, run.text
    results = json.loads((workdir / "results.json").read_text())
    for name in ("params_sha256", "state_sha256", "steps"):
        assert results["train"][name] == undisturbed["train"][name]
    assert results["eval"] == undisturbed["eval"]
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert not saving(workdir)


def next_batches(workdir, count=10):
    """The batches behind the newest checkpoint of a run."""
    config = json.loads((workdir / "config.json").read_text())
    newest = max(committed(workdir))
    position = (workdir / "checkpoints" / str(newest) / "data" / "0.json").read_bytes()
    iterator = iter(make_train(DataConfig.from_mapping(config["data"]), workdir=workdir))
    iterator.set_state(decode_json(json.loads(position)))
    return [next(iterator) for _ in range(count)]


def test_twenty_sigkills_of_one_run(undisturbed, environment, tmp_path, monkeypatch):
    """While starting, between saves, and in the middle of saves; the end is that of the run that
    nothing disturbed: weights, optimizer, and what would be trained on next."""
    draw, workdir = random.Random(2), tmp_path / "run"
    killed_while_saving = 0

    def starting(_):
        end = time.monotonic() + draw.uniform(0.5, 4.0)
        return lambda: time.monotonic() > end

    def training(newest):
        return metrics_reach(workdir, newest + draw.randint(1, EVERY + 2))

    def writing(_):
        return lambda: bool(saving(workdir))

    moments = [training] * (KILLS // 2) + [writing] * (KILLS // 2 - 3) + [starting] * 3
    draw.shuffle(moments)
    for moment in moments:
        newest = max((row["step"] for row in read_metrics(workdir)), default=0)
        run = Run(workdir, environment)
        if moment is not starting:
            # What the last process left is in order again once training says where it begins.
            run.until(lambda run=run: "trained at" in run.text)
        run.until(moment(newest))
        assert run.send(signal.SIGKILL) == -signal.SIGKILL
        saved = max(committed(workdir), default=0)
        # Also between the moment that a folder gets its name and that the index names it.
        hit = bool(saving(workdir)) or (workdir / "checkpoints" / str(saved + EVERY)).exists()
        killed_while_saving += moment is writing and hit
        assert not (workdir / "results.json").exists()
        reached = max((row["step"] for row in read_metrics(workdir)), default=0)
        # One interval, and that of a save that was under way.
        assert reached - saved <= EVERY * (1 + hit)
    # A save takes longer than a look at the folder: some must have been hit.
    assert killed_while_saving >= 3
    finish(workdir, environment, undisturbed)
    monkeypatch.setenv("EFFICIENT_VLM_DATA", environment["EFFICIENT_VLM_DATA"])
    for one, other in zip(next_batches(workdir), next_batches(undisturbed["workdir"]), strict=True):
        assert sorted(one) == sorted(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    goodput = json.loads((workdir / "results.json").read_text())["goodput"]
    assert 0 < goodput["lost"] < goodput["total"]


def test_signals_while_compiling_in_a_step_and_in_a_save(undisturbed, environment, tmp_path):
    workdir, reached = tmp_path / "run", 0
    cold = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    moments = (
        (signal.SIGTERM, 143, cold, lambda run: "opening" in run.text),
        (signal.SIGTERM, 143, environment, lambda run: metrics_reach(workdir, reached + 4)()),
        (signal.SIGINT, 130, environment, lambda run: bool(saving(workdir))),
    )
    for number, code, variables, moment in moments:
        run = Run(workdir, variables)
        run.until(lambda run=run, moment=moment: moment(run))
        if variables is cold:
            time.sleep(2)  # The program is compiled while data are built: neither has ended.
            assert not read_metrics(workdir)
        assert run.send(number) == code, run.text
        reached = max((row["step"] for row in read_metrics(workdir)), default=0)
        # Saved at the very step that it stopped at, not at the last multiple.
        assert f"Stopped after step {reached};" in run.text
        assert (reached == 0) == (variables is cold)
        assert (workdir / "checkpoints" / str(reached)).is_dir() == (reached > 0)
        assert not saving(workdir)
        (line,) = [line for line in run.text.splitlines() if line.startswith("Resume with: ")]
        assert line.startswith(
            "Resume with: efficient-vlm train --config=configs/quickstart.py:smoke"
        )
        assert f"--workdir={workdir}" in line and "'--config.eval.methods=[{" in line
        assert "Traceback" not in run.text
    finish(workdir, environment, undisturbed)
