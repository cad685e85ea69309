"""What the verbs of the command line do; each is also a function to call from a notebook."""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm import __version__
from efficient_vlm.cli import config_file as configs
from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct
from efficient_vlm.train.workdir_config import has_steps

RESULTS = "results.json"
# Fields that change neither the model, nor the data, nor their order.
MAY_CHANGE = (
    "data.allow_data_change",
    "data.cache_mb",
    "data.dir",
    "data.num_threads",
    "data.prefetch",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "train.log_every",
    "train.mesh",
    "train.nonfinite_limit",
    "train.save_failures",
    "train.tensorboard",
)


def fit(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, evaluates, audits and reports; called again on the same workdir, it resumes.

    Args:
      config: a config, see `configs/quickstart.py`.
      workdir: folder of the run.
      command: what to type to resume, for the message after a signal.
      say: receives lines for the user.

    Returns:
      What results.json holds; None in all processes but the first, where there are several.

    Raises:
      UserError: a mistake in the config or the data.
      train.loop.Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    from efficient_vlm.evaluation.run import evaluate_trained
    from efficient_vlm.evaluation.settings import (
        EvalConfig,
        check_trained,
        labels_of,
        parameter_shapes,
        settings_of,
    )
    from efficient_vlm.files import write_atomic
    from efficient_vlm.models.init import abstract_parameters
    from efficient_vlm.report.report import write_report
    from efficient_vlm.train import guards, loop, processes
    from efficient_vlm.train.config import read_config
    from efficient_vlm.train.goodput import Goodput

    enable_compilation_cache()
    workdir = Path(workdir)
    plain = configs.to_dict(config)
    evaluation = construct(EvalConfig, configs.section(config, "eval"), "eval")
    # Methods that cannot be evaluated are told now, not after the training.
    settings = read_config(config)[0]
    model = loop.make_model(config, vocab_size=2)
    trained_at = [arm.model for arm in loop.make_arms(model, settings.elastic)]
    names = {each.compressor["name"] for each in trained_at}
    variants = settings_of(evaluation, model)
    labels_of(variants)
    others = {v.compressor["name"]: v for v in variants}
    others = [variant for name, variant in others.items() if name not in names]
    if not has_steps(workdir):  # Else this was found good before the first.
        check_trained(others, parameter_shapes(abstract_parameters(trained_at[0])))
    first = processes.is_first()
    say = say if first else lambda line: None
    with contextlib.ExitStack() as held:
        stop = held.enter_context(guards.StopSignal())

        def claim() -> bool:
            held.enter_context(guards.WorkdirLock(workdir))
            return guards.check_workdir_config(workdir, plain, ignore=MAY_CHANGE)

        processes.agreed(claim)
        say(f"Workdir: {workdir}")
        try:
            trained = loop.train(config, workdir, stop=stop, say=say)
            clock = Goodput(workdir, warn=say, keep=first)
            try:
                with clock.timed("eval"):
                    found = evaluate_trained(
                        trained,
                        config,
                        evaluation,
                        workdir=workdir,
                        say=say,
                        check_stop=_check_stop(stop, trained.summary["steps"]),
                    )
            finally:
                clock.write()

            def finish() -> dict[str, Any]:
                results = {"train": trained.summary, **found}
                results |= {"goodput": clock.summary(), "environment": environment()}
                results["command"] = command
                text = json.dumps(results, indent=1) + "\n"
                write_atomic(workdir / RESULTS, text.encode())
                report = write_report(workdir)
                _print_summary(results)
                say(f"Results: {workdir / RESULTS}")
                say(f"Report:  {report}")
                return results

            return processes.agreed(finish)
        except loop.Stopped as stopped:
            saved = "everything up to it is saved" if stopped.step else "nothing was trained yet"
            say(f"Stopped after step {stopped.step}; {saved}.")
            if command:
                say(f"Resume with: {command}")
            raise


def _check_stop(stop: Any, step: int) -> Callable[[], None]:
    """What evaluation asks between batches."""
    from efficient_vlm.train import loop, processes

    def check() -> None:
        # All at the same batch: each process has a part of every program.
        if code := processes.largest(stop.exit_code if stop.requested else 0):
            raise loop.Stopped(code, step)

    return check


def train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm train`."""
    from efficient_vlm.train import processes
    from efficient_vlm.train.loop import Stopped

    processes.start(args.distributed)
    config = configs.load(args.config, overrides)
    command = shlex.join(["efficient-vlm", *sys.argv[1:]])
    try:
        fit(config, args.workdir, command=command)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def eval(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm eval`."""
    from efficient_vlm.costs.compiled.options import parse_mesh
    from efficient_vlm.evaluation.run import evaluate_run
    from efficient_vlm.train import guards, loop, processes

    del overrides
    methods = _read_methods(args)
    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    processes.start(args.distributed)
    first, quiet = processes.is_first(), args.json
    stream = sys.stderr if quiet else sys.stdout
    given = dict(methods=methods, images=args.images, control=args.control, mesh=mesh)
    given["say"] = lambda line: print(line, file=stream) if first else None
    if args.distributed is None:
        results = evaluate_run(args.workdir, **given)
    else:  # JAX then catches SIGTERM, and does nothing about it.
        with guards.StopSignal() as stop:
            try:
                results = evaluate_run(args.workdir, check_stop=_check_stop(stop, 0), **given)
            except loop.Stopped as stopped:
                return stopped.exit_code
    if not first:
        return 0
    if quiet:
        print(json.dumps(results, indent=1))
    else:
        _print_summary(results)
    return 0


def _read_methods(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """--compressor, --compressor.OPTION and --budget of `eval`, as `EvalConfig.methods`."""
    from efficient_vlm.cli.compress import read_methods
    from efficient_vlm.compressors.methods import METHODS

    for option, given in (("--budget", args.budget), ("--compressor.OPTION", args.options)):
        if given and not args.compressor:
            raise UserError(f"{option}: goes with --compressor", fix="add --compressor=NAME")
    if not args.compressor:
        return None
    budgets = [_positive("--budget", b) for b in (args.budget or "").split(",") if b]
    methods = []
    for fields in read_methods([args.compressor], args.options):
        own = fields.pop("budget", None)
        given = budgets or ([] if own is None else [own])
        if not given and not METHODS[fields["name"]].optional_budget:
            raise UserError("--budget: missing", fix="give visual tokens: --budget=64,16")
        methods.append({**fields, "budgets": given or None})
    return methods


def compress(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm compress`."""
    from efficient_vlm.cli.compress import main

    del overrides
    enable_compilation_cache()
    return main(args)


def data(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm data build|inspect`."""
    from efficient_vlm.cli import data as commands
    from efficient_vlm.data.config import DataConfig

    if args.action == "inspect" and args.count < 1:
        raise UserError(f"--count: {args.count}", allowed="1 or more")
    config = configs.load(args.config, overrides)
    fields = DataConfig.from_mapping(configs.section(config, "data"))
    if args.action == "build":
        commands.build(fields)
    else:
        commands.inspect(fields, split=args.split, output=args.out, images=args.count)
    return 0


def environment() -> dict[str, str]:
    """Versions and device, stored with results."""
    import platform

    import flax
    import jax

    device = jax.devices()[0]
    return {
        "efficient_vlm": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cores": str(os.cpu_count()),
    }


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, so that a resumed run starts at once.

    `EFFICIENT_VLM_COMPILATION_CACHE` names another folder, or "off". JAX's own setting, if there
    is one, is left alone.
    """
    import jax

    folder = os.environ.get("EFFICIENT_VLM_COMPILATION_CACHE")
    if folder == "off" or jax.config.jax_compilation_cache_dir:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or str(base / "efficient_vlm" / "compiled" / _machine())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _machine() -> str:
    """A name for the processor: programs compiled for one may not run on another."""
    import hashlib
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _positive(field: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{field}: {text!r} is not a positive number", allowed="1, 2, 3, ...")
    return int(text)


def _print_summary(results: Mapping[str, Any]) -> None:
    from rich.console import Console

    from efficient_vlm.report.summary import summary_table, summary_text

    if sys.stdout.isatty():
        Console().print(summary_table(results))
    else:
        print(summary_text(results))
