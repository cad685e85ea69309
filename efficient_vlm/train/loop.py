"""The one training loop. Order of every step: save, next batch, update, log."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_vlm import runtime
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.data.pipeline import check_fingerprint
from efficient_vlm.data.reader import Reader
from efficient_vlm.data.skips import told
from efficient_vlm.terminal import Progress
from efficient_vlm.train.arms import Arm, draw_arm, make_arms, make_model
from efficient_vlm.train.goodput import Goodput
from efficient_vlm.train.guards import NonFiniteGuard, StopSignal
from efficient_vlm.train.metrics import MetricsWriter
from efficient_vlm.train.optimizer import schedule
from efficient_vlm.train.parameters import start_from
from efficient_vlm.train.prepare import prepare
from efficient_vlm.train.processes import is_first, largest, skipped_by_any
from efficient_vlm.train.saving import save_state
from efficient_vlm.train.setup import Setup
from efficient_vlm.train.trained import Trained, digests

__all__ = ["Arm", "Stopped", "draw_arm", "make_arms", "make_model", "train"]


class Stopped(Exception):
    """A signal ended the run after its state was saved; `exit_code` is 130 or 143."""

    def __init__(self, exit_code: int, step: int):
        super().__init__(f"stopped after step {step}")
        self.exit_code, self.step = exit_code, step


def train(
    config: Mapping[str, Any],
    workdir: Path,
    *,
    stop: StopSignal,
    say: Callable[[str], None] = print,
    around: Callable[[Setup], Setup] = lambda setup: setup,
) -> Trained:
    """Trains, or continues, the run in `workdir` up to its last step.

    Args:
      config: the whole config.
      workdir: locked, and with a config.json that fits.
      stop: read between steps.
      say: receives lines for the user.
      around: what rooms above this one do to the programs of the steps.

    Raises:
      UserError: a mistake in the config, or training diverged.
      Stopped: a signal came; the state is saved.
    """
    start_time = time.monotonic()
    # 1. Settings, data, models, step programs.
    setup = around(prepare(config, workdir, say))
    settings, pipeline, labels = setup.settings, setup.pipeline, [a.label for a in setup.arms]
    say(f"Data: {len(pipeline.source)} training images, tasks {', '.join(pipeline.tasks)}")
    total = setup.total_params or setup.num_params
    of = f"{setup.num_params:,} of " if total != setup.num_params else ""
    say(f"Model: {of}{total:,} parameters, trained at {', '.join(labels)}")

    # 2. The files of the run.
    progress = Progress(settings.steps, quiet=not is_first())
    speaker = "" if is_first() else f"process {jax.process_index()}: "

    def warn(line: str) -> None:
        progress.message(f"warning: {speaker}{line}")

    batches = Reader(pipeline, warn)
    keep = dict(keep=settings.keep, keep_every=settings.keep_every)
    with (
        Checkpoints(workdir / "checkpoints", **keep, warn=warn) as checkpoints,
        MetricsWriter(workdir, settings.tensorboard, warn=warn)
        if is_first()
        else contextlib.nullcontext() as writer,
    ):
        run = _Run(setup, workdir, batches, checkpoints, writer, progress, warn, start_time)
        # 3. The newest checkpoint, or a fresh state.
        first = run.restore(say)
        # 4. All steps that are left, then the last checkpoint.
        run.train_steps(first, stop)
        seconds = run.finish(first)

    # 5. What results.json says of it.
    skipped = skipped_by_any(pipeline.skips)
    if skipped:
        say(f"Data: {told(skipped, len(pipeline.source), 'training samples skipped')}")
    summary = {
        "steps": settings.steps,
        "seconds": round(seconds, 1),
        "params": total,
        "seeds": {
            "train": settings.seed,
            "data": setup.data.seed,
            "dataset": setup.data.dataset_seed,
        },
        "skipped_steps": run.guard.total,
        "samples": len(pipeline.source),
        "skipped_samples": skipped,
        "compilations": setup.compilations,
    }
    if total != setup.num_params:
        summary["trained_params"] = setup.num_params
    if by_source := pipeline.by_source(settings.steps):
        summary["sources"] = by_source
    summary |= digests(run.state, settings.steps, workdir, warn)
    params = setup.whole(run.state.get("ema", run.state["params"]))
    return Trained(setup.model, params, setup.mesh, pipeline, summary, setup.processor)


@dataclasses.dataclass
class _Run:
    """The state of a run in this process, and everything that is written about it.

    Attributes:
      setup: what stays the same.
      workdir: of the run.
      batches: the training batches.
      checkpoints, writer, progress: where states, metrics and lines go; no writer in processes
        other than the first.
      warn: receives lines for the user.
      start_time: of `train`, on the monotonic clock.
      earlier_seconds: of the processes before this one.
      state: the training state after the last step.
      pending: arguments of `_log` for the step before.
    """

    setup: Setup
    workdir: Path
    batches: Reader
    checkpoints: Checkpoints
    writer: MetricsWriter | None
    progress: Progress
    warn: Callable[[str], None]
    start_time: float
    earlier_seconds: float = 0.0
    state: Any = None
    pending: tuple | None = None

    def __post_init__(self):
        self.settings, optimizer = self.setup.settings, self.setup.optimizer
        # Several processes see different rows, so each dumps bad batches into a folder of its own.
        single = jax.process_count() == 1
        own_dir = self.workdir if single else self.workdir / f"process_{jax.process_index()}"
        self.guard = NonFiniteGuard(own_dir, self.settings.nonfinite_limit, warn=self.warn)
        self.goodput = Goodput(self.workdir, warn=self.warn, keep=is_first())
        self.rate = schedule(optimizer, self.settings.steps, optimizer.learning_rate)

    def restore(self, say: Callable[[str], None]) -> int:
        """Reads the newest checkpoint, or makes a fresh state; returns the last step done (or 0).

        Raises:
          UserError: a checkpoint of another model or of other data, or none that is usable.
        """
        setup, settings, first = self.setup, self.settings, 0
        restored = self.checkpoints.restore_latest(setup.start.shapes, self.batches)
        if restored is not None:
            first, self.state, metadata = restored
            check_fingerprint(
                metadata["data"], setup.pipeline.fingerprint, allow=setup.data.allow_data_change
            )
            self.guard.load(metadata["guard"])
            self.earlier_seconds = metadata["seconds"]
            self.goodput.resume(metadata.get("goodput"))
            # Checkpoints of before do not say.
            setup.pipeline.skips.load(metadata.get("skipped_samples", {}))
            say(
                f"Resuming from step {first} of {settings.steps}"
                if first < settings.steps
                else f"Training was already finished at step {first}: nothing is trained again"
            )
        else:
            self.state = setup.start.state()
            self.goodput.resume(None)
            if settings.init_from is not None:
                self.state = start_from(self.state, Path(settings.init_from))
                say(f"Starting from the parameters of {settings.init_from}")
        if self.writer is not None:
            self.writer.truncate_after(first)
        return first

    def train_steps(self, first: int, stop: StopSignal) -> None:
        """All steps after `first`.

        Raises:
          UserError: training diverged, or checkpoints cannot be written.
          Stopped: a signal came; the state is saved.
        """
        setup, settings, goodput = self.setup, self.settings, self.goodput
        self.progress.start = first
        goodput.add("compile", setup.compile_seconds)
        goodput.add("start", time.monotonic() - self.start_time - setup.compile_seconds)
        with self.progress:
            mark = time.monotonic()
            for step in range(first + 1, settings.steps + 1):
                # 1. Save, at a multiple of `checkpoint_every` or before stopping.
                saved = self._save_if_due(step - 1, first, self._stop_code(stop, step - 1))
                # 2. The next batch.
                before = time.monotonic()
                batch = next(self.batches)
                waited = time.monotonic() - before
                # 3. The update. The step runs on the device while the host goes on.
                index = draw_arm(setup.arms, settings.seed, step, settings.steps)
                program = setup.programs[index]
                programs, before = program._cache_size(), time.monotonic()
                self.state, metrics = program(self.state, setup.inputs(batch))
                compiled = 0.0
                if program._cache_size() > programs:
                    runtime.return_memory()
                    compiled = time.monotonic() - before
                # 4. Log the step before: its metrics are ready, so the host does not wait for this
                # one.
                self._log_pending()
                now = time.monotonic()
                goodput.add("data", waited)
                goodput.add("compile", compiled)
                goodput.add("productive", now - mark - saved - waited - compiled)
                self.pending = (step, setup.arms[index], metrics, batch, now - mark, waited)
                mark = now
            if self.pending is not None:
                self._log_pending()
                goodput.add("productive", time.monotonic() - mark)

    def finish(self, first: int) -> float:
        """Saves the last step, if any was trained; returns the seconds of the whole run."""
        trained = self.settings.steps > first
        if trained:
            with self.goodput.timed("checkpoint"):
                self._save(self.settings.steps, wait=True)
        self.goodput.write()
        return self._seconds() if trained else self.earlier_seconds

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.start_time

    def _stop_code(self, stop: StopSignal, done: int) -> int:
        """The exit code of a signal that came to any process; 0 without one."""
        code = stop.exit_code if stop.requested else 0
        if jax.process_count() == 1:
            return code
        # All must stop at the same step, and asking each other takes a moment.
        if done % self.settings.log_every:
            return 0
        if jax.default_backend() == "cpu":
            # Programs of a CPU do not run in order: a process whose step has failed would leave the
            # others waiting for its answer for ever.
            jax.block_until_ready(self.state)
        return largest(code)

    def _save_if_due(self, done: int, first: int, code: int) -> float:
        """Saves after step `done` if it is time to, or if the run stops; returns the seconds."""
        if not code and (done == first or done % self.settings.checkpoint_every):
            return 0.0
        self._log_pending()
        before = time.monotonic()
        if done > first:
            self._save(done, wait=bool(code))
        seconds = time.monotonic() - before
        self.goodput.add("checkpoint", seconds)
        if code:
            self.goodput.write()
            raise Stopped(code, done)
        return seconds

    def _save(self, step: int, *, wait: bool = False) -> None:
        metadata = {
            "data": self.setup.pipeline.fingerprint,
            "guard": self.guard.state(),
            "goodput": self.goodput.state(),
            "skipped_samples": self.setup.pipeline.skips.state(),
            "seconds": self._seconds(),
            "params": self.setup.num_params,
        }
        save_state(
            self.checkpoints,
            step,
            self.state,
            self.batches,
            metadata,
            limit=self.settings.save_failures,
            wait=wait,
            warn=self.warn,
        )

    def _log_pending(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._log(*pending)

    def _log(
        self,
        step: int,
        arm: Arm,
        metrics: Mapping[str, Any],
        batch: Any,
        wall: float,
        waited: float,
    ) -> None:
        """Waits for a step's metrics; writes and shows them; ends a run that has diverged."""
        last = max(self.checkpoints.committed(), default=None)
        arrays = batch if isinstance(batch, Mapping) else batch.arrays()
        ok = self.guard.update(step, metrics["ok"], arrays, last_checkpoint=last)
        values = {name: np.asarray(value) for name, value in metrics.items() if name != "ok"}
        values |= {
            "lr": float(self.rate(step - 1)),
            "budget": arm.budget,
            "images_per_second": self.setup.data.batch_size / max(wall, 1e-9),
            "step_seconds": wall,
            "data_wait_fraction": waited / max(wall, 1e-9),
            "skipped": self.guard.total,
            "goodput": self.goodput.share,
        }
        due = step % self.settings.log_every == 0 or step in (1, self.settings.steps) or not ok
        if due and self.writer is not None:
            self.writer.write(step, {**values, "compressor": arm.model.compressor["name"]})
            self.goodput.write()
        self.progress.update(step, values)
