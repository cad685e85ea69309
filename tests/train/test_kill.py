"""Runs that are killed or told to stop, at any moment, end where an undisturbed run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from efficient_vlm.train.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS, EVERY = 30, 5
# What is evaluated does not matter here, only that it is the same in both runs.
COMMAND = (
    *("-m", "efficient_vlm.cli", "train", "--config=configs/quickstart.py:smoke"),
    *(f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}"),
    *("--config.train.log_every=1", "--config.train.keep=2"),
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
    return json.loads((workdir / "results.json").read_text())


def finish(workdir, environment, undisturbed):
    """Runs the same command once more, to its end, and compares."""
    run = Run(workdir, environment)
    assert run.wait() == 0, run.text
    results = json.loads((workdir / "results.json").read_text())
    assert results["train"]["params_sha256"] == undisturbed["train"]["params_sha256"]
    assert results["train"]["steps"] == STEPS
    assert results["eval"] == undisturbed["eval"]
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert not saving(workdir)


def test_sigkill_at_five_moments(undisturbed, environment, tmp_path):
    """While starting, twice between saves, twice in the middle of a save."""
    draw, workdir = random.Random(2), tmp_path / "run"
    killed_while_saving = 0

    def starting(_):
        end = time.monotonic() + draw.uniform(0.5, 5.0)
        return lambda: time.monotonic() > end

    def training(newest):
        return metrics_reach(workdir, newest + draw.randint(1, 7))

    def writing(_):
        return lambda: bool(saving(workdir))

    moments = [training, writing, training, writing]
    moments.insert(draw.randrange(len(moments)), starting)
    for moment in moments:
        newest = max((row["step"] for row in read_metrics(workdir)), default=0)
        run = Run(workdir, environment)
        if moment is not starting:
            # What the last process left is in order again once training says where it begins.
            run.until(lambda run=run: "trained at" in run.text)
        run.until(moment(newest))
        assert run.send(signal.SIGKILL) == -signal.SIGKILL
        killed_while_saving += moment is writing and bool(saving(workdir))
        assert not (workdir / "results.json").exists()
    # A save takes longer than a look at the folder: at least one must have been hit.
    assert killed_while_saving >= 1
    finish(workdir, environment, undisturbed)


def test_sigterm_and_sigint_save_and_tell_how_to_resume(undisturbed, environment, tmp_path):
    workdir, reached = tmp_path / "run", 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = Run(workdir, environment)
        run.until(metrics_reach(workdir, reached + 4))
        assert run.send(number) == code, run.text
        reached = max(row["step"] for row in read_metrics(workdir))
        # Saved at the very step that it stopped at, not at the last multiple.
        assert f"Stopped after step {reached};" in run.text
        assert (workdir / "checkpoints" / str(reached)).is_dir() and not saving(workdir)
        (line,) = [line for line in run.text.splitlines() if line.startswith("Resume with: ")]
        assert line.startswith(
            "Resume with: efficient-vlm train --config=configs/quickstart.py:smoke"
        )
        assert f"--workdir={workdir}" in line and "'--config.eval.methods=[{" in line
        assert "Traceback" not in run.text
    finish(workdir, environment, undisturbed)
