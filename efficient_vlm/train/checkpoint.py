"""Checkpoints that are committed, verified and never half there.

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
any point leaves either a committed step or leftovers that the next start clears away; a step that
is not in the index is never used.
"""

import base64
import dataclasses
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import efficient_vlm
from efficient_vlm.errors import UserError
from efficient_vlm.train import leaves as leaf_store
from efficient_vlm.train import manifest
from efficient_vlm.train.leaves import NonFiniteState, state_sha256
from efficient_vlm.train.manifest import Damaged

__all__ = [
    "Checkpoints",
    "Damaged",
    "NonFiniteState",
    "SaveFailed",
    "SaveReport",
    "state_sha256",
]

_TEMPORARY = ".tmp-"
_INFO = "checkpoint.json"


class SaveFailed(RuntimeError):
    """A save that did not happen (full disk, I/O error); earlier steps are intact, training can go on.

    Attributes:
      step: the step that was not saved.
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"checkpoint of step {step} was not written: {reason}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class SaveReport:
    """What one save cost; times in seconds, size in bytes.

    `stall` is the time for which the caller waited, `total` the time until the step was committed,
    `manifest` the part of it spent on fsync, digests and the manifest.
    """

    step: int
    stall: float
    total: float
    manifest: float
    size: int


def print_warning(message: str) -> None:
    """The default place for warnings: one line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run; one writer at a time (see `guards.WorkdirLock`).

    Args:
      directory: a local or shared POSIX folder, created if needed.
      keep: how many of the newest steps to keep.
      keep_every: steps divisible by this are kept for ever; None for no such steps.
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
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(
                f"checkpoint.keep={keep}, checkpoint.keep_every={keep_every}",
                allowed="keep >= 1; keep_every >= 1 or None",
            )
        self.directory = Path(directory).absolute()
        self.last_save: SaveReport | None = None
        self.failures = 0
        self._keep, self._keep_every = keep, keep_every
        self._warn = warn or print_warning
        self._read_only = read_only
        self._processes, self._process = jax.process_count(), jax.process_index()
        self._background = background and self._processes == 1
        self._thread: threading.Thread | None = None
        self._pending: int | None = None
        self._error: SaveFailed | None = None
        self._steps: dict[int, str | None] = {}
        self._deleting: list[int] = []
        self._damaged: list[int] = []
        if not read_only and self._process == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"checkpoint directory {self.directory}: {error.strerror}",
                    fix="choose a --workdir that can be written",
                ) from None
        self._barrier("checkpoints.directory")
        if not read_only and self._process == 0:
            self._recover()
        self._barrier("checkpoints.recover")
        self._load_index()

    # ---- what is there -----------------------------------------------------------------------

    def committed(self) -> list[int]:
        """Committed steps, oldest first; a save still under way is not among them."""
        if self._read_only:
            self._load_index()
        return sorted(self._steps)

    def _load_index(self) -> None:
        try:
            index = manifest.read_index(self.directory)
        except Damaged as error:
            if not self._read_only:
                raise
            self._warn(f"{self.directory / str(error)}; reading the step folders instead")
            index = None
        if index is None:
            self._steps, self._deleting, self._damaged = dict.fromkeys(self._folders()), [], []
            return
        self._steps = {int(step): digest for step, digest in index["steps"].items()}
        self._deleting, self._damaged = list(index["deleting"]), list(index["damaged"])

    def _folders(self) -> list[int]:
        """Steps that have a folder, committed or not."""
        if not self.directory.is_dir():
            return []
        names = [entry.name for entry in self.directory.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def _write_index(self) -> None:
        manifest.write_index(self.directory, self._steps, self._deleting, self._damaged)

    def _recover(self) -> None:
        """Puts the directory in order after whatever ended the last process."""
        try:
            index = manifest.read_index(self.directory)
            lost = "missing" if index is None and self._folders() else None
        except Damaged as error:
            index, lost = None, str(error)
            self._set_aside(manifest.INDEX, "damaged")
        if lost:
            # Better than a restart from nothing; each folder is still verified before use.
            self._warn(f"{self.directory / manifest.INDEX} is {lost}: rebuilt from the step folders")
        if index is None:
            self._steps = dict.fromkeys(self._folders())
            self._write_index()
        self._load_index()
        for entry in self.directory.iterdir():
            if entry.name.startswith(_TEMPORARY):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(f".{manifest.INDEX}."):
                entry.unlink(missing_ok=True)
        self._delete_old()
        for step in set(self._folders()) - self._steps.keys() - set(self._deleting):
            # Killed between rename and index. Not used, but not ours to delete either: it could
            # be a folder that someone moved here by hand.
            name = self._set_aside(str(step), "uncommitted")
            self._warn(f"checkpoint of step {step} was never committed: renamed to {name}")

    def _set_aside(self, name: str, word: str) -> str:
        number = 1
        while (self.directory / f"{name}.{word}-{number}").exists():
            number += 1
        target = f"{name}.{word}-{number}"
        (self.directory / name).rename(self.directory / target)
        manifest.fsync_directory(self.directory)
        return target

    def _delete_old(self) -> None:
        for step in self._deleting:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)
        self._deleting = [step for step in self._deleting if (self.directory / str(step)).exists()]

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
          metadata: what JSON can hold, NumPy arrays, bytes; handed back by `restore_latest`.
          wait: return only when the step is committed.

        Returns:
          False if the step was there already.

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
        if step in self._steps:
            return False
        if self._steps and step < max(self._steps):
            raise ValueError(f"step {step} is older than committed step {max(self._steps)}")
        leaves = leaf_store.snapshot(state)
        bad = next((leaf.path for leaf in leaves if not leaf_store.all_finite(leaf.value)), None)
        if not self._agree(bad is None):
            raise NonFiniteState(bad or "on another process")
        info = {
            "format": 1,
            "step": step,
            "leaves": [leaf.spec for leaf in leaves],
            "metadata": encode_json(metadata or {}),
            "processes": self._processes,
            "versions": {"efficient_vlm": efficient_vlm.__version__, "jax": jax.__version__},
        }
        files = {_INFO: json.dumps(info, allow_nan=False).encode()} if self._process == 0 else {}
        if data_iterator is not None:
            position = json.dumps(encode_json(data_iterator.get_state()), allow_nan=False)
            files[f"data/{self._process}.json"] = position.encode()
        self._check_space(step, sum(leaf.value.nbytes for leaf in leaves))

        copied = time.monotonic()
        if self._background and not wait:
            # Not a daemon: the interpreter waits for it at exit, as for close().
            self._thread = threading.Thread(
                target=self._write_quietly,
                args=(step, leaves, files, start, copied),
                name=f"checkpoint-{step}",
            )
            self._pending = step
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
            self._thread, self._pending = None, None

    def _check_space(self, step: int, size: int) -> None:
        # Twice the size: the new step must fit beside the old ones, and so must whatever else the
        # run writes until old steps are deleted.
        last = self.last_save.size if self.last_save else 0
        need = 2 * max(size, last) + (1 << 16)
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            self._fail(step, f"{self.directory}: {error.strerror or error}")
        if not self._agree(free >= need):
            self._fail(step, f"disk full: {free / 1e6:.1f} MB free, {need / 1e6:.1f} MB wanted")

    def _fail(self, step: int, reason: str, cause: BaseException | None = None) -> None:
        self.failures += 1
        raise SaveFailed(step, reason) from cause

    def _write_quietly(self, step: int, *rest: Any) -> None:
        try:
            self._write(step, *rest)
        except SaveFailed as error:
            self._error = error
            self._warn(str(error))
        except Exception as error:  # a thread has no caller to raise to
            self.failures += 1
            self._error = SaveFailed(step, f"{type(error).__name__}: {error}")
            self._warn(str(self._error))

    def _write(
        self,
        step: int,
        leaves: list[leaf_store.Leaf],
        files: dict[str, bytes],
        start: float,
        copied: float | None,
    ) -> None:
        temporary, final = self.directory / f"{_TEMPORARY}{step}", self.directory / str(step)
        primary, reason, cause = self._process == 0, "", None
        try:
            if primary:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            self._barrier("checkpoints.temporary")
            leaf_store.save_leaves(temporary / "state", leaves)
            for name, content in files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_bytes(content)
        except Exception as error:
            reason, cause = _reason(error), error
        hashing = time.monotonic()
        manifest_seconds, size = 0.0, 0
        if self._agree(not reason) and primary:
            try:
                digest, size = manifest.write_manifest(temporary, step)
                manifest_seconds = time.monotonic() - hashing
                self._commit(step, temporary, final, digest)
            except Exception as error:
                reason, cause = _reason(error), error
        if not self._agree(not reason):
            if primary:
                shutil.rmtree(temporary, ignore_errors=True)
            self._fail(step, reason or "another process failed", cause)
        if primary:
            self._delete_old()
        else:
            self._load_index()
        self.failures = 0
        end = time.monotonic()
        stall = (copied or end) - start
        self.last_save = SaveReport(step, stall, end - start, manifest_seconds, size)

    def _commit(self, step: int, temporary: Path, final: Path, digest: str) -> None:
        if final.exists():
            self._set_aside(str(step), "uncommitted")
        before = self._steps, self._deleting, self._damaged
        steps = {**self._steps, step: digest}
        newest = sorted(steps)[-self._keep :]
        kept = {s for s in steps if s in newest or (self._keep_every and s % self._keep_every == 0)}
        os.rename(temporary, final)
        try:
            manifest.fsync_directory(self.directory)
            self._steps = {s: steps[s] for s in kept}
            self._deleting = sorted({*self._deleting, *(steps.keys() - kept)})
            self._damaged = []
            # One write commits the new step and gives up the old ones, in this order of safety:
            # folders are deleted only after it.
            self._write_index()
        except BaseException:
            self._steps, self._deleting, self._damaged = before
            os.rename(final, temporary)
            raise

    # ---- restore -----------------------------------------------------------------------------

    def restore_latest(
        self, abstract_state: Any, data_iterator: Any = None, *, subset: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest good step; damaged ones are set aside with a warning.

        Args:
          abstract_state: the state's structure: arrays, or `jax.ShapeDtypeStruct` with shardings
            (any layout; it need not be the one that saved).
          data_iterator: its `set_state` is called last; None leaves the position alone.
          subset: allow `abstract_state` to ask for part of the checkpoint (e.g. only the
            parameters, for evaluation); the rest is not read.

        Returns:
          (step, state, metadata), or None if there never was a checkpoint.

        Raises:
          UserError: structure, shape or dtype differ (names the leaf); checkpoints existed but
            none is good any more; no data position is stored though an iterator was given.
        """
        self._join()
        step = self._newest_good()
        if step is None:
            return None
        folder = self.directory / str(step)
        info = json.loads((folder / _INFO).read_bytes())
        wanted = [
            leaf_store.describe(leaf_store.leaf_path(key), leaf)
            for key, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
        ]
        leaf_store.check_match(info["leaves"], wanted, step, subset=subset)
        position = None
        if data_iterator is not None:
            # With another number of processes, all start from the position of process 0: our
            # pipelines count global batches, so that it is the same everywhere.
            same = info["processes"] == self._processes
            path = folder / "data" / f"{self._process if same else 0}.json"
            if not path.exists():
                raise UserError(
                    f"checkpoint of step {step} holds no data position",
                    fix="start anew with another --workdir",
                )
            position = decode_json(json.loads(path.read_bytes()))
        try:
            state = leaf_store.load_leaves(folder / "state", info["leaves"], abstract_state)
        except Exception as error:
            # Every byte is as written, so this is no damage: fall back would hide the cause.
            raise UserError(
                f"checkpoint of step {step} is intact but cannot be read: {_reason(error)}",
                allowed=f"the versions that wrote it: {info['versions']}",
            ) from error
        if data_iterator is not None:
            data_iterator.set_state(position)
        return step, state, decode_json(info["metadata"])

    def _newest_good(self) -> int | None:
        step, lost = -1, False
        if self._process == 0 or self._read_only:
            step, lost = self._verified_step()
        if self._processes > 1 and not self._read_only:
            from jax.experimental import multihost_utils

            chosen = multihost_utils.broadcast_one_to_all(np.array([step, lost], np.int32))
            step, lost = int(chosen[0]), bool(chosen[1])
            self._load_index()
        if step < 0 and lost:
            raise UserError(
                f"{self.directory}: no usable checkpoint is left, all that existed are damaged",
                fix="restore the folder from a copy, or delete it to start from scratch",
            )
        return step if step >= 0 else None

    def _verified_step(self) -> tuple[int, bool]:
        if self._read_only:
            self._load_index()
        lost = bool(self._damaged)
        for step in sorted(self._steps, reverse=True):
            try:
                manifest.verify(self.directory / str(step), step, self._steps[step])
                return step, lost
            except Damaged as error:
                lost = True
                self._quarantine(step, str(error))
        if not lost and self.directory.is_dir():
            lost = any(self.directory.glob("*.damaged-*"))
        return -1, lost

    def _quarantine(self, step: int, reason: str) -> None:
        digest = self._steps.pop(step)
        older = [s for s in sorted(self._steps, reverse=True) if s < step]
        then = f"falling back to step {older[0]}" if older else "no older step is left"
        where = self.directory / str(step)
        if self._read_only:
            self._steps[step] = digest
            self._warn(f"checkpoint {where} is damaged ({reason}); {then}")
            return
        name = self._set_aside(str(step), "damaged") if where.exists() else "nothing (missing)"
        self._damaged.append(step)
        self._write_index()
        self._warn(f"checkpoint {where} is damaged ({reason}): renamed to {name}; {then}")

    # ---- several processes -------------------------------------------------------------------

    def _barrier(self, name: str) -> None:
        if self._processes > 1 and not self._read_only:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def _agree(self, good: bool) -> bool:
        """True if all processes say so; keeps one failing process from leaving the others waiting."""
        if self._processes == 1:
            return good
        from jax.experimental import multihost_utils

        return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "disk full (no space left on device)"
    return f"{type(error).__name__}: {text[:300]}"


def encode_json(value: Any) -> Any:
    """JSON form from which `decode_json` gives back the same value exactly.

    Beside JSON's own types: tuples, bytes, NumPy arrays and numbers, NaN and Inf, keys that are
    not strings.

    Raises:
      TypeError: any other type.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if np.isfinite(value) else {"__float__": repr(value)}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        kind = "__array__" if isinstance(value, np.ndarray) else "__scalar__"
        return {kind: [value.dtype.str, list(value.shape), data]}
    if isinstance(value, list):
        return [encode_json(each) for each in value]
    if type(value) is tuple:
        return {"__tuple__": [encode_json(each) for each in value]}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        if plain:
            return {key: encode_json(each) for key, each in value.items()}
        return {"__dict__": [[encode_json(k), encode_json(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def decode_json(value: Any) -> Any:
    """The inverse of `encode_json`."""
    if isinstance(value, list):
        return [decode_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "__float__":
            return float(content)
        if tag == "__bytes__":
            return base64.b64decode(content)
        if tag in ("__array__", "__scalar__"):
            dtype, shape, data = content
            array = np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
            return array if tag == "__array__" else array[()]
        if tag == "__tuple__":
            return tuple(decode_json(each) for each in content)
        if tag == "__dict__":
            return {decode_json(k): decode_json(v) for k, v in content}
    return {key: decode_json(each) for key, each in value.items()}
