"""One writer per workdir.

The lock is `flock` on `<workdir>/.lock`: the kernel frees it the moment its owner dies, even by
SIGKILL, and testing and taking it is one atomic step. Some network file systems apply `flock` to
one machine only; therefore the file also names its owner, and its modification time is a heartbeat
that processes on other machines respect. Where `flock` does not work at all, the owner's process
(pid and start time) is looked up instead.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.terminal import print_warning

LOCK = ".lock"
_held: set[int] = set()  # descriptors of this process, closed in forked children


def _close_in_child() -> None:
    # A forked data worker that outlives its killed parent would otherwise keep the lock.
    for descriptor in list(_held):
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def process_start(pid: int) -> str | None:
    """A token that differs between two processes that had the same pid; None if unknown."""
    try:
        # Field 22 of /proc/<pid>/stat; the command in field 2 may itself contain brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _alive(info: dict[str, Any]) -> bool:
    """Whether the owner's process still runs on this machine, and not a new one with its pid."""
    try:
        os.kill(info["pid"], 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, TypeError, OverflowError):
        pass
    return info.get("started") in (None, process_start(info.get("pid", -1)))


class WorkdirLock:
    """Context manager that holds the lock of a workdir.

    Args:
      workdir: created if needed.
      heartbeat: seconds between heartbeats.
      stale_after: seconds without a heartbeat after which an owner on another machine counts as
        dead. On this machine no waiting is needed.
      warn: receives one line when a stale lock is taken over; default stderr.

    Raises (on entry):
      UserError: another live process holds the lock; it says which one, since when, what to do.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        heartbeat: float = 15.0,
        stale_after: float = 120.0,
        warn: Callable[[str], None] | None = None,
    ):
        self.path = Path(workdir) / LOCK
        self._heartbeat, self._stale_after = heartbeat, stale_after
        self._warn = warn or print_warning
        self._flock = True
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "WorkdirLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            exclusive = self._take()
        except OSError as error:
            raise UserError(
                f"--workdir={self.path.parent}: cannot be locked ({error.strerror or error})",
                fix="choose a --workdir that can be written",
            ) from None
        info = self._read()
        if not exclusive:
            self._close()
            raise self._refusal(info)
        if info:
            self._take_over(info)
        self._write(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "boot": _boot(),
                "started": process_start(os.getpid()),
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
        )
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="workdir-lock")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._descriptor is not None:
            # Emptied, not removed: another process may have opened it already, and would then
            # lock a file that no third process can see.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._close()

    def _take(self) -> bool:
        """Opens and locks the file. False if another process holds it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._descriptor = descriptor
            _held.add(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    self._flock = False
                    return True
                self._close()
                raise
            try:
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    return True
            except FileNotFoundError:
                pass
            self._close()  # removed by hand in between: lock the new file

    def _close(self) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> dict[str, Any]:
        try:
            info = json.loads(os.pread(self._descriptor, 4096, 0))
            return info if isinstance(info, dict) else {}
        except ValueError:
            return {}

    def _write(self, info: dict[str, Any]) -> None:
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(info) + "\n").encode(), 0)
        except OSError as error:  # full disk: the lock itself holds
            self._warn(f"{self.path}: owner not written ({error.strerror or error})")

    def _take_over(self, info: dict[str, Any]) -> None:
        """Takes over from the owner that the file names, or refuses if that may still be alive."""
        here, boot = socket.gethostname(), _boot()
        same_host = info.get("host") == here and here not in ("", "localhost")
        if same_host or (boot is not None and info.get("boot") == boot):
            # Same kernel (or this machine before a restart): `flock` alone decides.
            alive, age = not self._flock and _alive(info), None
        else:
            age = time.time() - os.fstat(self._descriptor).st_mtime
            alive = age < self._stale_after
        if alive:
            self._close()
            raise self._refusal(info, age)
        self._warn(
            f"{self.path.parent}: taking over from {_owner(info)}, which ended without cleaning up"
        )

    def _refusal(self, info: dict[str, Any], age: float | None = None) -> UserError:
        same = info.get("host") in (None, socket.gethostname())
        how = f"stop it (kill {info.get('pid', '<pid>')})" if same else "stop it there"
        if age is not None:
            left = max(1, round(self._stale_after - age))
            how += f", or if that machine is gone wait {left} s"
        return UserError(
            f"--workdir={self.path.parent}: in use by {_owner(info)}",
            fix=f"{how}, or use another --workdir",
        )

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def _owner(info: dict[str, Any]) -> str:
    if not info:
        return "another process"
    return f"process {info.get('pid')} on {info.get('host')} since {info.get('since')}"
