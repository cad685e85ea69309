"""Every training-free method on one trained model, retraining nothing.

    python experiments/training_free/run.py --workdir=runs/quickstart

Writes results.json beside this file and the table docs/training_free.md. See README.md.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import training_free_table as table

from efficient_vlm.compressors.imports import import_methods
from efficient_vlm.compressors.in_decoder import sparsevlm_plan
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError, unknown

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "results.json", HERE.parents[1] / "docs" / "training_free.md"
BUDGETS, SEEDS = (16, 4), 10

# The encoder has no CLS token: the attention that a patch receives, mean over heads and queries.
COLUMNS = {"attention": "column_mean"}
BETWEEN = {
    "prumerge": [COLUMNS],
    "prumerge_plus": [COLUMNS],
    "visionzip": [COLUMNS],
    "fastervlm": [COLUMNS],
    "vispruner": [COLUMNS],
    "hiprune": [{**COLUMNS, "middle_layer": 0}],
    "divprune": [{}],
    # "negative" is published for features of CLIP; here tokens and words share one space.
    "cdpruner": [{"relevance": "negative"}, {"relevance": "positive"}],
    "scope": [COLUMNS],
}
DECODER = ("fastv", "pyramiddrop", "sparsevlm", "dart", "fitprune", "v2drop", "vtw", "feather")
BASELINES = ("random", "stride", "pool")
SELECTABLE = ("none", *BASELINES, "downsample", "text_topk", *BETWEEN, "tome", *DECODER)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One method with its options.

    Attributes:
      name: of the method.
      options: of the method, `budget` among them where it has one.
      role: "uncompressed", "baseline", "trained" or "method".
    """

    name: str
    options: Mapping[str, Any]
    role: str = "method"


def settings(
    patches: int, encoder_layers: int, decoder_layers: int, budgets: Sequence[int], trained: bool
) -> tuple[list[Setting], dict[str, str]]:
    """What is evaluated on a model, and what cannot be, with the reason.

    Args:
      patches: N, visual tokens of an image.
      encoder_layers, decoder_layers: of the model.
      budgets: T, tokens in front of the decoder, or behind the cut of a method inside it.
      trained: whether `text_topk` has parameters.
    """
    found = [Setting("none", {"budget": patches}, "uncompressed")]
    left_out = {}
    costs = list(budgets)
    smallest = patches
    for _ in range(encoder_layers):
        smallest -= smallest // 2
    merged = sorted({max(budget, smallest) for budget in budgets}, reverse=True)
    costs += merged
    if decoder_layers > 1:
        costs += [_mean(patches, budget, decoder_layers) for budget in (*budgets, 0)]
    for budget in dict.fromkeys(costs):
        found += [Setting(name, {"budget": budget}, "baseline") for name in BASELINES]
    for budget in budgets:
        # Most methods count their tokens anew; what that alone does, random shows.
        moved = {"budget": budget, "position_policy": "reindex"}
        found.append(Setting("random", moved, "baseline"))
        found.append(Setting("downsample", {"budget": budget}, "baseline"))
        if trained:
            found.append(Setting("text_topk", {"budget": budget}, "trained"))
        for name, variants in BETWEEN.items():
            found += [Setting(name, {"budget": budget, **options}) for options in variants]
    found += [Setting("tome", {"budget": budget}) for budget in merged]
    if decoder_layers < 2:
        return found, dict.fromkeys(DECODER, "the decoder has one layer, so no place for a cut")
    found += [Setting(*of) for budget in budgets for of in _in_decoder(budget, patches)]
    found.append(Setting("vtw", {"layer": 1}))
    if decoder_layers == 2:
        left_out["feather"] = "it cuts twice, and between two decoder layers there is one place"
    else:
        found.append(Setting("feather", {"layers": (1, 2)}))
    return found, left_out


def _mean(patches: int, budget: int, layers: int) -> int:
    """Tokens processed in the mean over layers if all but `budget` leave behind the first."""
    return round((patches + (layers - 1) * budget) / layers)


def _in_decoder(budget: int, patches: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods that cut once behind decoder layer 1, down to `budget` tokens."""
    recycled = METHODS["sparsevlm"].recycle
    kept = sparsevlm_plan.kept_of(budget, patches, recycled)
    yield "fastv", {"layer": 1, "budget": budget}
    yield "pyramiddrop", {"layers": (1,), "keep": (budget,)}
    yield "sparsevlm", {"layers": (1,), "keep": (kept,)}  # It merges the rest.
    yield "dart", {"layer": 1, "budget": budget}
    yield "fitprune", {"counts": (budget,)}
    yield "v2drop", {"layers": (1,), "keep": (budget,)}


def run(
    workdir: str | Path,
    *,
    images: int | None = None,
    methods: Sequence[str] | None = None,
    own: Sequence[str] = (),
    budgets: Sequence[int] = BUDGETS,
    seeds: int = SEEDS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run with every method, as `efficient-vlm eval` does.

    Args:
      workdir: of the run; nothing in it is changed.
      images: test images in place of the config's number.
      methods: names to restrict it to; None for all.
      own: registered methods of one's own, evaluated at each budget with their default options.
      budgets: see `settings`.
      seeds: draws of `random`.
      say: receives lines for the user.

    Returns:
      What results.json holds: rows in order of falling cost, what was left out, protocol,
      environment.
    """
    from efficient_vlm.costs.flops import model_cost
    from efficient_vlm.evaluation.protocol import evaluate
    from efficient_vlm.evaluation.settings import check_trained, parameter_shapes, settings_of
    from efficient_vlm.runtime import enable_compilation_cache, environment

    for name in methods or ():
        if name not in (*SELECTABLE, *own):
            raise unknown("--methods", name, (*SELECTABLE, *own))
    enable_compilation_cache()
    start = time.monotonic()
    trained, test, evaluation = _restore(Path(workdir), images)
    model, shapes = trained.model, parameter_shapes(trained.params)
    encoder, decoder = model.make_encoder(), model.make_decoder()
    rows, columns = encoder.grid
    layers = sum(segment["layers"] for segment in decoder.segments)
    learned = model.compressor["name"] == "text_topk"
    chosen, left_out = settings(rows * columns, encoder.depth, layers, budgets, learned)
    chosen += [Setting(name, {"budget": budget}) for name in own for budget in budgets]
    if methods:
        chosen = [setting for setting in chosen if setting.name in methods]
        left_out = {name: why for name, why in left_out.items() if name in methods}
    jobs = []
    for setting in chosen:
        options = dict(setting.options)
        budget = {"budgets": [options.pop("budget")]} if "budget" in options else {}
        method = {"name": setting.name, **budget, **options}
        job = dataclasses.replace(evaluation, methods=[method], seeds=seeds, map_questions=0)
        (variant,) = settings_of(job, model)
        check_trained([variant], shapes)  # All are told before the first is begun.
        jobs.append((setting, job, variant))

    found, protocol = [], ""
    for number, (setting, job, variant) in enumerate(jobs, 1):
        results = evaluate(model, trained.params, test, job, say=lambda line: None)
        protocol = results["protocol"]
        (cost,) = results["cost"]
        counted = model_cost(variant, text_tokens=1, new_tokens=1)
        scores = {
            row["task"]: {key: row[key] for key in ("n", "accuracy", "ci95")}
            for row in results["eval"]
        }
        method = variant.make_compressor()
        found.append(
            {
                "method": setting.name,
                "options": dict(setting.options),
                "role": setting.role,
                "where": method.where,
                "position_policy": method.position_policy or decoder.position_policy,
                "entering": counted.visual_tokens,
                "leaving": counted.left,
                "mean_processed": counted.mean_visual_tokens,
                "flops": cost["flops"],
                "ms": cost["ms"],
                "seeds": seeds if setting.name == "random" else 1,
                "accuracy": scores,
            }
        )
        shown = "  ".join(f"{task} {score['accuracy']:.3f}" for task, score in scores.items())
        say(f"{number}/{len(jobs)}  {table.title(found[-1]):<42}{shown}")
    found.sort(key=lambda row: -row["mean_processed"])  # Stable: methods keep their order.
    return {
        "rows": found,
        "left_out": left_out,
        "images": len(test.answers),
        "tasks": list(test.tasks),
        "protocol": protocol,
        "params_sha256": _trained_as(Path(workdir)),
        "environment": environment(),
        "seconds": round(time.monotonic() - start, 1),
    }


def _restore(workdir: Path, images: int | None):
    """(trained model, test data, EvalConfig) of a run."""
    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.data.evalset import make_eval
    from efficient_vlm.data.pipeline import make_train
    from efficient_vlm.evaluation.settings import EvalConfig
    from efficient_vlm.fields import construct, section
    from efficient_vlm.train.trained import restore
    from efficient_vlm.train.workdir_config import read_run_config

    config = read_run_config(workdir)
    evaluation = construct(EvalConfig, section(config, "eval"), "eval")
    data = DataConfig.from_mapping(section(config, "data"))
    trained = restore(config, workdir, make_train(data, workdir=workdir))
    test = make_eval(
        dataclasses.replace(data, batch_size=evaluation.batch_size),
        limit=evaluation.images if images is None else images,
        workdir=workdir,
        tokenizer=trained.pipeline.tokenizer,
    )
    return trained, test, evaluation


def _trained_as(workdir: Path) -> str | None:
    """The hash of the parameters that the run itself reported, if it has finished."""
    path = workdir / "results.json"
    return json.loads(path.read_text())["train"].get("params_sha256") if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="finished run, such as runs/quickstart")
    parser.add_argument("--images", type=int, help="test images; default: the run's eval.images")
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="file that registers methods of your own, which are evaluated at each budget, too",
    )
    parser.add_argument("--out", type=Path, help="results; default: beside the script")
    parser.add_argument("--table", type=Path, help="Markdown; default: docs/training_free.md")
    args = parser.parse_args(arguments)
    if args.images is not None and args.images < 1:
        parser.error(f"--images: {args.images}, but at least 1 is needed")
    names = [name for name in (args.methods or "").split(",") if name]
    try:
        known = set(METHODS)
        import_methods(args.imports)
        own = [name for name in METHODS if name not in known]
        results = run(args.workdir, images=args.images, methods=names or None, own=own)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    typed = sys.argv[1:] if arguments is None else list(arguments)
    results["command"] = shlex.join(["python", "experiments/training_free/run.py", *typed])
    # A part of it replaces the whole only where it is told to.
    whole = not names and not own and args.images is None
    out = args.out or (RESULTS if whole else None)
    page = args.table or (TABLE if whole else None)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if page:
        page.write_text(table.markdown(results), encoding="utf-8")
    else:
        print(table.markdown(results))
    written = [f"{name}: {path}" for name, path in (("Results", out), ("Table", page)) if path]
    written = "  ".join(written) or "A part: nothing is written without --out and --table."
    print(f"{results['seconds']} s. {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
