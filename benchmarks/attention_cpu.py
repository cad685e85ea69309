"""Attention on a CPU beside `jax.nn.dot_product_attention` and torch, in one process.

    pip install -e '.[parity]' && python benchmarks/attention_cpu.py

All forms get the same inputs, the same threads and take turns; a call ends when its result is
there. In each turn calls are made before one is timed: the first find the threads of another
library still spinning, and their own asleep on one core. Prints medians of milliseconds and how
many times faster than each peer ours is. Torch is left out, and said to be, where it is not
installed.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.kernels.attention import attention, compact

WARM = 2

# name: (batch, heads, key heads, tokens, head dim), causal
CASES = {
    "ViT tiles": ((5, 12, 12, 1024, 64), False),
    "one image": ((1, 12, 12, 1024, 64), False),
    "prefill": ((1, 9, 3, 1024, 64), True),
    "long": ((1, 8, 2, 4096, 128), True),
}
QUICK = {"ViT tiles": ((1, 2, 2, 512, 64), False), "prefill": ((1, 2, 1, 512, 64), True)}


def peers(shape, causal):
    """Functions of q, k, v [B, H, N, D], by name."""
    groups = shape[1] // shape[2]

    def library(q, k, v):
        turned = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(*turned, is_causal=causal).swapaxes(1, 2)

    found = {
        "ours": jax.jit(lambda q, k, v: attention(q, k, v, causal=causal).out),
        "jax.nn": jax.jit(library),
    }
    try:
        import torch
    except ImportError:
        print("torch is not installed: pip install -e '.[parity]'")
        return found
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    fused = torch.nn.functional.scaled_dot_product_attention

    def theirs(q, k, v):
        with torch.no_grad():
            return fused(q, k, v, is_causal=causal, enable_gqa=groups > 1)

    found["torch"] = theirs
    return found


def backward(name, function, causal, groups):
    """The same with gradients of a weighted sum of the result."""
    if name != "torch":
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(function(q, k, v) * q), (0, 1, 2)))
    import torch

    def theirs(q, k, v):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=groups > 1
        )
        (out * q.detach()).sum().backward()
        return q.grad

    return theirs


def measure(functions, inputs, repeats) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            given = inputs["torch" if name == "torch" else "jax"]
            for _ in range(WARM):
                jax.block_until_ready(function(*given))
            start = time.perf_counter()
            jax.block_until_ready(function(*given))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


def compressed(shape, repeats):
    """What dropping keys saves: blocks left out in place, or kept tokens gathered once, the
    gathering included. "all" is attention to all keys, which takes no lengths."""
    rng = np.random.default_rng(1)
    q, k, v = draw(shape)
    batch, keys = shape[0], shape[3]
    rows = []
    for part in (1, 2, 4, 9):
        keep = jnp.asarray(np.argsort(rng.random((batch, keys))) < keys // part)
        lengths = jnp.full((batch,), keys // part)
        most = keys // part

        def gathered(q, k, v, lengths, keep, most=most):
            moved = compact((k.swapaxes(1, 2), v.swapaxes(1, 2)), keep, most)
            k, v = (x.swapaxes(1, 2) for x in moved.values)
            return attention(q, k, v, kv_lengths=moved.lengths).out

        functions = {
            "all": jax.jit(lambda q, k, v, n, keep: attention(q, k, v).out),
            "in place": jax.jit(lambda q, k, v, n, keep: attention(q, k, v, kv_lengths=n).out),
            "gathered": jax.jit(gathered),
        }
        ms = measure(functions, {"jax": (q, k, v, lengths, keep)}, repeats)
        faster = {name: round(ms["all"] / ms[name], 2) for name in ms if name != "all"}
        rows.append({"kept": f"1/{part}", "ms": ms, "times_faster_than_all": faster})
    return rows


def importance(shape, repeats):
    """One row and all rows, beside the attention that they follow."""
    q, k, v = draw(shape)
    batch, count = shape[0], shape[3]
    one, last = jnp.ones((batch, 1)), jnp.full((batch, 1), count - 1)
    every = jnp.full((batch, count), 1 / count)
    functions = {
        "attention": jax.jit(lambda q, k, v: attention(q, k, v)[:1]),
        "one row": jax.jit(
            lambda q, k, v: attention(q, k, v, importance_weights=one, importance_rows=last)[::2]
        ),
        "all rows": jax.jit(lambda q, k, v: attention(q, k, v, importance_weights=every)[::2]),
    }
    ms = measure(functions, {"jax": (q, k, v)}, repeats)
    extra = {name: round(ms[name] / ms["attention"] - 1, 3) for name in ("one row", "all rows")}
    return {"ms": ms, "extra_to_forward": extra}


def draw(shape):
    """q, k, v in float32."""
    batch, heads, kv_heads, count, dim = shape
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(batch, h, count, dim)), jnp.float32)
        for h in (heads, kv_heads, kv_heads)
    )


def main() -> None:
    """Prints tables of medians and ratios, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small shapes, one repeat")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: 1 or more")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out={args.out}: no directory {args.out.parent}")
    if args.quick:
        args.repeats = 1
    rows = []
    for case, (shape, causal) in (QUICK if args.quick else CASES).items():
        q, k, v = draw(shape)
        inputs = {"jax": (q, k, v)}
        forms = peers(shape, causal)
        if "torch" in forms:
            import torch

            inputs["torch"] = tuple(torch.from_numpy(np.array(x)) for x in (q, k, v))
        groups = shape[1] // shape[2]
        for direction in ("forward", "forward and backward"):
            functions = forms
            if direction != "forward":
                functions = {n: backward(n, f, causal, groups) for n, f in forms.items()}
            ms = measure(functions, inputs, args.repeats)
            faster = {n: round(ms[n] / ms["ours"], 2) for n in ms if n != "ours"}
            row = {"case": case, "shape": shape, "causal": causal, "direction": direction}
            rows.append({**row, "ms": ms, "times_faster_than": faster})
            print(f"{case:<12}{direction:<22}{ms}  times faster than {faster}", flush=True)
    shape = (QUICK if args.quick else CASES)["ViT tiles"][0]
    kept = compressed(shape, args.repeats)
    for row in kept:
        faster = row["times_faster_than_all"]
        print(f"keys kept: {row['kept']:<6}{row['ms']}  times faster than all {faster}", flush=True)
    shared = importance(shape, args.repeats)
    print(f"importance {shared['ms']}, beside attention {shared['extra_to_forward']}")
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} cores"
    result = {"device": device, "jax": jax.__version__, "repeats": args.repeats}
    result["rows"] = rows
    result |= {"kept_keys": kept, "importance": shared}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
