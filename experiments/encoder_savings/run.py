"""Savings inside the encoder and what they cost in accuracy, beside smaller pictures.

    python experiments/encoder_savings/run.py

For each seed: trains config.py with all patches; evaluates every row of savings_methods.py on that
model as it is; fine-tunes the model with every row for a few steps and evaluates again; trains
smaller pictures from the start. Then times the encoders in turns and writes table.md. What has
results is not done again. See README.md.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import savings_methods as methods
import savings_table as table
import savings_timing as timing

from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.cli import config_file
from efficient_vlm.cli.run import fit
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.evalset import EvalSet, make_eval
from efficient_vlm.data.pipeline import make_train
from efficient_vlm.evaluation.protocol import evaluate, score
from efficient_vlm.evaluation.settings import EvalConfig
from efficient_vlm.fields import construct, section
from efficient_vlm.files import write_atomic
from efficient_vlm.runtime import enable_compilation_cache, environment
from efficient_vlm.train.trained import Trained, restore

HERE = Path(__file__).resolve().parent
# Of a run that starts from the base model: every method gets the same steps, "none" as well.
TUNED_STEPS = 200
TUNED = dict(learning_rate=3e-3, adam_learning_rate=2e-3, warmup_steps=20, decay_steps=None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all seeds have in common.

    Attributes:
      quick: whether a few steps are enough, as a test.
      overrides: "section.field=value" of the config.
      steps: of fine-tuning.
      runs: folder of workdirs.
      out: folder of results.
    """

    quick: bool
    overrides: tuple[str, ...]
    steps: int
    runs: Path
    out: Path

    def config(self, seed: int) -> Any:
        """The base config of one seed."""
        name = str(HERE / "config.py") + (":quick" if self.quick else "")
        return config_file.load(name, [f"seed={seed}", *self.overrides])


def trained(config: Any, workdir: Path) -> Trained:
    """The model of a run, which is trained, or trained further, where it is not finished."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        done = max(checkpoints.committed(), default=0)
    if done < config.train.steps or not (workdir / "results.json").is_file():
        fit(config, workdir)
    data = DataConfig.from_mapping(section(config, "data"))
    return restore(config, workdir, make_train(data, workdir=workdir))


def learned(setting: Setting, seed: int, row: methods.Row, mode: str) -> Trained:
    """A model trained with a method: the base model of a seed after some steps, or a fresh one."""
    config, folder = setting.config(seed), setting.runs / f"seed{seed}"
    if mode == "tuned":
        config.train.init_from = str(folder / "base")
        config.train.steps = setting.steps
        config.train.checkpoint_every = setting.steps
        config.train.optimizer.update(TUNED)
    config.train.elastic = row.taught()
    # A glance: the whole evaluation follows.
    config.eval.update(images=32, seeds=1, methods=row.evaluated()[:1])
    return trained(config, folder / (row.label if mode == "tuned" else f"{row.label}_scratch"))


def answered(model: Trained, test: EvalSet, evaluation: EvalConfig, lines: Sequence) -> list[dict]:
    """The predictions of a method, those of all of its lines together."""
    asked = dataclasses.replace(evaluation, methods=lines, map_questions=0)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)
        evaluate(model.model, model.params, test, asked, workdir=found, say=lambda line: None)
        files = sorted((found / "predictions").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def result(row: methods.Row, predictions: Iterable[Mapping], tasks: Sequence[str]) -> dict:
    """What is kept of a method's answers: enough for paired differences."""
    predictions, right = list(predictions), {}
    for each in predictions:
        right.setdefault((each["index"], each["slot"], each["task"]), []).append(each["correct"])
    (draws,) = {len(values) for values in right.values()}
    questions = [list(key) for key in sorted(right)]
    return {
        "method": row.label,
        "options": dict(row.options),
        "kind": row.kind,
        "accuracy": {each.pop("task"): each for each in score(predictions, tasks)},
        "draws": draws,
        "questions": questions,
        # Right draws of each question, a hexadecimal digit.
        "right": "".join(f"{sum(right[key]):x}" for key in sorted(right)),
    }


def one_seed(setting: Setting, seed: int, chosen: Sequence[methods.Row]) -> None:
    """All results of one seed that are not there yet."""
    jobs = [(mode, row) for mode in table.MODES for row in chosen]
    # Fresh models with smaller pictures: rivals that had as many steps as the base model.
    jobs = [(m, r) for m, r in jobs if m != "scratch" or r.kind == "picture"]
    jobs = [(m, r) for m, r in jobs if not _path(setting, seed, m, r).is_file()]
    if not jobs:
        return
    config = setting.config(seed)
    base = trained(config, setting.runs / f"seed{seed}" / "base")
    evaluation = construct(EvalConfig, section(config, "eval"), "eval")
    data = DataConfig.from_mapping(section(config, "data"))
    test = make_eval(
        dataclasses.replace(data, batch_size=evaluation.batch_size),
        limit=evaluation.images,
        tokenizer=base.pipeline.tokenizer,
    )
    for mode, row in jobs:
        start = time.monotonic()
        model = base if mode == "free" else learned(setting, seed, row, mode)
        found = result(row, answered(model, test, evaluation, row.evaluated()), test.tasks)
        found |= {"seed": seed, "mode": mode, "quick": setting.quick}
        found["steps"] = setting.steps if mode == "tuned" else 0
        found["questions"] = table.keep_questions(setting.out, found["questions"])
        found |= {"seconds": round(time.monotonic() - start, 1), "environment": environment()}
        path = _path(setting, seed, mode, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(found, separators=(",", ":")) + "\n").encode())
        shown = "  ".join(f"{t} {each['accuracy']:.3f}" for t, each in found["accuracy"].items())
        print(f"seed {seed}, {mode:<8}{row.label:<24}{shown}  {found['seconds']} s", flush=True)
        jax.clear_caches()  # Each method has programs of its own.


def _path(setting: Setting, seed: int, mode: str, row: methods.Row) -> Path:
    return setting.out / f"seed{seed}" / mode / f"{row.label}.json"


def measured(setting: Setting, seed: int, chosen: Sequence[methods.Row], again: bool) -> dict:
    """Costs of the encoder with each row, from timing.json where all are in it."""
    path = setting.out / "timing.json"
    found = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    if again or any(row.label not in found["rows"] for row in chosen):
        config = setting.config(seed)
        base = trained(config, setting.runs / f"seed{seed}" / "base")
        found = timing.measure(base, config, chosen, turns=3 if setting.quick else timing.TURNS)
        found["environment"] = environment()
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def parse_seeds(text: str) -> list[int]:
    """ "0-2" or "0,3" as numbers."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(n) for n in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0-2", help="a range or a list (default: %(default)s)")
    parser.add_argument("--methods", help="labels of savings_methods.py, joined by commas")
    parser.add_argument("--steps", type=int, default=TUNED_STEPS, help="of fine-tuning")
    parser.add_argument("--runs", type=Path, help="workdirs (default: runs/encoder_savings)")
    parser.add_argument("--out", type=Path, help="results (default: beside the script)")
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    parser.add_argument("--time-again", action="store_true", help="on an idle machine")
    parser.add_argument("--quick", action="store_true", help="a few steps in a folder of its own")
    args = parser.parse_args(argv)
    enable_compilation_cache()
    runs = args.runs or Path("runs/encoder_savings_quick" if args.quick else "runs/encoder_savings")
    out = args.out or (runs / "results" if args.quick else HERE / "results")
    if args.quick and not args.runs:
        shutil.rmtree(runs, ignore_errors=True)
    steps = 2 if args.quick else args.steps
    setting = Setting(args.quick, tuple(args.set), steps, runs.absolute(), out.absolute())
    chosen = methods.rows(args.methods, args.quick)
    seeds = [0] if args.quick else parse_seeds(args.seeds)
    for seed in seeds:
        one_seed(setting, seed, chosen)
    costs = measured(setting, seeds[0], chosen, args.time_again)
    page = setting.out / "table.md"
    page.write_text(table.markdown(table.gathered(setting.out), costs), encoding="utf-8")
    print(f"Table: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
