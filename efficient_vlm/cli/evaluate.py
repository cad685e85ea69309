"""`efficient-vlm eval`: the newest checkpoint of a run, with the config's methods or another."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from efficient_vlm.cli.methods import import_named, method_fields
from efficient_vlm.cli.run import check_stop
from efficient_vlm.compressors.imports import import_methods
from efficient_vlm.compressors.methods import find
from efficient_vlm.costs.compiled.options import parse_mesh
from efficient_vlm.errors import UserError, short
from efficient_vlm.evaluation.run import evaluate_run
from efficient_vlm.report.summary import print_summary
from efficient_vlm.train import guards, loop, processes


def evaluate(
    workdir: str,
    *,
    imports: Sequence[str] = (),
    method: str | None = None,
    options: Sequence[str] = (),
    budgets: str | None = None,
    images: int | None = None,
    control: str | None = None,
    metric: str | None = None,
    mesh: str | None = None,
    distributed: str | None = None,
    as_json: bool = False,
) -> int:
    """`efficient-vlm eval`.

    Args:
      workdir: of the run.
      imports: files and modules that register methods of one's own, see `import_methods`.
      method, options, budgets: --compressor, "option=value" of it, and visual tokens with commas,
        in place of the config's methods.
      images: test images, None for the config's number.
      control: "blank", "shuffled" or None.
      metric: of a fine-tuned run, None for the config's.
      mesh: such as "fsdp:4", None for the run's.
      distributed: see `train.processes.start`.
      as_json: print results as JSON, and lines for the user on stderr.

    Returns:
      The exit code: 0, or that of a signal.
    """
    sizes = None if mesh is None else parse_mesh(mesh)
    processes.start(distributed)  # Before anything asks for devices, as a file of one's own may.
    import_methods(imports)
    import_named([method] if method else [], workdir)
    methods = _read_methods(method, options, budgets)
    first, stream = processes.is_first(), sys.stderr if as_json else sys.stdout
    given = dict(methods=methods, images=images, control=control, metric=metric, mesh=sizes)
    given["say"] = lambda line: print(line, file=stream) if first else None
    if distributed is None:
        results = evaluate_run(workdir, **given)
    else:  # JAX then catches SIGTERM, and does nothing about it.
        with guards.StopSignal() as stop:
            try:
                results = evaluate_run(workdir, check_stop=check_stop(stop, 0), **given)
            except loop.Stopped as stopped:
                return stopped.exit_code
    if first and as_json:
        print(json.dumps(results, indent=1))
    elif first:
        print_summary(results)
    return 0


def _read_methods(
    method: str | None, options: Sequence[str], budgets: str | None
) -> list[dict[str, Any]] | None:
    """--compressor, --compressor.OPTION and --budget as `EvalConfig.methods`."""
    for option, given in (("--budget", budgets), ("--compressor.OPTION", options)):
        if given and not method:
            raise UserError(f"{option}: goes with --compressor", fix="add --compressor=NAME")
    if not method:
        return None
    counts = [_positive("--budget", count) for count in (budgets or "").split(",") if count]
    methods = []
    for fields in method_fields([method], options):
        own = fields.pop("budget", None)
        given = counts or ([] if own is None else [own])
        if not given and not find(fields["name"]).optional_budget:
            raise UserError("--budget: missing", fix="give visual tokens: --budget=64,16")
        methods.append({**fields, "budgets": given or None})
    return methods


def _positive(field: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{field}: {short(text)} is not a positive number", allowed="1, 2, 3, ...")
    return int(text)
