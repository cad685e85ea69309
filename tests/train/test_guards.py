"""Guards: real signals, real second processes, real kills."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.train import lock as lock_module
from efficient_vlm.train.guards import (
    NonFiniteGuard,
    StopSignal,
    TrainingDiverged,
    WorkdirLock,
    check_workdir_config,
    compare_config,
)

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def child(text, *arguments):
    """A Python process that speaks through pipes; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(text), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu"),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- signals -----------------------------------------------------------------------------------

LOOP = """
    import sys, time
    from efficient_vlm.train.guards import StopSignal
    with StopSignal() as stop:
        print("ready")
        while True:
            time.sleep(0.02)  # one step
            if stop.requested:
                print("saved")
                sys.exit(stop.exit_code)
"""

BLOCKED = """
    import hashlib
    from efficient_vlm.train.guards import StopSignal
    with StopSignal():
        print("ready")
        # As in a compilation: one call out of Python that gives up the interpreter lock and for
        # minutes does not come back to where Python's own signal handlers could run.
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2_000_000_000)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_loop_finish(number, code):
    with child(LOOP) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert (output, process.returncode) == ("saved\n", code)
    assert errors.strip().count("\n") == 0
    assert number.name in errors


def test_a_second_signal_ends_the_process_even_inside_native_code():
    with child(BLOCKED) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        # The line is printed by the listening thread while the main thread is in C.
        assert process.stderr.readline() == "\n"
        assert "SIGTERM" in process.stderr.readline()
        time.sleep(0.4)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert time.monotonic() - start < 2


def test_handlers_are_restored_and_repeats_count_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    codes = []
    with StopSignal(exit=codes.append, debounce=0.3) as stop:
        assert (stop.requested, stop.exit_code) == (False, None)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends to the process and to its group
        time.sleep(0.1)
        assert (stop.requested, stop.exit_code, codes) == (True, 143, [])
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert codes == [130]
    assert before == {number: signal.getsignal(number) for number in before}
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_and_foreign_wakeup_descriptors():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]
    # An event loop (a notebook) owns the descriptor: it keeps it, and the flag still works.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        codes = []
        with StopSignal(exit=codes.append, debounce=0.05) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert codes == [143]
        assert os.read(reader, 10) == bytes([signal.SIGTERM] * 2)
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)


# ---- the lock ----------------------------------------------------------------------------------

HOLD = """
    import os, sys
    from efficient_vlm.train.lock import WorkdirLock
    with WorkdirLock(sys.argv[1]):
        worker = os.fork() if len(sys.argv) > 2 else None
        if worker == 0:
            import time
            os.close(1), os.close(2)
            time.sleep(60)  # a data worker that outlives its parent
            os._exit(0)
        print("locked")
        if worker:
            print(worker)
        sys.stdin.readline()
    print("free")
    sys.stdin.readline()
"""


def test_a_live_workdir_is_refused_until_its_owner_leaves(tmp_path):
    lines = []
    with child(HOLD, tmp_path) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as caught, WorkdirLock(tmp_path, warn=lines.append):
            pass
        message = str(caught.value)
        assert len(message.splitlines()) <= 3
        assert f"process {process.pid}" in message
        assert f"kill {process.pid}" in message
        assert "since 20" in message
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "free\n"
        with WorkdirLock(tmp_path, warn=lines.append):
            # A second lock of the same process is refused as well.
            pytest.raises(UserError, WorkdirLock(tmp_path).__enter__)
        with WorkdirLock(tmp_path, warn=lines.append):
            pass
    assert lines == []


def test_a_killed_owner_frees_the_lock_at_once(tmp_path):
    with child(HOLD, tmp_path, "fork") as process:
        assert process.stdout.readline() == "locked\n"
        worker = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        lines, deadline = [], time.monotonic() + 5
        while True:  # the parent stays a zombie: nobody has waited for it yet
            try:
                with WorkdirLock(tmp_path, warn=lines.append):
                    break
            except UserError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
    assert len(lines) == 1
    assert str(process.pid) in lines[0]


def test_owners_on_other_machines(tmp_path):
    """Where flock stays on one machine, the heartbeat speaks for the owner."""
    info = {"pid": 1, "host": "elsewhere", "boot": "other", "started": "1", "since": "2026-01-01"}
    path = tmp_path / ".lock"
    path.write_text(json.dumps(info))
    os.utime(path, (time.time() - 30, time.time() - 30))
    with pytest.raises(UserError, match="elsewhere") as caught, WorkdirLock(tmp_path):
        pass
    assert "wait 90 s" in str(caught.value) or "wait 89 s" in str(caught.value)
    os.utime(path, (time.time() - 121, time.time() - 121))
    lines = []
    with WorkdirLock(tmp_path, warn=lines.append, heartbeat=0.05):
        assert "elsewhere" in lines[0]
        owner = json.loads(path.read_text())
        assert (owner["pid"], owner["boot"]) == (os.getpid(), lock_module._boot())
        os.utime(path, (0, 0))
        time.sleep(0.3)
        assert time.time() - path.stat().st_mtime < 5
    assert path.read_text() == ""
    # Half-written owner: no reason to refuse, the kernel has spoken.
    path.write_text('{"pid": 12')
    with WorkdirLock(tmp_path):
        pass


def test_without_flock_the_process_is_looked_up(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with child("import sys; print('up'); sys.stdin.readline()") as process:
        process.stdout.readline()
        started = lock_module.process_start(process.pid)
        info = {"pid": process.pid, "host": lock_module.socket.gethostname(), "started": started}
        info |= {"boot": lock_module._boot(), "since": "2026-01-01"}
        (tmp_path / ".lock").write_text(json.dumps(info))
        with pytest.raises(UserError, match=str(process.pid)), WorkdirLock(tmp_path):
            pass
        lines = []
        for stale in ({"started": "1"}, {"pid": 2**22 + 1}):  # number used again; dead
            (tmp_path / ".lock").write_text(json.dumps(info | stale))
            with WorkdirLock(tmp_path, warn=lines.append):
                pass
        assert len(lines) == 2


def test_a_removed_lock_file_and_an_unwritable_workdir(tmp_path):
    with WorkdirLock(tmp_path / "a"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be locked"), WorkdirLock(tmp_path / "file" / "x"):
        pass


# ---- steps that are not finite -----------------------------------------------------------------


def test_the_guard_counts_dumps_and_ends_the_run(tmp_path):
    lines = []
    guard = NonFiniteGuard(tmp_path, limit=3, max_dumps=4, warn=lines.append)
    batch = {
        "index": np.array([5, 9]),
        "images": np.full((2, 4), 7, np.uint8),
        "soft": jnp.ones((2, 2), jnp.bfloat16),
        "names": np.array(["a", object()]),
    }
    assert guard.update(1, jnp.array(True), batch)
    assert not guard.update(2, np.bool_(False), batch)
    assert not guard.update(3, jnp.array(False), batch)
    assert guard.update(4, True, batch)
    assert (guard.consecutive, guard.total) == (0, 2)
    resumed = NonFiniteGuard(tmp_path, limit=3, max_dumps=2, warn=lines.append)
    resumed.load(guard.state())
    for step in (5, 6):
        resumed.update(step, False, batch)
    with pytest.raises(TrainingDiverged) as caught:
        resumed.update(7, False, batch, last_checkpoint=4)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "step 7" in message
    assert "records 5, 9" in message
    assert "step 4 is saved" in message
    assert (caught.value.step, caught.value.records, resumed.total) == (7, [5, 9], 5)
    assert sorted(os.listdir(tmp_path / "bad_batches")) == [f"step_{n}.npz" for n in (2, 3, 5, 6)]
    with np.load(tmp_path / "bad_batches" / "step_6.npz", allow_pickle=False) as dump:
        assert set(dump) == {"index", "images", "soft"}
        np.testing.assert_array_equal(dump["images"], batch["images"])
        assert dump["soft"].dtype == np.float32
    assert len(lines) == 4


def test_a_dump_that_fails_does_not_stop_training(tmp_path):
    (tmp_path / "bad_batches").write_text("in the way")
    lines = []
    guard = NonFiniteGuard(tmp_path, warn=lines.append)
    assert not guard.update(1, False, {"index": np.arange(2)})
    assert any("not written" in line for line in lines)
    with pytest.raises(UserError, match="nonfinite_limit"):
        NonFiniteGuard(tmp_path, limit=0)


# ---- the config of a workdir -------------------------------------------------------------------


def test_compare_config():
    stored = {"model": {"width": 64, "grid": [8, 8]}, "seed": 0, "flag": True, "old": 1, "e": {}}
    current = {"model": {"width": 128, "grid": (8, 8)}, "seed": np.int64(0), "flag": 1, "e": {}}
    assert compare_config(stored, current) == [
        "flag: true in the workdir, 1 now",
        "model.width: 64 in the workdir, 128 now",
        "old: 1 in the workdir, absent now",
    ]
    assert compare_config(stored, current, ignore=["model", "flag", "old"]) == []
    assert compare_config({"a": float("nan")}, {"a": float("nan")}) == []
    assert compare_config({"a": {"b": 1}}, {"a": {}}) == [
        "a: absent in the workdir, {} now",
        "a.b: 1 in the workdir, absent now",
    ]


def test_workdir_config(tmp_path):
    config = {"model": {"width": 64, "depth": 2, "heads": 1, "act": "gelu"}, "log_every": 5}
    assert check_workdir_config(tmp_path / "run", config)
    assert os.listdir(tmp_path / "run") == ["config.json"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    changed = {**config, "log_every": 9}
    assert not check_workdir_config(tmp_path / "run", changed, ignore=["log_every"])
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    other = {"model": {"width": 1, "depth": 1, "heads": 2, "act": "x\ny"}, "log_every": 6}
    with pytest.raises(UserError) as caught:
        check_workdir_config(tmp_path / "run", other)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "log_every: 5 in the workdir, 6 now" in message
    assert "and 2 more" in message
    assert "--workdir" in message
    (tmp_path / "run" / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="not a readable config"):
        check_workdir_config(tmp_path / "run", config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        check_workdir_config(tmp_path / "file", config)
