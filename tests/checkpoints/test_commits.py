"""Commits that are cut short: by errors of the disk at every stage, a full disk, SIGKILL."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import abstract, assert_equal, harm_flip, make_state, run_script

from efficient_vlm import files as manifest
from efficient_vlm.checkpoints import commits
from efficient_vlm.checkpoints import run as checkpoint
from efficient_vlm.checkpoints.run import Checkpoints, SaveFailed


def test_write_errors_at_every_stage_leave_the_last_step_intact(tmp_path, monkeypatch):
    state = {"w": jnp.arange(4.0), "rng": jax.random.key(0)}
    stages = [  # where, what, and which call of it
        (Path, "mkdir", lambda path, *_: path.name.startswith(".tmp-")),
        (checkpoint.leaf_store, "save_leaves", lambda *_: True),
        (Path, "write_bytes", lambda path, *_: path.name == "checkpoint.json"),
        (manifest, "fsync_tree", lambda *_: True),
        (manifest, "file_digest", lambda *_: True),
        (manifest, "write_durable", lambda path, *_: path.name == "manifest.json"),
        (manifest, "write_durable", lambda path, *_: "index" in path.name),
        (commits.os, "rename", lambda _, target: Path(target).name.isdecimal()),
        (manifest.os, "replace", lambda _, target: Path(target).name == "index.json"),
        (manifest, "write_index", lambda *_: True),
        (manifest, "fsync_directory", lambda path: Path(path) == tmp_path),
    ]
    lines = []
    checkpoints = Checkpoints(tmp_path, warn=lines.append)
    checkpoints.save(1, state, wait=True)
    for number, (owner, name, chosen) in enumerate(stages):
        step, original = number + 2, getattr(owner, name)

        def fail(*args, original=original, chosen=chosen, **kwargs):
            if chosen(*args):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        good = checkpoints.committed()[-1]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(SaveFailed, match="disk full"):
                checkpoints.save(step, state, wait=True)
        assert checkpoints.committed()[-1] == good, name
        assert checkpoints.failures == 1, name
        assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".tmp")], name
        assert Checkpoints(tmp_path, read_only=True).restore_latest(state)[0] == good
        # In the background the same failure is a warning, and the next save a new attempt.
        lines.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            checkpoints.save(step, state)
            checkpoints.close()
        assert len(lines) == 1
        assert "disk full" in lines[0]
        assert checkpoints.failures == 2
        with pytest.raises(SaveFailed):
            checkpoints.wait()
        checkpoints.save(step, state, wait=True)
        assert checkpoints.committed()[-1] == step
        assert checkpoints.failures == 0


def test_files_that_the_kernel_refuses_to_grow(tmp_path):
    """A real write error inside Orbax: the size limit of the process (SIGXFSZ ignored)."""
    small, large = {"w": jnp.ones(8)}, {"w": jnp.arange(1 << 18, dtype=jnp.float32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small, wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(SaveFailed):
            checkpoints.save(2, large, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.committed() == [1]
    assert sorted(os.listdir(tmp_path)) == ["1", "index.json"]
    checkpoints.save(2, large, wait=True)
    assert checkpoints.restore_latest(large)[0] == 2


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 8 MB where mounting is allowed; elsewhere None."""
    mount = tmp_path / "disk"
    mount.mkdir()
    program, undo = shutil.which("mount"), shutil.which("umount")
    command = [program, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    mounted = program and undo and subprocess.run(command, capture_output=True).returncode == 0
    yield mount if mounted else None
    if mounted:
        subprocess.run([undo, str(mount)], check=True)


def test_full_disk(small_disk, tmp_path, monkeypatch):
    state = {"w": jnp.arange(1 << 18, dtype=jnp.float32)}  # 1 MB
    if small_disk is None:
        # No right to mount: the file system's answer is played, all else is as below.
        small_disk = tmp_path / "plain"
        small_disk.mkdir()
        usage = shutil.disk_usage(small_disk)._replace(free=1 << 20)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(SaveFailed, match="disk full"):
            Checkpoints(small_disk).save(1, state, wait=True)
        return
    checkpoints = Checkpoints(small_disk / "c", keep=2)
    checkpoints.save(1, state, wait=True)
    filler = small_disk / "filler"
    filler.write_bytes(b"\1" * (shutil.disk_usage(small_disk).free - (3 << 19)))
    with pytest.raises(SaveFailed, match="disk full.*MB needed"):
        checkpoints.save(2, state)  # refused before anything is written
    # Past the preflight (someone else fills the disk meanwhile), the write itself fails.
    filler.write_bytes(b"\1" * (filler.stat().st_size + (1 << 20)))
    monkeypatch.setattr(checkpoints, "_check_space", lambda *args: None)
    with pytest.raises(SaveFailed, match="disk full"):
        checkpoints.save(2, state, wait=True)
    assert checkpoints.committed() == [1]
    assert checkpoints.failures == 2
    assert sorted(os.listdir(small_disk / "c")) == ["1", "index.json"]
    filler.unlink()
    checkpoints.save(2, state, wait=True)
    assert Checkpoints(small_disk / "c").restore_latest(state)[0] == 2


def commit_that_fails(directory, monkeypatch, *, again):
    """Step 10 alone, then 20, whose index is written before the disk fails; `again` for good."""
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(10, make_state(), wait=True)
        write, calls = manifest.write_index, []

        def broken(*args):
            calls.append(args)
            if len(calls) == 1 or not again:
                write(*args)
            if len(calls) == 1 or again:
                raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write_index", broken)
            with pytest.raises(SaveFailed):
                checkpoints.save(20, make_state(), wait=True)


def test_a_commit_that_fails_behind_the_index_and_a_kill(tmp_path, monkeypatch):
    """The new index is there, its step is not, and what it gives up is all that there is."""
    good = make_state()
    commit_that_fails(tmp_path, monkeypatch, again=True)
    # As killed: what follows reads the disk alone.
    assert json.loads((tmp_path / "index.json").read_text())["content"]["deleting"] == [10]
    reader = Checkpoints(tmp_path, read_only=True, warn=lambda line: None)
    assert reader.restore_latest(abstract(good))[0] == 10
    lines = []
    again = Checkpoints(tmp_path, keep=1, warn=lines.append)
    step, got, _ = again.restore_latest(abstract(good))
    assert step == 10 and again.committed() == [10]
    assert_equal(got, good)
    assert any("falling back to step 10" in line for line in lines)
    assert again.save(30, good, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["30", "index.json"]


def test_a_step_that_was_given_up_is_reached_again(tmp_path):
    """Its number is still among those to delete, in an index that was read again."""
    with Checkpoints(tmp_path, keep=1, keep_every=100) as checkpoints:
        for step in (100, 150, 200):
            checkpoints.save(step, make_state(), wait=True)
    harm_flip(tmp_path / "200" / "checkpoint.json", np.random.default_rng(2))
    index = json.loads((tmp_path / "index.json").read_text())["content"]
    assert index["deleting"] == [150]
    again = Checkpoints(tmp_path, keep=1, keep_every=100, warn=lambda line: None)
    assert again.restore_latest(abstract(make_state()))[0] == 100
    again._commits.load()  # As several processes do.
    assert again.save(150, make_state(), wait=True)
    assert again.committed() == [100, 150] and (tmp_path / "150").is_dir()


def test_a_commit_that_fails_behind_the_index_is_taken_back(tmp_path, monkeypatch):
    commit_that_fails(tmp_path, monkeypatch, again=False)
    lines = []
    assert Checkpoints(tmp_path, keep=1, warn=lines.append).committed() == [10]
    assert not lines


KILLED = """
    import os, random, signal, sys, time
    import jax, jax.numpy as jnp
    from efficient_vlm import files as manifest
    from efficient_vlm.checkpoints import commits, leaves
    from efficient_vlm.checkpoints.run import Checkpoints

    leaves._orbax()  # the imports are shared by all children; no device is touched before the fork
    root, rng = sys.argv[1], random.Random(0)

    def state(step):
        return {"w": jnp.arange(50_000, dtype=jnp.float32) * step, "rng": jax.random.key(step)}

    def save_on(directory, stage, pipe):
        checkpoints = Checkpoints(directory, keep=2, warn=lambda line: None)
        found = checkpoints.restore_latest(state(0))
        step = found[0] if found else 0
        checkpoints.save(step + 1, state(step + 1), wait=True)
        os.write(pipe, str(step + 1).encode() + b" ")
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        if stage:
            owner, name, after, chosen = stage
            original = getattr(owner, name)
            def deadly(*args, **kwargs):
                hit = chosen(str(args[-1]).rpartition("/")[2])
                if hit and not after:
                    die()
                result = original(*args, **kwargs)
                if hit:
                    die()
                return result
            setattr(owner, name, deadly)
        while True:
            step += 1
            if checkpoints.save(step + 1, state(step + 1), wait=bool(step % 2)):
                if step % 2:
                    os.write(pipe, str(step + 1).encode() + b" ")

    anything, index = lambda name: True, lambda name: name == "index.json"
    stages = [
        (leaves, "save_leaves", False, anything), (leaves, "save_leaves", True, anything),
        (manifest, "file_digest", True, anything), (manifest, "write_manifest", True, anything),
        (commits.os, "rename", False, str.isdecimal), (commits.os, "rename", True, str.isdecimal),
        (manifest.os, "replace", False, index), (manifest.os, "replace", True, index),
        (commits.shutil, "rmtree", False, str.isdecimal),
        (commits.shutil, "rmtree", True, str.isdecimal),
    ]
    plan = [(f"stage{i}", stage) for i, stage in enumerate(stages)] + [("random", None)] * 8
    for name, stage in plan:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            save_on(os.path.join(root, name), stage, writer)
        os.close(writer)
        said = os.read(reader, 64)
        if stage is None:
            time.sleep(rng.random() * 0.3)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        while more := os.read(reader, 4096):
            said += more
        os.close(reader)
        acknowledged = said.split()[-1].decode()
        print(name, os.WTERMSIG(status), acknowledged, flush=True)
"""


def test_sigkill_at_every_stage_and_at_random_moments(tmp_path):
    output = run_script(KILLED, tmp_path).split("\n")[:-1]
    last = {}
    for line in output:
        name, number, acknowledged = line.split()
        assert int(number) == signal.SIGKILL, line
        last[name] = int(acknowledged)
    assert len(output) == 18
    assert len(last) == 11
    for name, acknowledged in last.items():
        lines = []
        checkpoints = Checkpoints(tmp_path / name, keep=2, warn=lines.append)
        target = {"w": jnp.zeros(50_000), "rng": jax.random.key(0)}
        step, got, _ = checkpoints.restore_latest(target)
        # At most the one save under way is lost, and what is there is exactly that step.
        assert acknowledged <= step <= acknowledged + 2, name
        np.testing.assert_array_equal(got["w"], np.arange(50_000, dtype=np.float32) * step)
        assert jax.random.key_data(got["rng"])[1] == step
        assert not any("damaged" in line for line in lines)
        assert not [entry for entry in os.listdir(tmp_path / name) if entry.startswith(".")]
        assert checkpoints.save(step + 1, got, wait=True)
    # Killed between rename and index: there, but never used.
    assert any("uncommitted" in entry for entry in os.listdir(tmp_path / "stage5"))
