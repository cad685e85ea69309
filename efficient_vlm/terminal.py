"""What a person sees while a run goes on: a bar on a terminal, plain lines in a pipe or a log.

Imports neither JAX nor (until a bar is drawn) rich. Nothing here may stop a run: a closed pipe or a
broken terminal silences the display.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

# Metric -> how it is shown; other metrics are not shown.
_SHOWN = {
    "loss": lambda value: f"loss {value:.4f}",
    "accuracy": lambda value: f"accuracy {value:.3f}",
    "images_per_second": lambda value: f"{value:.0f} images/s",
    "data_wait_fraction": lambda value: f"data wait {100 * value:.1f} %",
    "budget": lambda value: f"budget {value:.0f}",
    "skipped": lambda value: f"skipped {value:.0f}" if value else "",
}


def print_warning(message: str) -> None:
    """One line on stderr; the default for everything in `train` that warns."""
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def format_metrics(values: Mapping[str, Any]) -> str:
    """ "loss 1.2345  accuracy 0.500  ..." of the metrics that a person watches.

    Args:
      values: Python, NumPy or device scalars; converted only here, so that a step whose line is
        not shown never waits for the device.
    """
    parts = [
        show(float(values[name])) for name, show in _SHOWN.items() if values.get(name) is not None
    ]
    return "  ".join(part for part in parts if part)


def format_seconds(seconds: float) -> str:
    """ "0:07", "12:30" or "2:05:00"."""
    minutes, seconds = divmod(int(max(0, seconds) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Compiling:
    """Prints a line per program that is compiled: "[0:12] compiling 2 of 9: divprune, prefill".

    Lines are plain, also on a terminal, and go to stderr, so that stdout stays free for results.

    Args:
      total: number of programs, or an upper bound.
      at_most: whether `total` is an upper bound.
      quiet: print nothing.
    """

    def __init__(self, total: int, *, at_most: bool = False, quiet: bool = False):
        self._total = f"{'at most ' if at_most else ''}{total}"
        self._quiet, self._count, self._start = quiet, 0, time.monotonic()

    def __call__(self, what: str) -> None:
        """To be called before each program."""
        self._count += 1
        self._say(f"compiling {self._count} of {self._total}: {what}")

    def done(self) -> None:
        """To be called after the last program."""
        plural = "" if self._count == 1 else "s"
        self._say(f"compiled {self._count} program{plural}")

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        seconds = format_seconds(time.monotonic() - self._start)
        with contextlib.suppress(OSError, ValueError):
            print(f"[{seconds}] {text}", file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """True in a Jupyter or Colab kernel."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Progress:
    """The display of one run, as a context manager.

    On a terminal: one live bar. In a notebook: one line that is updated. Otherwise plain lines
    without control codes: the first step, then every `log_every` steps or `every_seconds`.

    Args:
      total: number of the last step.
      start: the step resumed from (0 for a new run); the time left is estimated from steps done
        by this process.
      log_every: steps between plain lines.
      every_seconds: longest time without a plain line while steps are being done.
      file: where to write; default stdout at the time of entry.
      quiet: show only messages, no steps (for all processes of a run but the first).
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        log_every: int = 50,
        every_seconds: float = 5.0,
        file: TextIO | None = None,
        quiet: bool = False,
    ):
        self.total, self.start, self._quiet = total, start, quiet
        self._log_every, self._every_seconds = max(1, log_every), every_seconds
        self._file = file
        self._bar: Any = None
        self._task: Any = None
        self._handle: Any = None
        self._mark: tuple[float, int] | None = None  # when and where the time estimate starts
        self._line_time = 0.0
        self._line_step: int | None = None
        self._last: tuple[int, Mapping[str, Any]] | None = None

    def __enter__(self) -> "Progress":
        if self._file is None:
            self._file = sys.stdout
        self._line_time = time.monotonic()
        if self._quiet or in_notebook():
            return self
        with contextlib.suppress(Exception):
            self._open_bar()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._last and self._line_step != self._last[0]:
            self._plain(*self._last)
        if self._bar is not None:
            with contextlib.suppress(Exception):
                self._bar.stop()
            self._bar = None

    def _open_bar(self) -> None:
        # Only isatty counts: FORCE_COLOR and the like must not put control codes into a log file.
        if not self._file.isatty():
            return
        from rich import progress as rich_progress
        from rich.console import Console

        console = Console(file=self._file)
        if console.is_dumb_terminal or not console.is_terminal:
            return
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("step"),
            rich_progress.MofNCompleteColumn(),
            rich_progress.BarColumn(bar_width=20),
            rich_progress.TextColumn("{task.fields[left]}"),
            rich_progress.TextColumn("{task.fields[metrics]}"),
            console=console,
            refresh_per_second=5,
        )
        self._task = self._bar.add_task(
            "train", total=self.total, completed=self.start, metrics="", left=""
        )
        self._bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows that `step` is done, with its metrics (see `format_metrics`)."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._mark is None:
            # The first step compiles; counting from its end keeps that out of the estimate.
            self._mark = (now, step)
        self._last = (step, values)
        if self._bar is not None:
            due = step == self.total or now - self._line_time >= 0.2 or self._line_step is None
            if due:
                self._line_time, self._line_step = now, step
                with contextlib.suppress(Exception):
                    self._bar.update(
                        self._task,
                        completed=step,
                        metrics=format_metrics(values),
                        left=self._left(step),
                    )
            return
        first = self._line_step is None
        if in_notebook():
            due = now - self._line_time >= 0.5
        else:
            due = step % self._log_every == 0 or now - self._line_time >= self._every_seconds
        if first or due or step == self.total:
            self._plain(step, values)

    def message(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        with contextlib.suppress(Exception):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._file or sys.stdout, flush=True)

    def _left(self, step: int) -> str:
        when, first = self._mark
        if step <= first:
            return "left ?"
        rate = (time.monotonic() - when) / (step - first)
        return f"left {format_seconds(rate * (self.total - step))}"

    def _plain(self, step: int, values: Mapping[str, Any]) -> None:
        self._line_time, self._line_step = time.monotonic(), step
        if self._bar is not None:
            return
        line = f"step {step}/{self.total}  {format_metrics(values)}  {self._left(step)}"
        if not in_notebook():
            self.message(line)
            return
        with contextlib.suppress(Exception):
            from IPython import display

            content = {"text/plain": line}
            if self._handle is None:
                self._handle = display.display(content, raw=True, display_id=True)
            else:
                self._handle.update(content, raw=True)


@contextlib.contextmanager
def stage(name: str, progress: Progress | None = None) -> Iterator[None]:
    """Prints "name ..." and, at the end, the time taken; for data, compilation, evaluation.

    Args:
      name: e.g. "building data".
      progress: the display to print above; None for plain stdout.
    """
    show = progress.message if progress is not None else _print
    start = time.monotonic()
    show(f"{name} ...")
    yield
    show(f"{name}: {time.monotonic() - start:.1f} s")


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)
