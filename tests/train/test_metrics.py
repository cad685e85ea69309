"""metrics.jsonl survives crashes, resumes and full disks; TensorBoard is optional."""

import builtins
import json
import os
import resource
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.train import metrics as metrics_module
from efficient_vlm.train.metrics import MetricsWriter, read_metrics


def lines_of(path):
    """Parsed by json alone, strictly: every line must be JSON without NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_values_become_valid_json_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(
        1,
        {
            "loss": jnp.float32(0.5),
            "norm": float("nan"),
            "lr": np.float64("-inf"),
            "half": jnp.bfloat16(1.5),
            "skipped": np.int64(3),
            "expert_load": jnp.array([[0.25, jnp.inf], [1, 0]]),
            "nested": {"a": [np.float32(1), (2, None)]},
        },
    )
    writer.write(2, {"n": 5}, split="eval")
    first, second = lines_of(tmp_path / "run" / "metrics.jsonl")  # before close: lines are flushed
    assert first.pop("time") > 1.7e9
    assert first == {
        "step": 1, "split": "train", "loss": 0.5, "norm": None, "lr": None, "half": 1.5,
        "skipped": 3, "expert_load": [[0.25, None], [1.0, 0.0]], "nested": {"a": [1.0, [2, None]]},
    }  # fmt: skip
    assert (second["step"], second["split"], second["n"]) == (2, "eval", 5)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert read_metrics(tmp_path / "none") == []
    writer.close()


def test_a_resumed_run_repeats_no_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 11):
            writer.write(step, {"loss": step})
        writer.write(8, {"accuracy": 1.0}, split="eval")
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 11, "split": "tra')  # killed in the middle of a line
    with MetricsWriter(tmp_path) as writer:
        assert len(lines_of(path)) == 11
        writer.truncate_after(6)
        for step in (7, 8):
            writer.write(step, {"loss": -step})
    rows = lines_of(path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, 5, 6, -7, -8]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    # Foreign bytes in the middle are dropped, not passed on.
    path.write_bytes(path.read_bytes() + b"\xff\x00garbage\n[1]\n")
    assert len(read_metrics(tmp_path)) == 8
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(0)
        assert path.read_bytes() == b""


def test_a_disk_that_fills_up_costs_one_warning(tmp_path):
    """A real refusal by the kernel: the size limit of the process, reached in mid-line."""
    warnings = []
    writer = MetricsWriter(tmp_path, warn=warnings.append)
    writer.write(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        for step in (2, 3, 4):
            writer.write(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]
    writer.write(5, {"loss": 1.0})
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1, 5]


def test_broken_writers_never_raise(tmp_path):
    warnings = []
    (tmp_path / "file").write_text("")
    writer = MetricsWriter(tmp_path / "file", warn=warnings.append)
    writer.truncate_after(3)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert len(warnings) == 1

    class Bad:
        def __array__(self, *args, **kwargs):
            raise RuntimeError("no")

    warnings.clear()
    writer = MetricsWriter(tmp_path / "run", warn=warnings.append)
    writer.write(1, {"loss": Bad()})
    writer.write(2, {"loss": 1.0})
    assert len(warnings) == 1
    assert [row["step"] for row in lines_of(writer.path)] == [2]


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    warnings = []
    with MetricsWriter(tmp_path, tensorboard=True, warn=warnings.append) as writer:
        writer.truncate_after(4)
        writer.write(5, {"loss": 0.5, "load": [1, 2], "norm": float("nan")})
        writer.write(6, {"loss": 0.25}, split="eval")
    (event,) = (tmp_path / "tensorboard").iterdir()
    written = event.read_bytes()
    assert b"train/loss" in written
    assert b"eval/loss" in written
    assert b"norm" not in written
    assert warnings == []


def test_a_dead_or_hanging_tensorboard_is_survived(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboardX")
    release = threading.Event()

    class Broken:
        def __init__(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

    class Hanging:
        def __init__(self, *args, **kwargs):
            pass

        def add_scalar(self, *args):
            release.wait(20)

        close = add_scalar

    for kind in (Broken, Hanging):
        monkeypatch.setattr(tensorboard, "SummaryWriter", kind)
        warnings = []
        writer = MetricsWriter(tmp_path / kind.__name__, tensorboard=True, warn=warnings.append)
        start = time.monotonic()
        for step in range(1, 1200):
            writer.write(step, {"loss": 0.5})
        assert time.monotonic() - start < 5
        assert len(warnings) == 1
        assert "tensorboard" in warnings[0]
        assert len(lines_of(writer.path)) == 1199
        writer.close()
    release.set()


def test_missing_tensorboard_is_a_user_error(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    MetricsWriter(tmp_path).close()
    with pytest.raises(UserError, match="pip install tensorboardX"):
        MetricsWriter(tmp_path, tensorboard=True)
    assert "jax" not in vars(metrics_module)
