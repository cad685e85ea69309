"""Parts of gpu_check.sh: decoding, cuts inside an encoder, and the file of all results.

    python benchmarks/gpu_check_parts.py decoding --out=decoding.json

Random weights, no network, neither torch nor transformers.
"""

import argparse
import functools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOG_LINES = 15  # Of each step that are kept.
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


def seconds_of(calls: dict, turns: int) -> dict[str, float]:
    """Median seconds of each function, in turns; one call before is not counted."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def decoding(dry: bool) -> dict:
    """Seconds of a further token with the geometry of SmolVLM-256M in bfloat16, 64 prompts at once
    and one alone: products of one input joined (`nn.fuse`), and each by itself."""
    import jax
    import numpy as np
    from random_smolvlm import VOCABULARY, write_checkpoint

    import efficient_vlm as evlm
    from efficient_vlm.inference.generate import generate
    from efficient_vlm.models.inputs import ModelInputs
    from efficient_vlm.nn.fuse import fuse

    rows, new, turns = ((1, 2), 3, 1) if dry else ((1, 64), 33, 5)
    found, rng = {}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", *((1, 2) if dry else (12, 30)))
        vlm = evlm.from_pretrained(Path(folder) / "model", dtype="bfloat16", check=False)
        apart = vlm.params
    forms = {"joined": jax.device_put(fuse(apart)), "apart": jax.device_put(apart)}
    for count in rows:
        ids = rng.integers(3, VOCABULARY - 100, (count, 64), dtype=np.int32)
        inputs = ModelInputs.of_rows(ids, [64] * count)
        steps = {name: [] for name in forms}
        for turn in range(turns + 1):  # The first compiles.
            for name, params in forms.items():
                out = generate(vlm.model, params, inputs, new_tokens=new, eos_id=-1)
                steps[name] += out.seconds["decode"] if turn else []
        seconds = {name: statistics.median(samples) for name, samples in steps.items()}
        ratio = seconds["apart"] / seconds["joined"]
        found[f"rows_{count}"] = {"seconds_a_token": seconds, "apart_to_joined": ratio}
        print(f"{count} rows: {seconds}, apart / joined {ratio:.2f}", flush=True)
    return found


def cuts(dry: bool) -> dict:
    """Seconds of an encoder of 24 layers of width 1024 in bfloat16 with its 2 x 2 merger, pictures
    of two sizes: all patches, and a quarter of them behind layer 2 (`encoder_cut`)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import linen as nn

    from efficient_vlm.costs.flops import model_cost
    from efficient_vlm.inference.stages import encode_stage, programs_of
    from efficient_vlm.models.init import init_params
    from efficient_vlm.models.inputs import Pictures
    from efficient_vlm.models.vlm import VisionLanguageModel
    from efficient_vlm.nn.stack import unstack

    layers, width, batch, turns = (3, 64, 1, 1) if dry else (24, 1024, 8, 10)
    found = {}
    for side in (56, 112) if dry else (448, 896):
        model = VisionLanguageModel(
            vocab_size=32,
            encoder=dict(
                image_size=side,
                patch_size=14,
                width=width,
                depth=layers,
                num_heads=width // 64,
                mlp_dim=4 * width,
            ),
            projector=dict(name="patch_merger", side=2),
            compressor=dict(name="none"),
            connector=dict(identity=True),
            decoder=dict(width=64, num_heads=1, segments=[dict(layers=1)], mlp_dim=64),
            dtype="bfloat16",
        )
        params = jax.jit(lambda key, model=model: init_params(model, key))(jax.random.key(0))
        params = unstack(jax.tree.map(lambda x: x.astype(jnp.bfloat16), nn.unbox(params)))
        params = {name: value for name, value in params.items() if name != "language"}
        pixels = np.random.default_rng(0).random((batch, 1, side, side, 3), np.float32)
        pictures = jax.device_put(Pictures(pixels, np.ones((batch, 1), bool)))
        models = {"all": model}
        models["quarter"] = model.with_compressor("encoder_cut", keep=(0.25,), layers=(2,))
        calls, flops = {}, {}
        for name, each in models.items():
            static = programs_of(each, each.layout(pictures)).encode

            def call(static=static, params=params, pictures=pictures) -> None:
                jax.block_until_ready(encode_stage(*static, params, pictures))

            calls[name] = call
            cost = model_cost(each, text_tokens=1).flops
            flops[name] = cost["encoder"] + cost["compressor"]
        seconds = seconds_of(calls, turns)
        measured, predicted = (x["all"] / x["quarter"] for x in (seconds, flops))
        found[f"{side}_pixels"] = {
            "patches": (side // 14) ** 2,
            "pictures": batch,
            "seconds": seconds,
            "times_faster": measured,
            "predicted_by_flops": predicted,
        }
        print(f"{side} pixels: {seconds}, {measured:.2f} times, FLOPs {predicted:.2f}", flush=True)
    return found


def attention(dry: bool) -> dict:
    """`attention_gpu.py` on a CPU: small sizes, the reference in place of our kernels, a plain
    clock. On a GPU that script runs itself."""
    import attention_gpu as script
    import jax

    real, script.TOKENS, script.WIDTH = script.attention, 512, 256

    def stand_in(*args, implementation, **options):
        implementation = "reference" if implementation == "gpu" else implementation
        return real(*args, implementation=implementation, **options)

    def clock(program, inputs, repeats):
        call = functools.partial(program, *inputs)
        return [1e3 * seconds_of({"": lambda: jax.block_until_ready(call())}, 1)[""]]

    script.attention, script.device_ms = stand_in, clock
    errors, rows = script.numerics(True), script.compressed_case(128, 64, 1)
    rows += script.dense_case(128, 64, False, 1)
    return {"device": jax.devices()[0].device_kind, "errors": errors, "rows": rows}


def gather(scratch: Path, dry: bool) -> dict:
    """All steps: how each ended, its seconds, its numbers and the end of what it printed."""
    import jax

    steps = {}
    for line in (scratch / "steps").read_text().splitlines():
        name, status, seconds = line.split()
        log, numbers = scratch / f"{name}.log", scratch / f"{name}.json"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        steps[name] = {"status": status, "seconds": int(seconds)}
        if numbers.is_file():
            steps[name]["numbers"] = json.loads(numbers.read_text())
        elif counts := SUMMARY.findall(lines[-1]) if lines else []:
            steps[name]["numbers"] = {what: int(count) for count, what in counts}
        if status != "passed":
            steps[name]["log"] = lines[-LOG_LINES:]
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }
    return {"dry_run": dry, "machine": machine, "steps": steps}


def _said(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


PARTS = {"decoding": decoding, "cuts": cuts, "attention": attention}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, "gather"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="of gpu_check.sh")
    parser.add_argument("--dry-run", action="store_true", help="smallest forms, for a CPU")
    args = parser.parse_args()
    if args.part == "gather":
        found = gather(args.scratch, args.dry_run)
    else:
        found = PARTS[args.part](args.dry_run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.part != "gather":
        return 0
    for name, step in found["steps"].items():
        print(f"{name:<10}{step['status']:<9}{step['seconds']:>4} s")
    print(f"Results: {args.out}")
    return int(any(step["status"] != "passed" for step in found["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
