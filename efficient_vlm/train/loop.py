"""The one training loop. Order of every step: save, next batch, update, log."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from efficient_vlm.checkpoints.run import Checkpoints, NonFiniteState, SaveFailed
from efficient_vlm.data import build, transforms
from efficient_vlm.data.pipeline import check_fingerprint, make_train, preview
from efficient_vlm.data.reader import Reader
from efficient_vlm.errors import UserError
from efficient_vlm.processing.batch import training_inputs
from efficient_vlm.sharding import own_rows
from efficient_vlm.terminal import Progress
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm, draw_arm, make_arms, make_model
from efficient_vlm.train.config import make_mesh, read_config
from efficient_vlm.train.goodput import Goodput
from efficient_vlm.train.guards import NonFiniteGuard, StopSignal
from efficient_vlm.train.metrics import MetricsWriter
from efficient_vlm.train.optimizer import schedule
from efficient_vlm.train.parameters import initialise, start_from
from efficient_vlm.train.processes import first_then_all, is_first, largest
from efficient_vlm.train.trained import Trained, digests


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
) -> Trained:
    """Trains, or continues, the run in `workdir` up to its last step.

    Args:
      config: the whole config.
      workdir: locked, and with a config.json that fits.
      stop: read between steps.
      say: receives lines for the user.

    Raises:
      UserError: a mistake in the config, or training diverged.
      Stopped: a signal came; the state is saved.
    """
    start_time = time.monotonic()
    settings, data_config, optimizer = read_config(config)
    mesh = make_mesh(settings, data_config.batch_size)
    rows = None if mesh is None else own_rows(mesh, data_config.batch_size)
    several = jax.process_count() > 1
    options = dict(workdir=workdir, rows=rows)
    say("Data: opening (the first run builds it) ...")
    fresh = not any((workdir / "checkpoints").glob("*"))
    known = preview(data_config) if fresh and not several else None
    # While data are built, the model is made and its first program compiled.
    building = build.start(data_config) if known else None
    # The first process may train a tokenizer.
    pipeline = None if building else first_then_all(lambda: make_train(data_config, **options))
    spec, tokenizer = known or (pipeline.spec, pipeline.tokenizer)
    model = make_model(config, tokenizer.vocab_size)
    arms = make_arms(model, settings.elastic)
    example = transforms.empty(spec, tokenizer.pad_id)
    own_count = data_config.batch_size if rows is None else len(rows)
    shapes = training_inputs(transforms.stack([example] * own_count))
    start = initialise(arms, settings, optimizer, mesh)
    aux = {name: getattr(settings, name) for name in ("load_balance", "router_z", "selector")}
    functions = [
        steps.make_train_step(
            arm.model,
            start.tx,
            seed=settings.seed,
            accumulate=settings.accumulate,
            aux=aux,
            ema=settings.ema,
            placement=start.placement,
        )
        for arm in arms
    ]
    compiled = 0.0
    if building:
        before = time.monotonic()
        first_arm = draw_arm(arms, settings.seed, 1, settings.steps)
        # A state for this alone: two of them may not fit.
        jax.block_until_ready(functions[first_arm](start.state(), shapes))
        compiled = time.monotonic() - before
        building.wait()
        pipeline = make_train(data_config, **options)
    if (pipeline.spec, pipeline.tokenizer.fingerprint) != (spec, tokenizer.fingerprint):
        raise RuntimeError("the model was made for other batches than the data give")
    say(f"Data: {len(pipeline.source)} training images, tasks {', '.join(pipeline.tasks)}")
    count = sum(x.size for x in jax.tree.leaves(start.shapes["params"]))
    say(f"Model: {count:,} parameters, trained at {', '.join(arm.label for arm in arms)}")

    progress = Progress(settings.steps, quiet=not is_first())
    speaker = "" if is_first() else f"process {jax.process_index()}: "

    def warn(line: str) -> None:
        progress.message(f"warning: {speaker}{line}")

    iterator = Reader(pipeline, warn)
    with (
        Checkpoints(
            workdir / "checkpoints",
            keep=settings.keep,
            keep_every=settings.keep_every,
            warn=warn,
        ) as checkpoints,
        MetricsWriter(workdir, settings.tensorboard, warn=warn)
        if is_first()
        else contextlib.nullcontext() as writer,
    ):
        own = workdir if not several else workdir / f"process_{jax.process_index()}"
        guard = NonFiniteGuard(own, settings.nonfinite_limit, warn=warn)
        goodput = Goodput(workdir, warn=warn, keep=is_first())
        first, seconds = 0, 0.0
        restored = checkpoints.restore_latest(start.shapes, iterator)
        if restored is not None:
            first, state, metadata = restored
            check_fingerprint(
                metadata["data"], pipeline.fingerprint, allow=data_config.allow_data_change
            )
            guard.load(metadata["guard"])
            seconds = metadata["seconds"]
            goodput.resume(metadata.get("goodput"))
            say(
                f"Resuming from step {first} of {settings.steps}"
                if first < settings.steps
                else f"Training was already finished at step {first}: nothing is trained again"
            )
        else:
            state = start.state()
            goodput.resume(None)
            if settings.init_from is not None:
                state = start_from(state, Path(settings.init_from))
                say(f"Starting from the parameters of {settings.init_from}")
        if writer is not None:
            writer.truncate_after(first)

        rate = schedule(optimizer, settings.steps, optimizer.learning_rate)

        def save(step: int, *, wait: bool = False) -> None:
            elapsed = seconds + time.monotonic() - start_time
            metadata = {
                "data": pipeline.fingerprint,
                "guard": guard.state(),
                "goodput": goodput.state(),
                "seconds": elapsed,
                "params": count,
            }

            def give_up(error: SaveFailed) -> NoReturn:
                last = max(checkpoints.committed(), default=None)
                safe = "" if last is None else f"; step {last} is safe"
                raise UserError(
                    f"checkpoints cannot be written: {error}",
                    fix=f"free some space and run again{safe}",
                ) from None

            try:
                checkpoints.wait()
            except SaveFailed as error:  # In the background, and told by then.
                if checkpoints.failures >= settings.save_failures and not wait:
                    give_up(error)
            try:
                checkpoints.save(step, state, iterator, metadata, wait=wait)
            except SaveFailed as error:
                if wait or checkpoints.failures >= settings.save_failures:
                    give_up(error)
                warn(f"{error}; training goes on, the next checkpoint tries again")
            except NonFiniteState as error:
                raise UserError(
                    f"step {step}: {error.path} is not finite, so no checkpoint was written",
                    fix="a new --workdir with train.init_from and a lower learning rate",
                ) from None

        def log(step: int, arm: Arm, metrics: Mapping[str, Any], batch, timing) -> None:
            ok = guard.update(
                step,
                metrics["ok"],
                batch,
                last_checkpoint=max(checkpoints.committed(), default=None),
            )
            values = {k: np.asarray(v) for k, v in metrics.items() if k != "ok"}
            wall, wait = timing
            values |= {
                "lr": float(rate(step - 1)),
                "budget": arm.budget,
                "images_per_second": data_config.batch_size / max(wall, 1e-9),
                "step_seconds": wall,
                "data_wait_fraction": wait / max(wall, 1e-9),
                "skipped": guard.total,
                "goodput": goodput.share,
            }
            due = step % settings.log_every == 0 or step in (1, settings.steps) or not ok
            if due and writer is not None:
                writer.write(step, {**values, "compressor": arm.model.compressor["name"]})
                goodput.write()
            progress.update(step, values)

        pending = None
        progress.start = first
        goodput.add("compile", compiled)
        goodput.add("start", time.monotonic() - start_time - compiled)
        with progress:
            mark = time.monotonic()
            for step in range(first + 1, settings.steps + 1):
                done = step - 1
                code = stop.exit_code if stop.requested else 0
                if several:
                    # All must stop at the same step, and to ask each other costs a moment.
                    asked = done % settings.log_every == 0
                    if asked and jax.default_backend() == "cpu":
                        # Its programs are not in order: the question would be asked beside a step
                        # that has failed in one process, and wait for the others for ever.
                        jax.block_until_ready(state)
                    code = largest(code) if asked else 0
                saved = 0.0
                if code or (done > first and done % settings.checkpoint_every == 0):
                    if pending is not None:
                        log(*pending)
                        pending = None
                    before = time.monotonic()
                    if done > first:
                        save(done, wait=bool(code))
                    saved = time.monotonic() - before
                    goodput.add("checkpoint", saved)
                    if code:
                        goodput.write()
                        raise Stopped(code, done)
                before = time.monotonic()
                batch = next(iterator)
                waited = time.monotonic() - before
                index = draw_arm(arms, settings.seed, step, settings.steps)
                programs, before = functions[index]._cache_size(), time.monotonic()
                state, metrics = functions[index](state, training_inputs(batch))
                compiled = 0.0
                if functions[index]._cache_size() > programs:
                    compiled = time.monotonic() - before
                # The metrics of the step before are read while this one runs.
                if pending is not None:
                    log(*pending)
                now = time.monotonic()
                goodput.add("data", waited)
                goodput.add("compile", compiled)
                goodput.add("productive", now - mark - saved - waited - compiled)
                pending = (step, arms[index], metrics, batch, (now - mark, waited))
                mark = now
            if pending is not None:
                log(*pending)
                goodput.add("productive", time.monotonic() - mark)
        if settings.steps > first:
            with goodput.timed("checkpoint"):
                save(settings.steps, wait=True)
        goodput.write()
        total = seconds + (time.monotonic() - start_time if settings.steps > first else 0.0)
    compilations = {
        arm.label: f._cache_size()
        for arm, f in zip(arms, functions, strict=True)
        if f._cache_size()
    }
    summary = {
        "steps": settings.steps,
        "seconds": round(total, 1),
        "params": count,
        "skipped_steps": guard.total,
        "skipped_samples": pipeline.skipped,
        "compilations": compilations,
    }
    summary |= digests(state, settings.steps, workdir, warn)
    return Trained(model, state.get("ema", state["params"]), mesh, pipeline, summary)
