"""Evaluation of a run, fresh from training or from its files, on one device or on a mesh."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from efficient_vlm import sharding
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.evalset import EvalSet, make_eval
from efficient_vlm.data.pipeline import make_train
from efficient_vlm.data.skips import told
from efficient_vlm.errors import UserError, short
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.protocol import CONTROLS, evaluate
from efficient_vlm.evaluation.settings import EvalConfig, settings_of
from efficient_vlm.evaluation.tuned import evaluate_tuned
from efficient_vlm.fields import construct, section
from efficient_vlm.runtime import enable_compilation_cache
from efficient_vlm.train.config import is_published
from efficient_vlm.train.processes import first_then_all
from efficient_vlm.train.trained import Trained, restore
from efficient_vlm.train.workdir_config import read_run_config

__all__ = ["evaluate_run", "evaluate_trained"]


def evaluate_run(
    workdir: str | os.PathLike,
    *,
    methods: Sequence[Mapping[str, Any]] | None = None,
    images: int | None = None,
    control: str | None = None,
    metric: str | None = None,
    mesh: Mapping[str, int] | None = None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run.

    All devices share the work, those of all processes, which then all call this alike.

    Args:
      workdir: of the run.
      methods: in place of the config's, see `evaluation.settings.EvalConfig.methods`.
      images: test images in place of the config's number.
      control: "blank" or "shuffled", see `evaluation.protocol.evaluate`.
      metric: of a run that started from a published model, in place of the config's.
      mesh: devices along its axes, see `sharding.MeshConfig`; those of the run unless given, and
        where that had another number of devices, fsdp over all.
      say: receives lines for the user.
      check_stop: called between batches; may raise.

    Returns:
      As `evaluate_trained`.

    Raises:
      UserError: no run, no checkpoint, or a mesh of another number of devices.
    """
    enable_compilation_cache()
    workdir = Path(workdir)
    config = read_run_config(workdir)
    evaluation = construct(EvalConfig, section(config, "eval"), "eval")
    if methods is not None:
        evaluation = dataclasses.replace(evaluation, methods=methods)
    if images is not None:
        evaluation = dataclasses.replace(evaluation, images=images)
    if metric is not None and not is_published(config):
        raise UserError(
            f"metric: {short(metric)}, but our own benchmark is scored by exact match",
            fix="leave it out",
        )
    if is_published(config):
        if metric is not None:
            metrics.find(metric)
            evaluation = dataclasses.replace(evaluation, metric=metric)
        if control == "shuffled":
            raise UserError("control: shuffled", allowed="blank, of runs of published models")
        given = dict(control=control, say=say, check_stop=check_stop)
        return evaluate_tuned(workdir, config, evaluation, **given)
    placed = _mesh(config, mesh)
    data_config = DataConfig.from_mapping(section(config, "data"))
    pipeline = first_then_all(lambda: make_train(data_config, workdir=workdir))
    trained = restore(config, workdir, pipeline, placed)
    return evaluate_trained(
        trained, config, evaluation, say=say, check_stop=check_stop, control=control
    )


def evaluate_trained(
    trained: Trained,
    config: Mapping[str, Any],
    evaluation: EvalConfig,
    *,
    workdir: Path | None = None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
    control: str | None = None,
) -> dict[str, Any]:
    """`protocol.evaluate` on the test data of a config; with `workdir` also the controls.

    Batches are those of `evaluation`, and empty rows where its size does not divide over the mesh;
    method "random" then draws others, and times are of all rows.

    Returns:
      {"eval": rows, "cost": rows, "protocol": text, "test_samples": {"samples": number, "skipped":
      {reason: number}}} and, with `workdir`, "controls": rows.
    """
    start = time.monotonic()
    parts = 1 if trained.mesh is None else sharding.row_parts(trained.mesh)
    size = evaluation.batch_size + -evaluation.batch_size % parts
    data_config = DataConfig.from_mapping(section(config, "data"))
    test = make_eval(
        dataclasses.replace(data_config, batch_size=size),
        limit=evaluation.images,
        workdir=workdir,
        tokenizer=trained.pipeline.tokenizer,
        placed=trained.pipeline.spec.placed,
    )
    rows = sum(len(answers) for answers in test.answers)
    say(f"Evaluation: {rows} questions about unseen test images")
    if test.skipped:
        say(f"Evaluation: {told(test.skipped, len(test.source), 'test samples skipped')}")
    with sharding.active(trained.mesh):
        results = evaluate(
            trained.model,
            trained.params,
            test,
            evaluation,
            control=control,
            workdir=workdir,
            say=say,
            check_stop=check_stop,
        )
        results["test_samples"] = {"samples": len(test.source), "skipped": test.skipped}
        if workdir is not None:
            results["controls"] = _controls(trained, test, evaluation, check_stop)
    say(f"Evaluation: {time.monotonic() - start:.1f} s")
    return results


def _mesh(config: Mapping[str, Any], given: Mapping[str, int] | None) -> Mesh | None:
    devices = jax.device_count()
    own = section(config, "train").get("mesh", {})
    sizes = construct(sharding.MeshConfig, own if given is None else given, "train.mesh")
    try:
        sizes.sizes(devices)
    except UserError as error:
        if given is not None:
            text = ",".join(f"{axis}:{size}" for axis, size in given.items() if size != 1)
            raise UserError(
                f"--mesh={text}: there are {devices} devices",
                fix="axes whose product that is, such as --mesh=fsdp:2,tensor:2 for four",
            ) from error
        sizes = sharding.MeshConfig(fsdp=devices)
    return sharding.make_mesh(sizes) if devices > 1 else None


def _controls(
    trained: Trained, test: EvalSet, evaluation: EvalConfig, check_stop: Callable[[], None]
) -> list[dict[str, Any]]:
    """The first method on blank images and on shuffled answers: both must fall to chance."""
    first = dict(settings_of(evaluation, trained.model)[0].compressor)
    methods = [{**first, "budgets": [first.pop("budget", None)]}]
    rows = []
    for control in CONTROLS:
        found = evaluate(
            trained.model,
            trained.params,
            test,
            dataclasses.replace(evaluation, methods=methods, seeds=1),
            control=control,
            say=lambda line: None,
            check_stop=check_stop,
        )
        rows += [{"control": control, **row} for row in found["eval"]]
    return rows
