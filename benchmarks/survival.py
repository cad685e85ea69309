"""What it costs a run to be unkillable, on the quickstart: `python benchmarks/survival.py`.

One run at its own interval of checkpoints (train.steps cut to two of them and a half), then killed
and gone on with. Printed, and written with --out:
  stall      share of training time for which the loop waits for checkpoints (target: at most 2 %)
  manifest   share of the time of a save for digests and manifest (at most 5 %)
  resume     seconds from the start of the process to its first step, without compiling (at most 10)
Beside it, in the same process tree: a save of the same state by Orbax alone, without digests.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from efficient_vlm.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"stall_share": 0.02, "manifest_share": 0.05, "resume_seconds": 10.0}
SAVES = 9


def command(workdir: Path, config: str, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "efficient_vlm.cli.main", "train"),
        *(f"--config={config}", f"--config.train.steps={steps}", "--config.train.log_every=1"),
        *("--config.eval.images=2", "--config.eval.batch_size=2"),
        *("--config.eval.map_questions=0", f"--workdir={workdir}"),
    ]


def goodput(workdir: Path) -> dict[str, float]:
    return json.loads((workdir / "goodput.json").read_text())


def trained(workdir: Path, config: str, steps: int, kill_at: int) -> dict[str, float]:
    """Stall and resume of one run; nothing else of this program runs meanwhile."""
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = subprocess.Popen(command(workdir, config, steps), **quiet)
    while (
        not (done := read_metrics(workdir)) or done[-1]["step"] < kill_at
    ) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = goodput(workdir)
    worked = before["productive"] + before["checkpoint"] + before["data"]
    newest = read_metrics(workdir)[-1]["step"]
    started, clock = time.monotonic(), time.time()
    second = subprocess.Popen(command(workdir, config, steps), **quiet)
    reached = None
    while reached is None and second.poll() is None:
        time.sleep(0.002)
        reached = next((row for row in read_metrics(workdir) if row["time"] > clock), None)
    if reached is None:
        sys.exit(f"error: the second run ended early: {second.stderr.read().decode()[-500:]}")
    seconds = time.monotonic() - started
    while goodput(workdir)["start"] == before["start"]:  # Written behind the line of metrics.
        time.sleep(0.002)
    compiled = goodput(workdir)["compile"] - before["compile"]
    second.communicate()
    return {
        "stall_share": before["checkpoint"] / worked,
        "killed_at": newest,
        "resumed_at": reached["step"] - 1,
        "resume_seconds": seconds - compiled,
        "resume_compile_seconds": compiled,
        "lost_seconds": goodput(workdir)["lost"],
    }


def saved(workdir: Path) -> dict[str, float]:
    """The state of the run saved again and again, by us and by Orbax alone."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as orbax

    from efficient_vlm.checkpoints.run import Checkpoints

    folder = max((p for p in (workdir / "checkpoints").glob("[0-9]*")), key=lambda p: int(p.name))
    info = json.loads((folder / "checkpoint.json").read_text())
    rng = np.random.default_rng(0)
    state = {
        str(i): jax.numpy.asarray(rng.random(leaf["shape"]), leaf["dtype"])
        for i, leaf in enumerate(info["leaves"])
        if leaf.get("dtype", "").startswith("float") and leaf["shape"]
    }
    ours, theirs, manifest = [], [], []
    with (
        tempfile.TemporaryDirectory(dir=workdir) as scratch,
        Checkpoints(Path(scratch) / "ours", keep=1) as checkpoints,
    ):
        for step in range(1, SAVES + 1):
            start = time.perf_counter()
            checkpoints.save(step, state, wait=True)
            ours.append(time.perf_counter() - start)
            report = checkpoints.last_save
            manifest.append(report.manifest / report.total)
            start = time.perf_counter()
            orbax.save(Path(scratch).absolute() / f"orbax_{step}", state)
            theirs.append(time.perf_counter() - start)
    return {
        "state_bytes": sum(x.nbytes for x in state.values()),
        "save_seconds": statistics.median(ours),
        "orbax_save_seconds": statistics.median(theirs),
        "manifest_share": statistics.median(manifest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--steps", type=int, default=625)
    parser.add_argument("--kill-at", type=int, default=600)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "run"
        found = trained(workdir, args.config, args.steps, args.kill_at) | saved(workdir)
    for name, most in TARGETS.items():
        verdict = "met" if found[name] <= most else "MISSED"
        shown = f"{100 * found[name]:.2f} %" if name.endswith("share") else f"{found[name]:.1f} s"
        print(f"{name}: {shown} (at most {most:g}: {verdict})")
    print(
        f"a save of {found['state_bytes'] / 1e6:.1f} MB: {1e3 * found['save_seconds']:.0f} ms, "
        f"by Orbax alone {1e3 * found['orbax_save_seconds']:.0f} ms: "
        f"{found['save_seconds'] / found['orbax_save_seconds']:.2f} times"
    )
    print(
        f"killed at step {found['killed_at']}, gone on from {found['resumed_at']}: "
        f"{found['lost_seconds']:.1f} s lost; compiling {found['resume_compile_seconds']:.1f} s"
    )
    if args.out:
        import jax

        facts = {"machine": platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
        args.out.write_text(json.dumps(facts | found | {"targets": TARGETS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
