"""Generation with a SmolVLM-256M of random weights, beside transformers in the same process.

    pip install -e '.[test,parity]' && python benchmarks/generate_vs_transformers.py

Five tiles of 512 x 512 pixels (320 visual tokens), 64 text tokens, batch 1. Both sides have the
same weights, the same number of threads, and take turns. Prints medians, their ratios, and how far
decoding is from the time that reading the weights once takes; then what two compressors save beside
what the ledger predicts, and the time from the start of a process to its first token.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np

import efficient_vlm as evlm
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.errors import UserError
from efficient_vlm.families import published
from efficient_vlm.inference.generate import generate
from efficient_vlm.nn.linear import product
from efficient_vlm.processing.pictures.base import Pictured
from efficient_vlm.runtime import enable_compilation_cache

TILES, TEXT, THREADS = 5, 64, 2
METHODS = (dict(name="divprune", budget=16), dict(name="fastv", layer=1, keep=0.25))


def reference(folder: Path, quick: bool):
    """A model of transformers with random weights, saved for ours to read."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = dict(published.get("smolvlm-256m")["config"], model_type="smolvlm")
    if quick:
        for part in ("text_config", "vision_config"):
            config[part] = {**config[part], "num_hidden_layers": 2}
    config["vision_config"] = {**config["vision_config"], "model_type": "smolvlm_vision"}
    del config["architectures"]
    built = transformers.SmolVLMConfig(**config)
    model = transformers.SmolVLMForConditionalGeneration._from_config(
        built, attn_implementation="sdpa", dtype=torch.float32
    )
    model.eval().save_pretrained(folder)
    return model


def question(image_token: int, tiles: int = TILES) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [tiles, 512, 512, 3] in [0, 1] and the ids of a prompt."""
    rng = np.random.default_rng(0)
    ids = [1, *[image_token] * (64 * tiles), *rng.integers(3, 40_000, TEXT - 1)]
    return rng.random((tiles, 512, 512, 3), np.float32), np.array(ids)


def time_reference(model, pixels, ids, new: int) -> dict[str, float]:
    """Seconds of prefill (encoder included) and of a decode step."""
    import torch

    given = torch.from_numpy((pixels.transpose(0, 3, 1, 2) - 0.5) / 0.5)[None].to(model.dtype)
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        start = time.perf_counter()
        out = model(input_ids=tokens, pixel_values=given, use_cache=True, logits_to_keep=1)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        prefill, steps = time.perf_counter() - start, []
        for _ in range(new):
            start = time.perf_counter()
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": statistics.median(steps)}


def time_ours(vlm, pixels, ids, new: int) -> dict[str, float]:
    """Seconds of each stage; "prefill" is all up to the first token, as above."""
    out = answer(vlm, pixels, ids, new + 1)
    stages = {stage: out.seconds[stage] for stage in ("encode", "compress", "prefill")}
    decode = statistics.median(out.seconds["decode"])
    found = {"prefill": sum(stages.values()), "decode": decode}
    return found | {f"stage_{name}": value for name, value in stages.items()}


def answer(vlm, pixels, ids, new_tokens: int):
    """`Generated` of the prompt; the tiles are there already, nothing is resized."""
    full = np.full((len(pixels), 2), 32)
    picture = Pictured(pixels, full, "", full // 4, np.zeros((len(pixels), 4), np.float32))
    request = vlm.place([ids], [[picture]])
    return generate(request.model, vlm.fused, request.inputs, new_tokens=new_tokens, eos_id=-1)


def readers(vlm):
    """Two functions that give seconds to read the weights of one decode step once: by its products,
    one behind the other with nothing between them, and by a sum over every weight."""
    language = {k: v for k, v in vlm.fused["language"].items() if k != "embedding"}
    leaves = [leaf for leaf in jax.tree.leaves(language) if leaf.ndim > 1]

    def products(leaves):
        row = [jnp.ones((1, p.shape[0]), p.dtype) for p in leaves]
        return [product(x, p.reshape(p.shape[0], -1), p.dtype) for x, p in zip(row, leaves)]

    def sums(leaves):
        return [jnp.sum(p, dtype=jnp.float32) for p in leaves]

    def timed(function):
        jax.block_until_ready(function(leaves))

        def read(steps: int) -> float:
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                jax.block_until_ready(function(leaves))
                times.append(time.perf_counter() - start)
            return statistics.median(times)

        return read

    return timed(jax.jit(products)), timed(jax.jit(sums))


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def compare(folder, theirs, pixels, ids, dtype, repeats, new) -> dict:
    """Both sides in turns, in one dtype."""
    import torch

    theirs = theirs.to(getattr(torch, dtype))
    vlm = evlm.from_pretrained(folder, dtype=dtype)
    time_ours(vlm, pixels, ids, new)
    ours, reference_, bounds, read = [], [], [], readers(vlm)
    for _ in range(repeats):
        reference_.append(time_reference(theirs, pixels, ids, new))
        ours.append(time_ours(vlm, pixels, ids, new))
        bounds.append({"products": read[0](new), "sums": read[1](new)})
    a, b, bound = medians(reference_), medians(ours), medians(bounds)
    return {
        "transformers": a,
        "ours": b,
        "prefill_ratio": a["prefill"] / b["prefill"],
        "decode_ratio": a["decode"] / b["decode"],
        "read_bound_s": bound,
        "share_of_read_bound": {name: seconds / b["decode"] for name, seconds in bound.items()},
    }


def savings(folder, pixels, ids, repeats, new) -> dict:
    """What compressors save up to the first token, measured and by FLOPs."""
    plain = evlm.from_pretrained(folder)
    sizes = dict(text_tokens=TEXT, new_tokens=new, images=TILES)
    before, result = model_cost(plain.model, **sizes), {}
    variants = {m["name"]: plain.with_compressor(**m) for m in METHODS}
    for vlm in (plain, *variants.values()):
        time_ours(vlm, pixels, ids, new)
    times = {name: [] for name in ("none", *variants)}
    for _ in range(repeats):
        for name, vlm in {"none": plain, **variants}.items():
            times[name].append(time_ours(vlm, pixels, ids, new))
    base = medians(times["none"])
    for name, vlm in variants.items():
        cost, found = model_cost(vlm.model, **sizes), medians(times[name])
        predicted = 1 - cost.total / before.total
        measured = 1 - found["prefill"] / base["prefill"]
        decoder = found["stage_prefill"] / base["stage_prefill"]
        result[name] = {
            "options": dict(vlm.model.compressor),
            "seconds": found,
            "predicted_saving": predicted,
            "measured_saving": measured,
            "decoder_prefill_time": decoder,
            "decoder_prefill_flops": _decoder(cost) / _decoder(before),
            "kv_bytes": cost.kv_bytes / before.kv_bytes,
        }
    return {"none": {"seconds": base}, **result}


def _decoder(cost) -> int:
    """FLOPs of the decoder and its head, which the stage "prefill" is."""
    return cost.flops["decoder"] + cost.flops["head"]


def first_token(folder: Path, cache: Path, tiles: int, repeats: int) -> dict[str, float]:
    """Seconds from the start of a process to the first token: without programs, and with them."""

    def once() -> float:
        done = subprocess.run(
            [sys.executable, __file__, f"--first-token={folder}", f"--tiles={tiles}"],
            env={**os.environ, "EFFICIENT_VLM_COMPILATION_CACHE": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout.split()[-1])

    return {"cold": once(), "warm": statistics.median(once() for _ in range(repeats))}


def answer_once(folder: str, tiles: int) -> None:
    """What `first_token` runs: prints the age of this process when the first token is there."""
    enable_compilation_cache()
    vlm = evlm.from_pretrained(folder, check=False)
    answer(vlm, *question(vlm.config["image_token_id"], tiles), new_tokens=1)
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        print(float(uptime.read().split()[0]) - started)


def machine() -> dict[str, str | int]:
    """What the numbers hold for."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "avx512_bf16": "avx512_bf16" in flags,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=16, help="decode steps")
    parser.add_argument("--quick", action="store_true", help="two layers, one repeat")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", default="benchmarks/results/generate_vs_transformers_cpu.json")
    parser.add_argument("--first-token", help=argparse.SUPPRESS)
    parser.add_argument("--tiles", type=int, default=TILES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_token:
        answer_once(args.first_token, args.tiles)
        return 0
    repeats, new = (1, 2) if args.quick else (args.repeats, args.new)
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("transformers is not installed", fix="pip install -e '.[parity]'") from None
    result = {"machine": machine(), "tiles": TILES, "text": TEXT, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        theirs = reference(folder, args.quick)
        pixels, ids = question(theirs.config.image_token_id)
        result["first_token_s"] = {}
        for tiles in (TILES, 1):
            found = first_token(folder, Path(scratch) / f"cache_{tiles}", tiles, min(3, repeats))
            result["first_token_s"][f"tiles_{tiles}"] = found
            print(
                f"first token of {tiles} tiles {found['cold']:.1f} s after the start of a process, "
                f"{found['warm']:.1f} s with a full compilation cache",
                flush=True,
            )
        for dtype in args.dtypes.split(","):
            found = compare(folder, theirs, pixels, ids, dtype, repeats, new)
            result[dtype] = found
            a, b = found["transformers"], found["ours"]
            print(
                f"{dtype}: prefill {a['prefill']:.2f} s theirs, {b['prefill']:.2f} s ours, "
                f"ratio {found['prefill_ratio']:.2f}; decode {1 / a['decode']:.1f} and "
                f"{1 / b['decode']:.1f} tokens/s, ratio {found['decode_ratio']:.2f}; "
                f"{found['share_of_read_bound']['products']:.0%} of the read bound "
                f"({found['share_of_read_bound']['sums']:.0%} if read by sums)",
                flush=True,
            )
        result["compression"] = savings(folder, pixels, ids, repeats, new)
        for name, found in result["compression"].items():
            if name != "none":
                print(
                    f"{name}: saves {found['measured_saving']:.1%} up to the first token, FLOPs "
                    f"predict {found['predicted_saving']:.1%}; decoder prefill "
                    f"{found['decoder_prefill_time']:.2f} of its time, "
                    f"{found['decoder_prefill_flops']:.2f} of its FLOPs"
                )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
