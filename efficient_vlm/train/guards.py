"""Guards of a run: stop signals and steps that are not finite.

The guards of a workdir (its lock and its config) are in `lock` and `workdir_config`, and can be
imported from here as well.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.terminal import print_warning
from efficient_vlm.train.lock import WorkdirLock
from efficient_vlm.train.workdir_config import check_workdir_config, compare_config

__all__ = [
    "NonFiniteGuard",
    "StopSignal",
    "TrainingDiverged",
    "WorkdirLock",
    "check_workdir_config",
    "compare_config",
]


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between steps.

    The first signal sets the flag and prints one line; the loop finishes its step, saves and exits
    with `exit_code`. A second signal ends the process at once with that code, even while the main
    thread is inside a long compilation, where Python's own handlers cannot run: a thread listens
    on the wake-up descriptor. Repeats within `debounce` seconds count as one, because `timeout`
    and process managers send the same signal to the process and to its group.

    Outside the main thread this does nothing: `requested` stays False. In a notebook, where the
    event loop owns the wake-up descriptor, the flag works and the second signal waits for Python.

    Args:
      signals: what to catch.
      debounce: seconds.
      exit: replaces `os._exit` in tests.

    Attributes:
      signum: the first signal caught, or None.
    """

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT),
        *,
        debounce: float = 0.25,
        exit: Callable[[int], Any] = os._exit,
    ):
        self.signum: int | None = None
        self._signals, self._debounce, self._exit = tuple(signals), debounce, exit
        self._first = 0.0
        self._old: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._old_descriptor = -1
        self._lock = threading.RLock()  # re-entrant: a handler may interrupt itself

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signum is not None

    @property
    def exit_code(self) -> int | None:
        """143 after SIGTERM, 130 after SIGINT, None without a signal."""
        return None if self.signum is None else 128 + self.signum

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self._signals:
            self._old[number] = signal.signal(number, self._handle)
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._old_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if self._old_descriptor != -1:
            signal.set_wakeup_fd(self._old_descriptor)
            reader.close()
            writer.close()
        else:
            self._sockets = (reader, writer)
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            # None: the handler was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}
        if self._sockets is not None:
            signal.set_wakeup_fd(-1)
            self._sockets[1].close()  # ends the thread
            self._sockets = None

    def _handle(self, number: int, frame: Any) -> None:
        # With a listening thread this runs second; it only ensures that the flag is set before the
        # main thread's next line.
        self._count(number, again=self._sockets is None)

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in self._signals:
                        self._count(number, again=True)

    def _count(self, number: int, *, again: bool) -> None:
        now = time.monotonic()
        with self._lock:
            first = self.signum is None
            if first:
                self.signum, self._first = number, now
        name = signal.Signals(number).name
        if first:
            _write_stderr(
                f"\n{name}: finishing this step, then saving; once more to quit at once\n"
            )
        elif again and now - self._first > self._debounce:
            _write_stderr(
                f"\n{name} again: quitting at once, the last committed checkpoint stays\n"
            )
            self._exit(128 + number)


def _write_stderr(text: str) -> None:
    # Not print: a handler may interrupt a print, and buffered files are not re-entrant.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


# ---- steps that are not finite -----------------------------------------------------------------


class TrainingDiverged(UserError):
    """Loss or gradient was not finite for too many steps in a row; no bad update was applied.

    Attributes:
      step: the last bad step.
      records: record numbers of its batch.
    """

    def __init__(
        self, step: int, limit: int, records: list[int], dump: Path | None, last: int | None
    ):
        shown = ", ".join(map(str, records[:8])) + (", ..." if len(records) > 8 else "")
        where = f"; batch in {dump}" if dump else ""
        super().__init__(
            f"training diverged: loss or gradient not finite for {limit} steps in a row, up to "
            f"step {step} (records {shown or 'unknown'}{where})",
            fix="look at the batch, or lower the learning rate in a new --workdir"
            + (f" with train.init_from (step {last} is saved)" if last is not None else ""),
        )
        self.step, self.records = step, records


class NonFiniteGuard:
    """Counts skipped steps on the host, dumps their batches, and ends a run that only skips.

    On the device `select_finite` keeps the bad update away from the weights.

    Args:
      workdir: batches go to `<workdir>/bad_batches/step_<n>.npz`.
      limit: consecutive bad steps after which training ends.
      max_dumps: batches written at most by one process.
      warn: receives one line per bad step.

    Attributes:
      consecutive: bad steps since the last good one.
      total: bad steps of the run (the metric `skipped`).
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        limit: int = 3,
        *,
        max_dumps: int = 10,
        warn: Callable[[str], None] | None = None,
    ):
        checks.whole("train.nonfinite_limit", limit)
        self.directory = Path(workdir) / "bad_batches"
        self.limit, self.consecutive, self.total = limit, 0, 0
        self._dumps_left, self._warn = max_dumps, warn or print_warning

    def update(
        self,
        step: int,
        ok: Any,
        batch: Mapping[str, Any] | None = None,
        *,
        last_checkpoint: int | None = None,
    ) -> bool:
        """Takes the flag of one step.

        Args:
          step: its number.
          ok: bool, NumPy bool or device scalar; waiting for it is the only cost of a good step.
          batch: the batch of that step (a flat mapping; `index` int [B] names the records).
          last_checkpoint: newest committed step, for the message.

        Returns:
          `ok` as a bool.

        Raises:
          TrainingDiverged: this was the `limit`-th bad step in a row.
        """
        if bool(ok):
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.total += 1
        batch = batch or {}
        records = [int(each) for each in np.ravel(np.asarray(batch.get("index", [])))]
        dump = self._dump(step, batch)
        if self.consecutive >= self.limit:
            raise TrainingDiverged(step, self.limit, records, dump, last_checkpoint)
        self._warn(
            f"step {step}: loss or gradient not finite, update skipped "
            f"({self.consecutive} of {self.limit} in a row; {self.total} in all)"
        )
        return False

    def state(self) -> dict[str, int]:
        """Counters for the metadata of a checkpoint."""
        return {"consecutive": self.consecutive, "total": self.total}

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from counters that `state` returned."""
        self.consecutive, self.total = int(state["consecutive"]), int(state["total"])

    def _dump(self, step: int, batch: Mapping[str, Any]) -> Path | None:
        if self._dumps_left <= 0 or not batch:
            return None
        self._dumps_left -= 1
        path = self.directory / f"step_{step}.npz"
        try:
            arrays = {name: np.asarray(value) for name, value in batch.items()}
            # The npz format has no bfloat16 or float8; objects would need pickle.
            arrays = {
                name: value.astype(np.float32) if value.dtype.kind == "V" else value
                for name, value in arrays.items()
                if not value.dtype.hasobject
            }
            self.directory.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **arrays)
        except (OSError, ValueError, TypeError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            self._warn(f"batch of step {step} was not written to {path}: {error}")
            return None
        return path
