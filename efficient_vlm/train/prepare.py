"""What a run of a model of our own, or of a published one, is made of before its first step."""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from efficient_vlm.data import build, transforms
from efficient_vlm.data.pipeline import make_train, preview
from efficient_vlm.processing.batch import training_inputs
from efficient_vlm.sharding import own_rows
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm, draw_arm, joined, make_arms, make_model
from efficient_vlm.train.config import TrainConfig, is_published, make_mesh, read_config
from efficient_vlm.train.joint import of_all
from efficient_vlm.train.parameters import Start, initialise
from efficient_vlm.train.processes import first_then_all
from efficient_vlm.train.published import prepare_published
from efficient_vlm.train.setup import Setup

__all__ = ["prepare"]


def prepare(config: Mapping[str, Any], workdir: Path, say: Callable[[str], None]) -> Setup:
    """Checks the config, opens (or builds) the data, and makes the models and their programs.

    Args:
      config, workdir, say: see `loop.train`.

    Raises:
      UserError: a mistake in the config, or data that cannot be used.
    """
    # 1. Settings and devices.
    settings, data_config, optimizer = read_config(config)
    if is_published(config):
        return prepare_published(config, workdir, say, settings, data_config, optimizer)
    mesh = make_mesh(settings, data_config.batch_size)
    rows = None if mesh is None else own_rows(mesh, data_config.batch_size)
    options = dict(workdir=workdir, rows=rows)

    # 2. Data. A new run of one process builds generated data beside steps 3 and 4: shapes and
    # tokenizer are known without them, so the first program compiles in the meantime.
    say("Data: opening (the first run builds it) ...")
    fresh = not any((workdir / "checkpoints").glob("*"))
    known = preview(data_config) if fresh and jax.process_count() == 1 else None
    building = build.start(data_config) if known else None
    # The first process goes ahead because it may train a tokenizer.
    pipeline = None if building else first_then_all(lambda: make_train(data_config, **options))
    spec, tokenizer = known or (pipeline.spec, pipeline.tokenizer)

    # 3. Models and their step programs.
    model = make_model(config, tokenizer.vocab_size)
    arms = make_arms(model, settings.elastic)
    example = transforms.empty(spec, tokenizer.pad_id)
    own_count = data_config.batch_size if rows is None else len(rows)
    shapes = training_inputs(transforms.stack([example] * own_count), model)
    start = initialise(arms, settings, optimizer, mesh)
    arms = joined(arms, settings)
    programs = [_program(arm, settings, start) for arm in arms]

    # 4. The first program, and the end of the build.
    compile_seconds = 0.0
    if building:
        before = time.monotonic()
        first_arm = draw_arm(arms, settings.seed, 1, settings.steps)
        # On a state of its own, dropped at once: two states may not fit into memory.
        jax.block_until_ready(programs[first_arm](start.state(), shapes))
        compile_seconds = time.monotonic() - before
        building.wait()
        pipeline = make_train(data_config, **options)
    if (pipeline.spec, pipeline.tokenizer.fingerprint) != (spec, tokenizer.fingerprint):
        raise RuntimeError("the model was made for other batches than the data give")
    return Setup(
        settings=settings,
        data=data_config,
        optimizer=optimizer,
        mesh=mesh,
        pipeline=pipeline,
        model=model,
        arms=arms,
        start=start,
        programs=programs,
        compile_seconds=compile_seconds,
        inputs=functools.partial(training_inputs, model=model),
    )


def _program(arm: Arm, settings: TrainConfig, start: Start) -> Callable:
    names = ("load_balance", "router_z", "selector", "penalty")
    aux = {name: getattr(settings, name) for name in names}
    objective = None
    if arm.together:
        objective = of_all(arm.together, [each.trained for each in arm.together], aux)
    return steps.make_train_step(
        arm.trained,
        start.tx,
        seed=settings.seed,
        accumulate=settings.accumulate,
        aux=aux,
        ema=settings.ema,
        layout=start.layout,
        objective=objective,
        penalty_ramp=settings.penalty_ramp * settings.steps,
    )
