"""Checkpoints that are committed, verified, and complete or absent.

On disk::

    checkpoints/
      index.json            committed steps with the SHA-256 of their manifests, sealed
      400/                  one folder per step, named exactly by the step
        state/              arrays (Orbax)
        data/0.json         state of the data iterator of process 0
        checkpoint.json     description of every leaf, the caller's metadata, versions
        manifest.json       size and SHA-256 of every file above, sealed, written last
      400.damaged-1/        a step that failed verification: renamed, never deleted

The order of a save is: temporary folder, fsync of every file, manifest, rename, index. A kill at
any point leaves a committed step, or leftovers that the next start removes; a step that is not in
the index is never used.
"""

import dataclasses
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import efficient_vlm
from efficient_vlm import checks
from efficient_vlm import files as manifest
from efficient_vlm.checkpoints import leaves as leaf_store
from efficient_vlm.checkpoints.commits import TEMPORARY, Commits
from efficient_vlm.checkpoints.leaves import NonFiniteState, state_sha256
from efficient_vlm.errors import UserError
from efficient_vlm.exact_json import decode_json, encode_json
from efficient_vlm.terminal import print_warning

__all__ = ["Checkpoints", "NonFiniteState", "SaveFailed", "SaveReport", "state_sha256"]

_INFO = "checkpoint.json"


class SaveFailed(RuntimeError):
    """A save that did not happen (full disk, I/O error); earlier steps are intact.

    Training can go on; the next save is a new attempt.

    Attributes:
      step: the step that was not saved.
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"checkpoint of step {step} was not written: {reason}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class SaveReport:
    """What one save cost; times in seconds, size in bytes.

    `stall` is the time for which the caller waited, `total` the time until the step was committed;
    `sync` and `manifest` are the parts of it spent on fsync and on digests and the manifest.
    """

    step: int
    stall: float
    total: float
    sync: float
    manifest: float
    size: int


class Checkpoints:
    """The checkpoints of one run; one writer at a time (see `guards.WorkdirLock`).

    Args:
      directory: a local or shared POSIX folder, created if needed.
      keep: how many of the newest steps to keep.
      keep_every: multiples of this are kept for ever; None for no such steps.
      warn: receives one line for each damaged file, failed save or clean-up; default stderr.
      background: write in a thread while training goes on; the state is copied first, so that the
        caller may donate its buffers at once. Runs with several processes always write in place.
      read_only: never rename, delete or write (for a reader beside a live run).

    Attributes:
      last_save: SaveReport of the newest committed save of this object, or None.
      failures: failed saves since the last good one.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        warn: Callable[[str], None] | None = None,
        background: bool = True,
        read_only: bool = False,
    ):
        if "://" in str(directory):
            raise UserError(
                f"checkpoint directory: {str(directory)!r} is an object store",
                allowed="a local folder or a shared POSIX file system",
                fix="mount the bucket, or copy checkpoints there after they are written",
            )
        checks.whole("train.keep", keep)
        checks.whole("train.keep_every", keep_every, none=True)
        self.directory = Path(directory).absolute()
        self.last_save: SaveReport | None = None
        self.failures = 0
        self._warn = warn or print_warning
        self._read_only = read_only
        self._processes, self._process = jax.process_count(), jax.process_index()
        self._background = background and self._processes == 1
        self._thread: threading.Thread | None = None
        self._error: SaveFailed | None = None
        self._commits = Commits(self.directory, keep, keep_every, self._warn, read_only=read_only)
        if not read_only and self._process == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._commits.recover()
            except OSError as error:
                raise UserError(
                    f"checkpoint directory {self.directory}: {error.strerror or error}",
                    fix="choose a --workdir that can be written, or free some space",
                ) from None
        self._barrier("checkpoints.recover")
        self._commits.load()

    def committed(self) -> list[int]:
        """Committed steps, oldest first; a save still under way is not among them."""
        if self._read_only:
            self._commits.load()
        return sorted(self._commits.steps)

    # ---- save --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        metadata: dict[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> bool:
        """Saves a step; with a background thread, returns as soon as the state is copied.

        Waits first for an earlier save that is still being written. The state of the data iterator
        (`get_state()`) is taken before this returns, so it belongs to the batches consumed so far.

        Args:
          step: must be newer than every committed step; an already committed step is left alone.
          state: pytree of jax or NumPy arrays, typed PRNG keys and Python numbers.
          data_iterator: anything with `get_state` and `set_state`, or None.
          metadata: JSON types, NumPy arrays and bytes; returned by `restore_latest`.
          wait: return only when the step is committed.

        Returns:
          False if the step had been committed before.

        Raises:
          NonFiniteState: a leaf is NaN or Inf; nothing is written.
          SaveFailed: too little free space, or (with `wait`) writing failed. A failure in the
            background is sent to `warn`, counted in `failures` and raised by the next `wait()`.
          ValueError: the step is older than a committed one.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened read_only")
        start = time.monotonic()
        self._join()
        newest = max(self._commits.steps, default=step)
        if step in self._commits.steps:
            return False
        if step < newest:
            raise ValueError(f"step {step} is older than committed step {newest}: restore first")
        leaves = leaf_store.snapshot(state)
        bad = next((leaf.path for leaf in leaves if not leaf_store.all_finite(leaf.value)), None)
        if not self._agree(bad is None):
            raise NonFiniteState(bad or "on another process")
        files = self._small_files(step, leaves, data_iterator, metadata or {})
        self._check_space(step, sum(leaf.value.nbytes for leaf in leaves))
        if self._background and not wait:
            # Not a daemon: the interpreter must wait for it at exit.
            self._thread = threading.Thread(
                target=self._write_quietly,
                args=(step, leaves, files, start, time.monotonic() - start),
                name=f"checkpoint-{step}",
            )
            self._thread.start()
        else:
            self._write(step, leaves, files, start, None)
        return True

    def wait(self) -> None:
        """Waits for the save under way. Raises SaveFailed if a background save has failed."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the save under way; never raises (a failure was sent to `warn`)."""
        self._join()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _small_files(
        self, step: int, leaves: list[leaf_store.Leaf], data_iterator: Any, metadata: dict[str, Any]
    ) -> dict[str, bytes]:
        files = {}
        if self._process == 0:
            info = {
                "format": leaf_store.FORMAT,
                "step": step,
                "leaves": [leaf.spec for leaf in leaves],
                "metadata": encode_json(metadata),
                "processes": self._processes,
                "versions": {"efficient_vlm": efficient_vlm.__version__, "jax": jax.__version__},
            }
            files[_INFO] = json.dumps(info, allow_nan=False).encode()
        if data_iterator is not None:
            position = json.dumps(encode_json(data_iterator.get_state()), allow_nan=False)
            files[f"data/{self._process}.json"] = position.encode()
        return files

    def _check_space(self, step: int, size: int) -> None:
        # Twice the size: the new step must fit beside the old ones, and so must all that the run
        # writes until old steps are deleted.
        last = self.last_save.size if self.last_save else 0
        need = 2 * max(size, last) + (1 << 16)
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError:
            free = 0
        if not self._agree(free >= need):
            reason = f"disk full: {free / 1e6:.1f} MB free, {need / 1e6:.1f} MB needed"
            raise self._failed(step, reason)

    def _failed(self, step: int, reason: str) -> SaveFailed:
        self.failures += 1
        return SaveFailed(step, reason)

    def _write_quietly(self, step: int, *rest: Any) -> None:
        try:
            self._write(step, *rest)
            self._error = None
        except SaveFailed as error:
            self._error = error
            self._warn(str(error))

    def _write(
        self,
        step: int,
        leaves: list[leaf_store.Leaf],
        files: dict[str, bytes],
        start: float,
        stall: float | None,
    ) -> None:
        temporary = self.directory / f"{TEMPORARY}{step}"
        primary = self._process == 0
        sync_seconds, manifest_seconds, size, cause = 0.0, 0.0, 0, None
        try:
            if primary:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        except OSError as error:
            cause = error
        if self._agree(cause is None):
            try:
                leaf_store.save_leaves(temporary / "state", leaves)
                for name, content in files.items():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    (temporary / name).write_bytes(content)
            except Exception as error:  # Orbax and TensorStore raise many types for a full disk
                cause = error
            synced = time.monotonic()
            if self._agree(cause is None) and primary:
                try:
                    manifest.fsync_tree(temporary)
                    hashed = time.monotonic()
                    digest, size = manifest.write_manifest(temporary, step)
                    sync_seconds = hashed - synced
                    manifest_seconds = time.monotonic() - hashed
                    self._commits.commit(step, temporary, digest)
                except Exception as error:
                    cause = error
        if not self._agree(cause is None):
            if primary:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._failed(step, describe_error(cause)) from cause
        if primary:
            self._commits.delete_old()
        else:
            self._commits.load()
        self.failures = 0
        total = time.monotonic() - start
        stall = total if stall is None else stall
        self.last_save = SaveReport(step, stall, total, sync_seconds, manifest_seconds, size)

    # ---- restore -----------------------------------------------------------------------------

    def restore_latest(
        self, abstract_state: Any, data_iterator: Any = None, *, subset: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest good step; damaged ones are set aside with a warning.

        Args:
          abstract_state: the state's structure: arrays, or `jax.ShapeDtypeStruct` with shardings
            (any layout, not only the one it was saved from).
          data_iterator: its `set_state` is called last; None leaves the position alone.
          subset: whether `abstract_state` may be a part of the checkpoint (such as the
            parameters, for evaluation); the rest is not read.

        Returns:
          (step, state, metadata), or None if there never was a checkpoint.

        Raises:
          UserError: structure, shape or dtype differ (names the leaf); checkpoints existed but
            all are damaged; an iterator was given but no data position is stored.
        """
        self._join()
        step = self._newest_good()
        if step is None:
            return None
        folder = self.directory / str(step)
        info = json.loads((folder / _INFO).read_bytes())
        stored = leaf_store.rows_of(info)
        wanted = [
            leaf_store.describe(leaf_store.leaf_path(key), leaf)
            for key, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
        ]
        leaf_store.check_match(stored, wanted, step, subset=subset)
        if data_iterator is not None:
            # With another number of processes all start from the position of process 0: pipelines
            # count global batches, so the position is the same in every process.
            process = self._process if info["processes"] == self._processes else 0
            path = folder / "data" / f"{process}.json"
            if not path.exists():
                raise UserError(
                    f"checkpoint of step {step} holds no data position",
                    fix="start anew with another --workdir",
                )
            position = decode_json(json.loads(path.read_bytes()))
        try:
            state = leaf_store.load_leaves(folder / "state", stored, abstract_state)
        except Exception as error:
            # Every byte is as written, so falling back to an older step would hide the cause.
            raise UserError(
                f"checkpoint of step {step} is intact but cannot be read: {describe_error(error)}",
                allowed=f"the versions that wrote it: {info['versions']}",
            ) from error
        if data_iterator is not None:
            data_iterator.set_state(position)
        return step, state, decode_json(info["metadata"])

    def sha256(self, step: int, part: str = "") -> str:
        """`state_sha256` of a committed step, or of a part of it such as "params".

        This process reads leaf after leaf by itself, so that it works for states that are spread
        over processes and fit on no single device.
        """
        folder = self.directory / str(step)
        rows = leaf_store.rows_of(json.loads((folder / _INFO).read_bytes()))
        head = f"{part}/" if part else ""

        def read(row: dict[str, Any]) -> leaf_store.Leaf:
            like = {row["path"]: np.empty(())}
            (leaf,) = leaf_store.snapshot(leaf_store.load_leaves(folder / "state", rows, like))
            return dataclasses.replace(leaf, path=row["path"].removeprefix(head))

        chosen = (row for row in rows if row["path"].startswith(head))
        return leaf_store.sha256_of(map(read, sorted(chosen, key=lambda row: row["path"])))

    def _newest_good(self) -> int | None:
        step, lost = None, False
        if self._process == 0:
            if self._read_only:
                self._commits.load()
            step, lost = self._commits.newest_verified()
        if self._processes > 1:
            from jax.experimental import multihost_utils

            mine = np.array([-1 if step is None else step, lost], np.int32)
            chosen = multihost_utils.broadcast_one_to_all(mine)
            step, lost = None if chosen[0] < 0 else int(chosen[0]), bool(chosen[1])
            self._commits.load()
        if step is None and lost:
            raise UserError(
                f"{self.directory}: no usable checkpoint is left, all that existed are damaged",
                fix="restore the folder from a copy, or delete it to start from scratch",
            )
        return step

    # ---- several processes -------------------------------------------------------------------

    def _barrier(self, name: str) -> None:
        if self._processes > 1 and not self._read_only:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def _agree(self, good: bool) -> bool:
        """True if it is good in all processes: one that fails must not leave the others waiting."""
        if self._processes == 1:
            return good
        from jax.experimental import multihost_utils

        return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def describe_error(error: BaseException | None) -> str:
    """One line for an I/O error, whatever library raised it."""
    if error is None:
        return "another process failed"
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "disk full (no space left on device)"
    return f"{type(error).__name__}: {text[:300]}"
