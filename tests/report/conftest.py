"""Synthetic workdirs in the documented format, with known numbers."""

import copy
import json
import shutil

import numpy as np
import pytest

from efficient_vlm.evaluation import stats
from efficient_vlm.evaluation.token_maps import Cell, Example, write_maps

TASKS = {"needle": 10, "count": 10, "point": 8, "global": 8}  # Task -> number of answers.
BUDGETS = (64, 16, 4, 1)
METHODS = ("average_pool", "downsample", "random", "stride", "text_topk", "resampler")
IMAGES = 60


def skill(name, budget, task):
    """True accuracy of the synthetic model."""
    if task == "global":
        return 0.995
    full = {"needle": 0.92, "count": 0.97, "point": 0.98}[task]
    loss = {"text_topk": 0.02, "average_pool": 0.2, "resampler": 0.12, "random": 0.42}
    floor = 1 / TASKS[task]
    fall = loss.get(name, 0.35) * np.log2(64 / budget) / 2 * (0.4 if task == "count" else 1)
    return max(floor, full - (0 if name == "none" else fall))


def settings():
    return [("none", 64)] + [(m, b) for m in METHODS for b in BUDGETS[1:]]


def predictions(rng):
    """One record per setting, image and task, answers shared by all settings."""
    answers = {t: rng.integers(0, k, IMAGES) for t, k in TASKS.items()}
    luck = rng.normal(0, 0.4, IMAGES)
    found = []
    for name, budget in settings():
        for task, kinds in TASKS.items():
            p = skill(name, budget, task)
            right = rng.random(IMAGES) < np.clip(p + 0.15 * luck * (p < 0.99), 0, 1)
            for i in range(IMAGES):
                answer = int(answers[task][i])
                given = answer if right[i] else (answer + 1 + int(rng.integers(kinds - 1))) % kinds
                found.append(
                    {
                        "compressor": name,
                        "budget": budget,
                        "task": task,
                        "index": i,
                        "question": f"{task} of image {i}?",
                        "answer": str(answer),
                        "prediction": str(given),
                        "correct": given == answer,
                    }
                )
    return found


def evaluation(records):
    rows = []
    for name, budget in settings():
        for task in TASKS:
            own = [
                r
                for r in records
                if (r["compressor"], r["budget"], r["task"]) == (name, budget, task)
            ]
            mean, lo, hi = stats.accuracy_interval(
                [r["correct"] for r in own], [r["index"] for r in own]
            )
            rows.append(
                {
                    "compressor": name,
                    "budget": budget,
                    "task": task,
                    "n": len(own),
                    "accuracy": mean,
                    "ci95": [lo, hi],
                }
            )
    return rows


def cost(name, budget):
    extra = {"text_topk": 0.3, "resampler": 1.1, "none": 0.0}.get(name, 0.02)
    patches = budget if name == "downsample" else 64
    return {
        "compressor": name,
        "budget": budget,
        "visual_tokens": budget,
        "flops": {
            "encoder": 18_000_000 * patches // 64,
            "compressor": int(1e6 * extra) + 8192 * budget,
            "decoder": 260_000 * (budget + 8),
            "head": 10_000,
        },
        "kv_bytes": 1024 * (budget + 10),
        "ms": {
            "encode": 0.9 * patches / 64 + 0.1,
            "compress": 0.05 + 0.2 * extra,
            "prefill": 0.35 + 0.02 * budget,
            "decode_per_token": 0.3,
        },
    }


def metrics(rng, steps, experts=4, layers=2):
    lines, tilt = [], rng.normal(0, 1, (layers, experts))
    for step in range(10, steps + 1, 10):
        budget = int(rng.choice(BUDGETS))
        load = np.exp(tilt * np.exp(-step / 300))
        loss = 2.2 * np.exp(-step / 250) + 0.05 * np.log2(64 / budget) + rng.normal(0, 0.03)
        lines.append(
            {
                "step": step,
                "split": "train",
                "time": 1.7e9 + step * 0.07,
                "loss": max(loss, 0.01) + 0.05,
                "accuracy": 1 - min(max(loss, 0.01), 2) / 2.2,
                "grad_norm": float(np.exp(rng.normal(-1, 0.2))),
                "lr": 0.01 * min(1, step / 100) * (1 + np.cos(np.pi * step / steps)) / 2,
                "images_per_second": 440 + rng.normal(0, 8),
                "step_seconds": 0.072,
                "data_wait_fraction": abs(rng.normal(0.01, 0.004)),
                "budget": budget,
                "load_balance": 1 + 0.6 * np.exp(-step / 300),
                "router_z": 1.5 * np.exp(-step / 500),
                "expert_load": (load / load.sum(1, keepdims=True)).tolist(),
                "skipped": 0,
            }
        )
    return lines


CONFIG = {
    "name": "quickstart",
    "model": {
        "vocab_size": 40,
        "encoder": {"image_size": 64, "patch_size": 8, "width": 64, "depth": 1, "num_heads": 4},
        "decoder": {
            "width": 64,
            "segments": [{"layers": 2}],
            "moe": {"num_experts": 4, "top_k": 1, "expert_dim": 192},
        },
    },
    "train": {"steps": 2000, "batch_size": 32},
}


def example_maps(rng, count=4):
    examples = []
    for k in range(count):
        image = rng.normal(8, 6, (64, 64, 3)).clip(0, 60)
        for _ in range(9):
            r, c = rng.integers(0, 8, 2) * 8
            image[r + 1 : r + 7, c + 2 : c + 6] = rng.integers(80, 255, 3)
        keep = np.sort(rng.permutation(64)[:16])
        chosen = np.full(64, -1)
        chosen[keep] = np.arange(16)
        cells = [Cell("none", 64, np.arange(64), "7")]
        cells.append(Cell("text_topk", 16, chosen, "7", scores=rng.random(64)))
        for factor, budget in ((2, 16), (4, 4), (8, 1)):
            place = np.arange(8) // factor
            source = (place[:, None] * (8 // factor) + place).reshape(-1)
            cells.append(Cell("average_pool", budget, source, str(budget)))
        cells.append(Cell("random", 16, chosen[rng.permutation(64)], ""))
        examples.append(
            Example(image.astype(np.uint8), f"which digit is <b>{k}</b>?", "7", cells, "needle", k)
        )
    return examples


def write(folder, *, steps=2000, evaluated=True, trained=True, with_maps=True, seed=0):
    """A complete workdir, or one with parts left out."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = metrics(rng, steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    results = {}
    if trained:
        results["train"] = {
            "steps": steps,
            "seconds": 143.2,
            "params": 214_000,
            "seeds": {"train": 7, "data": 3, "dataset": 0},
            "params_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        }
        results["command"] = "efficient-vlm train --config=configs/quickstart.py --workdir=runs/q"
        results["goodput"] = {"productive": 120.0, "compile": 20.0, "lost": 10.0, "data": 0.0}
    if evaluated:
        records = predictions(rng)
        results["eval"] = evaluation(records)
        results["cost"] = [cost(*s) for s in settings()]
        (folder / "predictions").mkdir(exist_ok=True)
        for name, budget in settings():
            own = [r for r in records if (r["compressor"], r["budget"]) == (name, budget)]
            text = "".join(json.dumps(r) + "\n" for r in own)
            (folder / "predictions" / f"{name}_{budget}.jsonl").write_text(text)
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    if with_maps:
        write_maps(folder, example_maps(rng))
    return results


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Workdirs already written in this session, by their parts."""
    return {}, tmp_path_factory.mktemp("workdirs")


@pytest.fixture
def write_workdir(tmp_path, written):
    """Function giving a synthetic workdir of the test's own: (**parts) -> (path, results)."""
    known, folder = written

    def make(**parts):
        key = tuple(sorted(parts.items()))
        if key not in known:
            original = folder / str(len(known))
            known[key] = original, write(original, **parts)
        original, results = known[key]
        shutil.copytree(original, tmp_path / "run")
        return tmp_path / "run", copy.deepcopy(results)

    return make
