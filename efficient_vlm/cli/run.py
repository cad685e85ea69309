"""`efficient-vlm train`, and `fit`, which does it from Python: training to report, and on again."""

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from efficient_vlm.cli import config_file as configs
from efficient_vlm.compressors.imports import import_methods
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.run import evaluate_trained
from efficient_vlm.evaluation.settings import (
    EvalConfig,
    check_trained,
    labels_of,
    parameter_shapes,
    settings_of,
)
from efficient_vlm.evaluation.tuned import evaluate_tuned
from efficient_vlm.fields import construct, section, to_dict
from efficient_vlm.files import write_atomic
from efficient_vlm.inference.on_policy import with_draws
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.report.report import write_report
from efficient_vlm.report.summary import print_summary
from efficient_vlm.runtime import enable_compilation_cache, environment
from efficient_vlm.train import guards, loop, processes
from efficient_vlm.train.base import open_base
from efficient_vlm.train.config import is_published, read_config
from efficient_vlm.train.goodput import Goodput
from efficient_vlm.train.objective import DistilConfig
from efficient_vlm.train.pretrained_fields import PretrainedFields
from efficient_vlm.train.workdir_config import has_steps

RESULTS = "results.json"
# Fields that change neither the model, nor the data, nor their order.
MAY_CHANGE = (
    "data.allow_data_change",
    "data.cache_mb",
    "data.dir",
    "data.num_threads",
    "data.prefetch",
    "imports",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "train.log_every",
    "train.mesh",
    "train.nonfinite_limit",
    "train.save_failures",
    "train.tensorboard",
)


def train(
    config: str,
    workdir: str,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    distributed: str | None = None,
) -> int:
    """`efficient-vlm train`.

    Args:
      config: "FILE.py" or "FILE.py:ARG".
      workdir: folder of the run.
      overrides: "section.field=value" of the config.
      imports: files and modules that register methods of one's own, see `import_methods`; the
        run's config keeps them.
      distributed: see `train.processes.start`.

    Returns:
      The exit code: 0, or that of a signal.
    """
    processes.start(distributed)  # Before anything asks for devices, as a file of one's own may.
    imported = import_methods(imports)
    loaded = configs.load(config, overrides)
    if imported:
        _record(loaded, imported)
    try:
        fit(loaded, workdir, command=shlex.join(["efficient-vlm", *sys.argv[1:]]))
    except loop.Stopped as stopped:
        return stopped.exit_code
    return 0


def _record(config: ml_collections.ConfigDict, imported: Sequence[str]) -> None:
    """Adds what was imported to the `imports` of a config."""
    given = config.get("imports") or ()
    given = [given] if isinstance(given, str) else list(given)
    with config.unlocked():
        if "imports" in config:  # Deleted first: ConfigDict would refuse a list for a text.
            del config["imports"]
        config.imports = list(dict.fromkeys([*given, *imported]))


def fit(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, evaluates, audits and reports; called again on the same workdir, it resumes.

    Args:
      config: a config, see `configs/quickstart.py`; `imports`, if there is one, names files or
        modules that register methods, see `compressors.imports`.
      workdir: folder of the run.
      command: what to type to resume, for the message after a signal.
      say: receives lines for the user.

    Returns:
      What results.json holds; None in all processes but the first, where there are several.

    Raises:
      UserError: a mistake in the config or the data.
      train.loop.Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    enable_compilation_cache()
    workdir = Path(workdir)
    import_methods(config.get("imports") or ())
    plain = to_dict(config)
    evaluation = construct(EvalConfig, section(config, "eval"), "eval")
    _check_methods(config, evaluation, started=has_steps(workdir))
    say = say if processes.is_first() else lambda line: None
    with contextlib.ExitStack() as held:
        stop = held.enter_context(guards.StopSignal())

        def claim() -> bool:
            held.enter_context(guards.WorkdirLock(workdir))
            return guards.check_workdir_config(workdir, plain, ignore=MAY_CHANGE)

        processes.agreed(claim)
        say(f"Workdir: {workdir}")
        try:
            distil = construct(DistilConfig, section(config, "distil"), "distil")
            around = functools.partial(with_draws, config=distil)
            trained = loop.train(config, workdir, stop=stop, say=say, around=around)
            clock = Goodput(workdir, warn=say, keep=processes.is_first())
            try:
                with clock.timed("eval"):
                    given = dict(say=say, check_stop=check_stop(stop, trained.summary["steps"]))
                    if is_published(config):
                        given["trained"] = trained
                        found = evaluate_tuned(workdir, config, evaluation, **given)
                        found["data"] = trained.pipeline.described()
                    else:
                        given["workdir"] = workdir
                        found = evaluate_trained(trained, config, evaluation, **given)
            finally:
                clock.write()

            def finish() -> dict[str, Any]:
                results = {"train": trained.summary, **found, "goodput": clock.summary()}
                results |= {"environment": environment(), "command": command}
                return _finish(results, workdir, say)

            return processes.agreed(finish)
        except loop.Stopped as stopped:
            saved = "everything up to it is saved" if stopped.step else "nothing was trained yet"
            say(f"Stopped after step {stopped.step}; {saved}.")
            if command:
                say(f"Resume with: {command}")
            raise


def _check_methods(config: Mapping[str, Any], evaluation: EvalConfig, *, started: bool) -> None:
    """Methods that cannot be evaluated are told now, not after the training."""
    settings = read_config(config)[0]
    if is_published(config):
        needed = set(metrics.find(evaluation.metric).needs)
        if "masks" in needed:  # Which no row of data has.
            raise UserError(
                f"eval.metric: {evaluation.metric} needs masks, which rows to learn from have not",
                fix="--config.eval.metric=exact_match; `efficient-vlm metrics` lists all",
            )
        base = open_base(construct(PretrainedFields, section(config, "model"), "model"))
        labels_of(settings_of(evaluation, base.model))
        return
    model = loop.make_model(config, vocab_size=2)
    trained_at = [arm.model for arm in loop.make_arms(model, settings.elastic)]
    names = {each.compressor["name"] for each in trained_at}
    variants = settings_of(evaluation, model)
    labels_of(variants)
    others = {v.compressor["name"]: v for v in variants}
    others = [variant for name, variant in others.items() if name not in names]
    if not started:  # Else this was found good before the first step.
        check_trained(others, parameter_shapes(abstract_parameters(trained_at[0])))


def _finish(results: dict[str, Any], workdir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes results and report, and says where they are."""
    write_atomic(workdir / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    report = write_report(workdir)
    print_summary(results)
    say(f"Results: {workdir / RESULTS}")
    say(f"Report:  {report}")
    return results


def check_stop(stop: guards.StopSignal, step: int) -> Callable[[], None]:
    """What evaluation asks between batches."""

    def check() -> None:
        # All at the same batch: each process has a part of every program.
        if code := processes.largest(stop.exit_code if stop.requested else 0):
            raise loop.Stopped(code, step)

    return check
