"""The one training loop. Order of every step: save, next batch, update, log."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from efficient_vlm import config as configs
from efficient_vlm import sharding
from efficient_vlm.data import build, transforms
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.pipeline import Pipeline, check_fingerprint, make_train, preview
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.models.build import construct
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm, draw_arm, make_arms, make_model
from efficient_vlm.train.checkpoint import Checkpoints, NonFiniteState, SaveFailed
from efficient_vlm.train.guards import NonFiniteGuard, StopSignal
from efficient_vlm.train.leaves import state_sha256
from efficient_vlm.train.metrics import MetricsWriter
from efficient_vlm.train.optimizer import OPTIMIZERS, OptimizerConfig, schedule
from efficient_vlm.train.parameters import initialise, load_params, start_from
from efficient_vlm.train.progress import Progress


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
      steps: optimizer steps.
      seed: of initial values, random compressors and the draw of budgets.
      optimizer: fields of `optimizer.OptimizerConfig`.
      elastic: budgets to draw from at every step, as {"name", "budget", "weight", "start"} and
        options of the compressor; empty for the model's own compressor alone. Each is one
        executable. "start" is the share of the run after which it is drawn, 0 by default.
      accumulate: micro-batches per step.
      mesh: how many devices share what, fields of `sharding.MeshConfig`; batches are divided over
        all of them. One device needs none.
      load_balance, router_z: weights of the router losses of a mixture of experts.
      selector: weight of teaching a text-guided selector, at the full budget, where the decoder
        looks.
      ema: decay of an average of the parameters that is evaluated in their place; None for none.
      checkpoint_every: steps between checkpoints; one more is written at the end.
      keep, keep_every: newest checkpoints to keep, and steps whose multiples are kept for ever.
      log_every: steps between lines of metrics.jsonl.
      save_failures: checkpoints in a row that may fail before the run ends.
      nonfinite_limit: steps in a row without a finite loss and gradient after which the run ends.
      tensorboard: also write TensorBoard files.
      init_from: workdir of another run whose newest parameters to start from.
    """

    steps: int
    seed: int = 0
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elastic: Sequence[Mapping[str, Any]] = ()
    accumulate: int = 1
    mesh: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load_balance: float = 0.01
    router_z: float = 1e-3
    selector: float = 1.0
    ema: float | None = None
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int | None = None
    log_every: int = 10
    save_failures: int = 3
    nonfinite_limit: int = 3
    tensorboard: bool = False
    init_from: str | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "checkpoint_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}: {getattr(self, name)}", allowed="1 or more")


@dataclasses.dataclass
class Trained:
    """What evaluation needs of a finished run.

    Attributes:
      model, params: the model, and its parameters (the average, if there is one).
      pipeline: the training data, for tokenizer and tasks.
      summary: the "train" part of results.json.
    """

    model: VisionLanguageModel
    params: Any
    pipeline: Pipeline
    summary: dict[str, Any]


class Stopped(Exception):
    """A signal ended the run after its state was saved; `exit_code` is 130 or 143."""

    def __init__(self, exit_code: int, step: int):
        super().__init__(f"stopped after step {step}")
        self.exit_code, self.step = exit_code, step


def read_config(config: Mapping[str, Any]) -> tuple[TrainConfig, DataConfig, OptimizerConfig]:
    """What training reads of a config, with everything checked that can be without data."""
    settings = construct(TrainConfig, configs.section(config, "train"), "train")
    data_config = DataConfig.from_mapping(configs.section(config, "data"))
    optimizer = construct(OptimizerConfig, settings.optimizer, "train.optimizer")
    if data_config.batch_size % settings.accumulate:
        raise UserError(
            f"train.accumulate: {settings.accumulate}",
            allowed=f"divisors of data.batch_size={data_config.batch_size}",
        )
    # Wrong names and budgets are told before data are built.
    model = make_model(config, vocab_size=2)
    for each in (model, *(arm.model for arm in make_arms(model, settings.elastic))):
        each.make_compressor()
        each.make_decoder()
    schedule(optimizer, settings.steps, optimizer.learning_rate)
    if optimizer.name not in OPTIMIZERS:
        raise unknown("train.optimizer.name", optimizer.name, OPTIMIZERS)
    size = model.make_encoder().image_size
    if data_config.size != ((size, size) if isinstance(size, int) else tuple(size)):
        raise UserError(
            f"data.image_size: {data_config.image_size}",
            allowed=f"model.encoder.image_size, {size}",
            fix="set both to the same",
        )
    return settings, data_config, optimizer


def make_mesh(settings: TrainConfig, batch_size: int) -> Mesh | None:
    """The mesh of a run, None for one device.

    Raises:
      UserError: sizes that do not fit the devices or the batch, or several processes, each of which
        would evaluate and write files.
    """
    config = construct(sharding.MeshConfig, settings.mesh, "train.mesh")
    if jax.process_count() > 1:
        raise UserError(
            f"training over {jax.process_count()} processes: only steps and checkpoints can so far",
            fix="one process for all devices of a host; see docs/sharding.md",
        )
    if jax.device_count() == 1:
        config.sizes(1)
        return None
    mesh = sharding.make_mesh(config)
    sharding.check_batch(batch_size, mesh, settings.accumulate)
    return mesh


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
    say("Data: opening (the first run builds it) ...")
    fresh = not any((workdir / "checkpoints").glob("*"))
    known = preview(data_config) if fresh else None
    # While data are built, the model is made and its first program compiled.
    building = build.start(data_config) if known else None
    pipeline = None if building else make_train(data_config, workdir=workdir)
    spec, tokenizer = known or (pipeline.spec, pipeline.tokenizer)
    model = make_model(config, tokenizer.vocab_size)
    arms = make_arms(model, settings.elastic)
    example = transforms.empty(spec, tokenizer.pad_id)
    shapes = transforms.stack([example] * data_config.batch_size)
    state, tx, placement = initialise(arms, shapes, settings, optimizer, mesh)
    aux = {name: getattr(settings, name) for name in ("load_balance", "router_z", "selector")}
    functions = [
        steps.make_train_step(
            arm.model,
            tx,
            seed=settings.seed,
            accumulate=settings.accumulate,
            aux=aux,
            ema=settings.ema,
            placement=placement,
        )
        for arm in arms
    ]
    if building:
        steps.warm_up(functions[draw_arm(arms, settings.seed, 1, settings.steps)], state, shapes)
        building.wait()
        pipeline = make_train(data_config, workdir=workdir)
    if (pipeline.spec, pipeline.tokenizer.fingerprint) != (spec, tokenizer.fingerprint):
        raise RuntimeError("the model was made for other batches than the data give")
    say(f"Data: {len(pipeline.source)} training images, tasks {', '.join(pipeline.tasks)}")
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    say(f"Model: {count:,} parameters, trained at {', '.join(arm.label for arm in arms)}")

    iterator = iter(pipeline)
    progress = Progress(settings.steps)

    def warn(line: str) -> None:
        progress.message(f"warning: {line}")

    with (
        Checkpoints(
            workdir / "checkpoints",
            keep=settings.keep,
            keep_every=settings.keep_every,
            warn=warn,
        ) as checkpoints,
        MetricsWriter(workdir, settings.tensorboard, warn=warn) as writer,
    ):
        guard = NonFiniteGuard(workdir, settings.nonfinite_limit, warn=warn)
        first, seconds = 0, 0.0
        restored = checkpoints.restore_latest(state, iterator)
        if restored is not None:
            first, state, metadata = restored
            check_fingerprint(
                metadata["data"], pipeline.fingerprint, allow=data_config.allow_data_change
            )
            guard.load(metadata["guard"])
            seconds = metadata["seconds"]
            say(
                f"Resuming from step {first} of {settings.steps}"
                if first < settings.steps
                else f"Training was already finished at step {first}: nothing is trained again"
            )
        elif settings.init_from is not None:
            state = start_from(state, Path(settings.init_from))
            say(f"Starting from the parameters of {settings.init_from}")
        writer.truncate_after(first)

        rate = schedule(optimizer, settings.steps, optimizer.learning_rate)

        def save(step: int, *, wait: bool = False) -> None:
            elapsed = seconds + time.monotonic() - start_time
            metadata = {
                "data": pipeline.fingerprint,
                "guard": guard.state(),
                "seconds": elapsed,
                "params": count,
            }
            try:
                checkpoints.save(step, state, iterator, metadata, wait=wait)
            except SaveFailed as error:
                failed = checkpoints.failures
                if wait or failed >= settings.save_failures:
                    last = max(checkpoints.committed(), default=None)
                    raise UserError(
                        f"checkpoints cannot be written: {error}",
                        fix=f"free some space and run again; step {last} is safe",
                    ) from None
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
            }
            if step % settings.log_every == 0 or step in (1, settings.steps) or not ok:
                writer.write(step, {**values, "compressor": arm.model.compressor["name"]})
            progress.update(step, values)

        pending = None
        progress.start = first
        with progress:
            mark = time.monotonic()
            for step in range(first + 1, settings.steps + 1):
                done = step - 1
                if stop.requested or (done > first and done % settings.checkpoint_every == 0):
                    if pending is not None:
                        log(*pending)
                        pending = None
                    if done > first:
                        save(done, wait=stop.requested)
                    if stop.requested:
                        raise Stopped(stop.exit_code, done)
                before = time.monotonic()
                batch = next(iterator)
                waited = time.monotonic() - before
                index = draw_arm(arms, settings.seed, step, settings.steps)
                state, metrics = functions[index](state, batch)
                # The metrics of the step before are read while this one runs.
                if pending is not None:
                    log(*pending)
                now = time.monotonic()
                pending = (step, arms[index], metrics, batch, (now - mark, waited))
                mark = now
            if pending is not None:
                log(*pending)
        if settings.steps > first:
            save(settings.steps, wait=True)
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
        "params_sha256": state_sha256(state["params"]),
        "skipped_steps": guard.total,
        "skipped_samples": pipeline.skipped,
        "compilations": compilations,
    }
    return Trained(model, state.get("ema", state["params"]), pipeline, summary)


def restore(config: Mapping[str, Any], workdir: Path, pipeline: Pipeline) -> Trained:
    """The model of a run and its newest parameters, for evaluation."""
    settings = construct(TrainConfig, configs.section(config, "train"), "train")
    model = make_model(config, pipeline.tokenizer.vocab_size)
    example = transforms.empty(pipeline.spec, pipeline.tokenizer.pad_id)
    boxed = jax.eval_shape(
        lambda: steps.init_params(
            [arm.model for arm in make_arms(model, settings.elastic)],
            transforms.stack([example]),
            0,
        )
    )
    name = "params" if settings.ema is None else "ema"
    return Trained(model, load_params(workdir, nn.unbox(boxed), name), pipeline, {})
