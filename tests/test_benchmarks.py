"""The benchmark of compressors runs on tiny shapes and writes what the docs are made from."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import QUICK_TO_COMPILE

from efficient_vlm.costs.flops import model_cost
from efficient_vlm.models.vlm import VisionLanguageModel

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("average_pool", "fastervlm", "fastv")
STAGES = {"encode", "compress", "prefill", "decode"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(parsed JSON, Markdown, what was printed) of a run on tiny shapes."""
    folder = tmp_path_factory.mktemp("benchmark")
    out, table = folder / "results" / "out.json", folder / "table.md"
    done = subprocess.run(
        [
            sys.executable,
            *("benchmarks/compressors.py", "--quick", "--batch=2", "--rounds=2"),
            *(f"--methods={','.join(METHODS)}", f"--out={out}", f"--table={table}"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": QUICK_TO_COMPILE,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), table.read_text(), done.stdout


def tiny_cost(compressor, new_tokens):
    """Cost by our own count of the geometry of --quick, written out here again."""
    model = VisionLanguageModel(
        vocab_size=32,
        encoder=dict(
            image_size=32,
            patch_size=4,
            width=64,
            depth=3,
            num_heads=4,
            mlp_dim=128,
            position="learned",
            class_token=True,
        ),
        compressor=compressor,
        connector=dict(hidden_dim=64),
        decoder=dict(width=64, num_heads=4, segments=[dict(layers=4)], mlp_dim=96),
    )
    return model_cost(model, text_tokens=8, new_tokens=new_tokens)


def layer(tokens):
    """FLOPs of a decoder layer: q, k, v, o, two attention products, three of SwiGLU."""
    return 2 * tokens * (4 * 64 * 64 + 2 * tokens * 64 + 3 * 64 * 96)


HEAD = 2 * 64 * 32


def test_a_row_for_each_method_with_all_stages(result):
    data, _, _ = result
    assert [row["method"] for row in data["rows"]] == ["none", *METHODS]
    for row in data["rows"]:
        assert row["batch"] == 2
        assert set(row["ms"]) == set(row["speedup"]) == set(row["compile_s"]) == STAGES
        assert all(value > 0 for value in row["ms"].values())
        predicted = row["speedup_prefill_predicted"]
        ratio = row["speedup_prefill_measured"] / predicted
        assert row["efficiency"] == pytest.approx(ratio)
        assert row["prefill_temporary_bytes"] > 0
    assert data["rounds"] == {"2": 2}
    assert "block_until_ready" in data["protocol"]
    assert data["environment"]["processor"]


def test_predicted_speedups_are_ratios_of_flops(result):
    rows = {row["method"]: row for row in result[0]["rows"]}
    full = 4 * layer(64 + 8) + HEAD
    assert rows["none"]["speedup_prefill_predicted"] == 1
    for name in ("average_pool", "fastervlm"):
        short = 4 * layer(16 + 8) + HEAD
        assert rows[name]["speedup_prefill_predicted"] == pytest.approx(full / short)
    # FastV: two layers on all tokens, one row of attention at the cut, two layers on what is left.
    row = 2 * (64 + 8) * 64
    short = 2 * layer(64 + 8) + row + 2 * layer(16 + 8) + HEAD
    assert rows["fastv"]["speedup_prefill_predicted"] == pytest.approx(full / short)
    options = {"fastervlm": dict(budget=16), "fastv": dict(layer=2, keep=16)}
    none = tiny_cost(dict(name="none", budget=64), 8)
    for name, given in options.items():
        cost = tiny_cost(dict(name=name, **given), 8)
        assert rows[name]["options"] == given
        total = none.total / cost.total
        assert rows[name]["speedup_first_token_predicted"] == pytest.approx(total)


def test_tokens_and_cache_bytes(result):
    rows = {row["method"]: row for row in result[0]["rows"]}
    processed = {"none": 64, "average_pool": 16, "fastervlm": 16, "fastv": (64 + 16) / 2}
    for name, count in processed.items():
        tokens = rows[name]["visual_tokens"]
        assert tokens["mean_processed"] == count
        assert tokens["entering"] == (64 if name == "fastv" else count)
        assert rows[name]["kv_bytes"] == rows[name]["kv_bytes_predicted"]
        assert rows[name]["kv_bytes"] == 2 * 4 * (count + 8 + 8) * 2 * 64 * 4


def test_scoring_is_measured_where_a_method_scores(result):
    rows = {row["method"]: row for row in result[0]["rows"]}
    assert rows["none"]["scoring_share_of_prefill"] is None
    assert rows["average_pool"]["signal_ms"] == rows["fastv"]["signal_ms"] == 0
    assert rows["fastervlm"]["signal_ms"] > 0
    prefill = rows["none"]["ms"]["prefill"]
    for name in METHODS:
        row = rows[name]
        share = (row["signal_ms"] + row["module_ms"]) / prefill
        assert row["scoring_share_of_prefill"] == pytest.approx(share) and share > 0


def test_targets_and_table(result):
    data, table, printed = result
    found = {(t["target"], t["method"]): t for t in data["targets"]}
    assert len(found) == 4  # Two methods in front of the decoder, two one-row scorers.
    for target in found.values():
        above = target["value"] >= target["limit"]
        wanted = above if "speed-up" in target["target"] else not above
        assert target["verdict"] == ("PASS" if wanted else "MISS")
    assert table.strip() in printed
    assert "benchmarks/compressors.py --quick --batch=2" in table
    for row in data["rows"]:
        assert f"| {row['method']}(" in table
        named = f"{row['method']} (batch 2)" in table.rpartition("Slower than")[2]
        assert named == row["slower_than_none"]


def load(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attention_beside_its_peers(tmp_path):
    out = tmp_path / "out.json"
    words = [sys.executable, "benchmarks/attention_cpu.py", "--quick", f"--out={out}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = json.loads(out.read_text())
    assert {row["direction"] for row in found["rows"]} == {"forward", "forward and backward"}
    assert all(row["times_faster_than"]["jax.nn"] > 0 for row in found["rows"])
    assert [row["kept"] for row in found["kept_keys"]] == ["1/1", "1/2", "1/4", "1/9"]
    assert set(found["importance"]["extra_to_forward"]) == {"one row", "all rows"}


def test_the_benchmark_of_gpus_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention_gpu.py"])
    assert load("attention_gpu").main() == 2
    assert "Hopper" in capsys.readouterr().err


def test_the_benchmark_of_gpus_measures_what_it_says(monkeypatch):
    """On a CPU with a stand-in for each implementation: all rows, all targets."""
    script = load("attention_gpu")
    monkeypatch.setattr(script, "TOKENS", 64)
    monkeypatch.setattr(script, "WIDTH", 32)
    monkeypatch.setattr(script, "device_ms", lambda program, given, repeats: [len(program(*given))])
    real = script.attention

    def stand_in(*args, implementation, **options):
        return real(*args, implementation="reference", **options)

    monkeypatch.setattr(script, "attention", stand_in)
    rows = script.dense_case(16, 16, True, 1) + script.compressed_case(16, 16, 1)
    assert [row["kind"] for row in rows] == ["dense", "dense", "bias"] + ["kept"] * 4
    missing = {name for row in rows for name, ms in row["ms"].items() if ms is None}
    # Those that ask the library itself.
    assert all("cudnn" in name for name in missing) and len(missing) == 4
    assert all("cudnn" in text.lower() for row in rows for text in row["failed"].values())
    whole = [row | {"tokens": 2048, "dim": 128, "causal": False} for row in rows]
    names = {line[0] for line in script.targets(rows) + script.targets(whole)}
    assert len(names) == 7
    assert all(line[3] in ("PASS", "MISS") for line in script.targets(whole))


def gpu_check(*words, **options):
    """benchmarks/gpu_check.sh as a finished process."""
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_the_check_of_gpus_refuses_a_machine_without():
    done = gpu_check(timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "no GPU is visible" in done.stderr
    assert gpu_check("--dry", timeout=60).returncode == 2


@pytest.mark.slow
def test_the_check_of_gpus_on_a_cpu(tmp_path):
    """Each step in its smallest form; all pass, and their numbers are in the one file."""
    out = tmp_path / "out.json"
    done = gpu_check("--dry-run", f"--out={out}", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())
    assert found["dry_run"] and found["machine"]["jax"]
    steps = found["steps"]
    assert list(steps) == ["dispatch", "attention", "experts", "decoding", "cuts", "contract"]
    assert all(step["status"] == "passed" and step["numbers"] for step in steps.values())
    assert steps["contract"]["numbers"]["passed"] == 1
    assert set(steps["cuts"]["numbers"]) == {"56_pixels", "112_pixels"}


@pytest.mark.slow
def test_survival_on_a_small_run(tmp_path, data_dir):
    """Killed, gone on with, and saved by both; what it prints are the numbers that it writes."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable,
            *("benchmarks/survival.py", "--config=configs/quickstart.py:smoke", "--steps=40"),
            *("--kill-at=25", f"--out={out}"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert 0 < found["resumed_at"] <= found["killed_at"] and found["killed_at"] >= 25
    assert found["lost_seconds"] > 0 and 0 < found["manifest_share"] < 1
    assert f"stall_share: {100 * found['stall_share']:.2f} %" in done.stdout


def test_methods_of_ones_own_are_known():
    """A wrong name is answered with the right one before anything is measured."""
    words = ("--quick", "--batch=1", "--import=docs/my_method.py", "--methods=contrst")
    done = subprocess.run(
        [sys.executable, "benchmarks/compressors.py", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode and "did you mean 'contrast'" in done.stderr
