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
    *("train", "--config=configs/quickstart.py:smoke"),
    *(f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=5"),
    *("--config.train.log_every=1", "--config.train.elastic=[]", "--config.eval.images=2"),
    *("--config.eval.batch_size=2", "--config.eval.map_questions=1", "--config.eval.seeds=1"),
    '--config.eval.methods=[{"name": "text_topk", "budgets": [16]}, '
    '{"name": "stride", "budgets": [16]}]',
)


STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Processes of a test that failed end with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(devices, *words):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
    }
    STARTED.append(
        subprocess.Popen(
            [sys.executable, "-m", "efficient_vlm.cli.main", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    return STARTED[-1]


def start_pair(*words):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(2, *words, f"--distributed=127.0.0.1:{port},2,{number}") for number in range(2)]


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


def stopped_in_evaluation(pair):
    """What both say from there on, when the second gets a signal."""
    told = []
    while not any("Evaluation:" in line for line in told):
        line = pair[0].stdout.readline()
        assert line, "".join([*told[-20:], pair[1].communicate(timeout=60)[0][-2000:]])
        told.append(line)
    pair[1].send_signal(signal.SIGTERM)
    said = [each.communicate(timeout=300)[0] for each in pair]
    assert [each.returncode for each in pair] == [143, 143], said
    return said


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on(tmp_path):
    """A signal to one stops both, in training and in evaluation; losses and answers are those of
    one undisturbed process."""
    one = f"--workdir={tmp_path / 'one'}"
    alone = start(1, *COMMAND, one)
    assert alone.wait(300) == 0, alone.stdout.read()
    workdir = tmp_path / "pair"
    command = (*COMMAND, "--config.train.mesh.fsdp=2", f"--workdir={workdir}")
    pair = start_pair(*command)
    end = time.monotonic() + 300
    while max(losses(workdir), default=0) < 3 and time.monotonic() < end:
        assert all(each.poll() is None for each in pair), [each.communicate()[0] for each in pair]
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)
    said = [each.communicate(timeout=300)[0] for each in pair]
    assert [each.returncode for each in pair] == [143, 143], said
    reached = max(losses(workdir))
    assert 3 <= reached < STEPS
    assert f"Stopped after step {reached};" in said[0] and "Stopped" not in said[1]
    assert (workdir / "checkpoints" / str(reached)).is_dir()
    # Again both, to the end of training; then a signal while they evaluate.
    said = stopped_in_evaluation(start_pair(*command))
    assert f"Stopped after step {STEPS};" in said[0] and "error" not in said[1]
    assert not (workdir / "results.json").exists()
    assert losses(workdir) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    pair = start_pair(*command)
    said = [each.communicate(timeout=300)[0] for each in pair]
    assert [each.returncode for each in pair] == [0, 0], said
    assert "Report:" in said[0] and "Evaluation" not in said[1]
    results = json.loads((workdir / "results.json").read_text())
    assert results["goodput"]["lost"] == 0 < results["goodput"]["productive"]
    expected = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (results["eval"], results["controls"]) == (expected["eval"], expected["controls"])
    for path in (tmp_path / "one" / "predictions").iterdir():  # Two rows there, four here.
        assert (workdir / "predictions" / path.name).read_text() == path.read_text()
    # What they have written, on another mesh.
    command = ("eval", f"--workdir={workdir}", "--json", "--mesh=tensor:2,data:2")
    said = stopped_in_evaluation(start_pair(*command))
    assert '"eval"' not in said[0] and "Traceback" not in said[0] + said[1]
    pair = start_pair(*command)
    said = [each.communicate(timeout=300)[0] for each in pair]
    assert [each.returncode for each in pair] == [0, 0], said
    assert json.loads(said[0][said[0].index("{\n") :])["eval"] == expected["eval"]
    assert '"eval"' not in said[1]


@pytest.mark.parametrize(
    "text",
    [
        "here",
        "host:1",
        "host:x,2,0",
        ":1,2,0",
        "host:1,2,2",
        "host:1,2,0,0",
        "host:0,2,0",
        "host:1,0,0",
    ],
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
