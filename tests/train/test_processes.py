"""`efficient-vlm train` over several processes: one run, whoever is stopped, whoever goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny_models import QUICK_TO_COMPILE

from efficient_vlm.errors import UserError
from efficient_vlm.train import processes
from efficient_vlm.train.metrics import read_metrics

STEPS = 14
COMMAND = (
    *("-m", "efficient_vlm.cli", "train", "--config=configs/quickstart.py:smoke"),
    *(f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=5"),
    *("--config.train.log_every=1", "--config.train.elastic=[]", "--config.eval.images=2"),
    *("--config.eval.batch_size=2", "--config.eval.map_questions=0"),
    '--config.eval.methods=[{"name": "none", "budgets": [64]}]',
)


def start(workdir, devices, *more):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
    }
    return subprocess.Popen(
        [sys.executable, *COMMAND, f"--workdir={workdir}", *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


@pytest.mark.slow
def test_two_processes_are_stopped_and_one_goes_on(tmp_path):
    """A signal to one stops both at one step; the losses are those of one undisturbed process."""
    alone = start(tmp_path / "alone", 1)
    assert alone.wait(300) == 0, alone.stdout.read()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workdir, mesh = tmp_path / "pair", "--config.train.mesh.fsdp=2"
    pair = [
        start(workdir, 2, mesh, f"--distributed=127.0.0.1:{port},2,{number}") for number in range(2)
    ]
    end = time.monotonic() + 300
    while max(losses(workdir), default=0) < 3 and time.monotonic() < end:
        assert all(one.poll() is None for one in pair), [one.communicate()[0] for one in pair]
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=300)[0] for one in pair]
    assert [one.returncode for one in pair] == [143, 143], said
    reached = max(losses(workdir))
    assert 3 <= reached < STEPS
    assert f"Stopped after step {reached};" in said[0] and "Stopped" not in said[1]
    assert (workdir / "checkpoints" / str(reached)).is_dir()
    # Again both, to the end of training; then a signal while the first one evaluates.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        start(workdir, 2, mesh, f"--distributed=127.0.0.1:{port},2,{number}") for number in range(2)
    ]
    told = []
    while not any("Evaluation:" in line for line in told):
        assert (line := pair[0].stdout.readline()), told
        told.append(line)
    pair[0].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=300)[0] for one in pair]
    assert [one.returncode for one in pair] == [143, 143], said
    assert f"Stopped after step {STEPS};" in said[0] and "error" not in said[1]
    last = start(workdir, 1)
    assert last.wait(300) == 0, last.stdout.read()
    expected = losses(tmp_path / "alone")
    assert losses(workdir) == pytest.approx(expected, rel=1e-4)
    goodput = json.loads((workdir / "results.json").read_text())["goodput"]
    assert goodput["lost"] == 0 < goodput["productive"] < goodput["total"]


@pytest.mark.parametrize(
    "text", ["here", "host:1", "host:x,2,0", ":1,2,0", "host:1,2,2", "host:1,2,0,0"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match="--distributed") as error:
        processes.start(text)
    assert len(str(error.value).splitlines()) <= 3


def test_one_process_agrees_with_itself():
    assert processes.agreed(lambda: 3) == 3
    assert processes.largest(5) == 5
    with pytest.raises(KeyError):
        processes.agreed(lambda: {}["x"])
