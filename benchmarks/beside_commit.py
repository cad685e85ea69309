"""This checkout beside another one: training, import, prefill, decoding, first token.

    git worktree add ../before 04a1b6a && python benchmarks/beside_commit.py --base=../before

Each measure runs in processes of their own that take turns, the other checkout first in one turn
and second in the next; what was compiled, and data that were built, come from a run before that is
not counted. Prints medians, their ratios (ours / theirs, below 1 is better), and the peak of memory
of both. Only names that a user may import are used, so checkouts may be laid out differently.

Models have random weights in the geometry of SmolVLM-256M, float32; the picture becomes five tiles
of 512 x 512 (320 visual tokens). No network, neither torch nor transformers.
"""

import argparse
import collections
import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = Path(__file__).resolve().parent.parent
CACHE = "enable_compilation_cache"
QUESTION = " ".join(f"w{1000 + 7 * i}" for i in range(36))
# Measure -> (unit of what is printed, units in a second, what it is).
MEASURES = {
    "training": ("ms", 1e3, "a step of the other checkout's configs/quickstart.py"),
    "import": ("s", 1, "import_model of 643 MB in float32"),
    "prefill": ("s", 1, "picture and prompt up to the first token, programs there"),
    "decoding": ("ms", 1e3, "a further token"),
    "first_token": ("s", 1, "from `import efficient_vlm` to the first token, warm cache"),
}
# A job is a process: it gives one measure, or two.
JOBS = {"training": "training", "import": "import", "first_token": "first_token"}
JOBS |= dict.fromkeys(("prefill", "decoding"), "generation")


# --- what a process of one checkout does ----------------------------------------------------------


def module_of(root: Path, function: str) -> str:
    """Name of the module of a checkout that defines a function, wherever it is."""
    for path in sorted((root / "efficient_vlm").rglob("*.py")):
        if f"\ndef {function}(" in path.read_text():
            return ".".join(path.relative_to(root).with_suffix("").parts)
    raise SystemExit(f"error: {root} has no function {function}")


def training(root: Path, scratch: Path, quick: bool) -> dict[str, float]:
    """Seconds of a step: the mean over the run of the medians of each budget.

    What the loop writes as the time of a step is the time that it waited for the step before.
    """
    import efficient_vlm as evlm

    steps, workdir = 40 if quick else 400, scratch / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    config = evlm.load_config(
        str(scratch.parent / "quickstart.py"),
        [
            f"train.steps={steps}",
            f"train.checkpoint_every={10 * steps}",
            "train.log_every=1",
            f"data.dir={scratch / 'data'}",
            "data.train_images=1000",
            "data.test_images=100",
            "eval.images=32",
        ],
    )
    config.eval.methods = [dict(name="none", budgets=[64])]
    evlm.fit(config, workdir, say=lambda line: None)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = collections.defaultdict(list)
    for before, row in zip(rows, rows[1:], strict=False):
        times[before["budget"]].append(row["step_seconds"])
    count = {budget: len(found) for budget, found in times.items()}
    sums = sum(count[budget] * statistics.median(times[budget]) for budget in times)
    return {"training": sums / sum(count.values())}


def imported(root: Path, scratch: Path, quick: bool) -> dict[str, float]:
    """Seconds of an import, without those of Python's."""
    module, target = importlib.import_module(module_of(root, "import_model")), scratch / "imported"
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    module.import_model(scratch.parent / "to_import", target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return {"import": seconds}


def generation(root: Path, scratch: Path, quick: bool) -> dict[str, float]:
    """Seconds of prefill (encoder included), and of the median step of decoding."""
    vlm, new, runs = load(scratch, module_of(root, CACHE)), 4 if quick else 32, []
    for _ in range(2 if quick else 4):
        runs.append(ask(vlm, scratch, new).seconds)
        if len(runs[-1]["decode"]) != new - 1:
            raise SystemExit("error: the answer ended before its time")
    del runs[0]
    stages = ("encode", "compress", "prefill")
    prefill = statistics.median(sum(run[stage] for stage in stages) for run in runs)
    decoding = statistics.median(step for run in runs for step in run["decode"])
    return {"prefill": prefill, "decoding": decoding}


def first_token(root: Path, scratch: Path, quick: bool) -> dict[str, float]:
    """Seconds from the first import of the package to the first token."""
    module = module_of(root, CACHE)
    start = time.perf_counter()
    out = ask(load(scratch, module), scratch, 1)
    seconds = time.perf_counter() - start
    if out.visual.embed.shape[1] != 320:
        raise SystemExit(f"error: {out.visual.embed.shape[1]} visual tokens, not 320")
    return {"first_token": seconds}


def load(scratch: Path, module: str):
    """The model, with a compilation cache; `module` is that of the function which turns it on."""
    import efficient_vlm as evlm

    getattr(importlib.import_module(module), CACHE)()
    return evlm.from_pretrained(scratch.parent / "model", check=False)


def ask(vlm, scratch: Path, new_tokens: int):
    """What the model generates about the picture, with seconds by stage."""
    return vlm.run([QUESTION], [[scratch.parent / "picture.png"]], max_new_tokens=new_tokens)


WORK = {
    "training": training,
    "import": imported,
    "generation": generation,
    "first_token": first_token,
}


def work(job: str, root: Path, scratch: Path, quick: bool) -> None:
    """One job of one checkout; its last line is JSON: seconds by measure, bytes at the peak."""
    found = WORK[job](root, scratch, quick)
    package = Path(sys.modules["efficient_vlm"].__file__).resolve()
    if not package.is_relative_to(root):
        raise SystemExit(f"error: {package} was imported, not that of {root}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": found, "peak_bytes": peak}))


# --- taking turns ---------------------------------------------------------------------------------


def run_worker(job: str, root: Path, scratch: Path, quick: bool) -> dict:
    """What `work` prints, from a process with the package of `root`."""
    scratch.mkdir(parents=True, exist_ok=True)
    environment = dict(
        PYTHONPATH=str(root),
        JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu"),
        EFFICIENT_VLM_COMPILATION_CACHE=str(scratch / "programs"),
    )
    words = [f"--worker={job}", f"--base={root}", f"--scratch={scratch}"]
    done = subprocess.run(
        [sys.executable, __file__, *words, *(["--quick"] if quick else [])],
        env={**os.environ, **environment},
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: {job} of {root} failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def prepare(scratch: Path, quick: bool) -> None:
    """What all processes read."""
    import numpy as np
    from PIL import Image
    from random_smolvlm import write_checkpoint

    layers = (2, 2) if quick else (12, 30)
    write_checkpoint(scratch / "model", *layers)
    write_checkpoint(scratch / "to_import", 12, 3)
    slope = np.linspace(0, 255, 1024)
    planes = [slope[:, None] + 0 * slope, slope + 0 * slope[:, None], slope[::-1, None] + 0 * slope]
    Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(scratch / "picture.png")


def commit(root: Path) -> str:
    """What git calls a checkout."""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def compare(roots: dict[str, Path], measures: list[str], turns: int, quick: bool) -> dict:
    """Measure -> side -> what each turn found; prints a line for each job of each turn."""
    found = {name: {side: {"seconds": [], "peak_bytes": []} for side in roots} for name in measures}
    jobs = list(dict.fromkeys(JOBS[name] for name in measures))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        run_worker("prepare", OURS, scratch, quick)
        # One recipe for both: ours has weight decay by now, and draws other budgets.
        shutil.copy(roots["base"] / "configs" / "quickstart.py", scratch)
        for turn in range(turns + 1):  # The first fills caches.
            for job in jobs:
                for side in list(roots)[:: 1 if turn % 2 else -1]:
                    start = time.perf_counter()
                    out = run_worker(job, roots[side], scratch / side, quick)
                    wall = time.perf_counter() - start
                    print(f"turn {turn} of {turns}, {job}, {side}: {wall:.1f} s", flush=True)
                    for name in set(out["seconds"]) & set(measures) if turn else ():
                        found[name][side]["seconds"].append(out["seconds"][name])
                        found[name][side]["peak_bytes"].append(out["peak_bytes"])
    return found


def table(found: dict) -> list[str]:
    """Lines for a person: medians of both sides and their ratios."""
    lines = [f"{'':12}" + f"{'base':>10}{'ours':>10}{'ratio':>10}" * 2]
    for name, sides in found.items():
        unit, scale, what = MEASURES[name]
        line = f"{name:12}"
        for key, by, digits, of in (("seconds", scale, 2, unit), ("peak_bytes", 1e-6, 0, "MB")):
            base, ours = (statistics.median(sides[side][key]) for side in ("base", "ours"))
            line += f"{base * by:10.{digits}f}{ours * by:10.{digits}f} {of:2} {ours / base:6.2f}"
        lines.append(f"{line}  {what}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=Path, help="the other checkout")
    # Even: the side that goes first in a turn reads files that are no longer in memory.
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--only", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="small models, one turn")
    parser.add_argument("--out", type=Path, help="file for all samples, JSON")
    parser.add_argument("--worker", choices=("prepare", *WORK), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = args.base.resolve()
    if args.worker == "prepare":
        return prepare(args.scratch, args.quick)
    if args.worker:
        return work(args.worker, base, args.scratch, args.quick)
    measures = args.only.split(",")
    if unknown := set(measures) - set(MEASURES):
        parser.error(f"--only: {', '.join(sorted(unknown))}; allowed: {', '.join(MEASURES)}")
    if not (base / "efficient_vlm" / "__init__.py").is_file():
        parser.error(f"--base: no package efficient_vlm in {base}")
    roots = {"base": base, "ours": OURS}
    found = compare(roots, measures, 1 if args.quick else args.turns, args.quick)
    print(*table(found), sep="\n")
    if args.out:
        commits = {side: commit(root) for side, root in roots.items()}
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        result = {"commits": commits, "machine": machine, "quick": args.quick, "measures": found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
