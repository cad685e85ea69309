"""Attention on a Hopper GPU beside cuDNN and XLA on the same card.

    pip install -e '.[cuda]' && python benchmarks/attention_gpu.py

First numbers are compared with float32 attention. Then every form gets fresh inputs: one program
goes through several sets of them, so that dispatch is paid once; medians over repeats, forms in
turns. 16,384 tokens and 2,048 = heads x head dim in all cases. Prints tables and targets, and
writes benchmarks/results/attention_gpu.json with the name of the device.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.kernels.attention import attention, compact

TOKENS, WIDTH, SETS = 16_384, 2_048, 4
LENGTHS, DIMS = (512, 1024, 2048, 4096, 8192, 16_384), (64, 128)
PARTS = (1, 2, 4, 9)


def draw(count, dim, seed=0, tokens=TOKENS, width=WIDTH):
    """`SETS` of q, k, v, d_out [SETS, B, H, N, D] in bfloat16."""
    shape = (SETS, tokens // count, width // dim, count, dim)
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def measure(forms, inputs, repeats):
    """Median milliseconds of one call of each form; None and a reason where it cannot run."""
    programs, times, failed = {}, {name: [] for name in forms}, {}
    for name, function in forms.items():
        program = jax.jit(functools.partial(jax.lax.map, lambda x, f=function: f(*x)))
        try:
            jax.block_until_ready(program(inputs))
            programs[name] = program
        except Exception as error:  # A form that a card lacks must not end the others.
            failed[name] = str(error).splitlines()[0][:160]
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(inputs))
            times[name].append(1e3 * (time.perf_counter() - start) / SETS)
    ms = {name: statistics.median(t) if t else None for name, t in times.items()}
    return ms, failed


def form(implementation, **options):
    """The result of one implementation."""
    return lambda q, k, v, *_: attention(q, k, v, implementation=implementation, **options).out


def gradients(implementation, bias=None, **options):
    """dq, dk, dv, and that of the bias where there is one."""

    def function(q, k, v, d_out):
        def run(q, k, v, bias):
            given = dict(options, key_bias=bias, implementation=implementation)
            return attention(q, k, v, **given).out

        return jax.vjp(run, q, k, v, bias)[1](d_out)

    return function


def materialised(q, k, v, bias):
    """cuDNN with the bias of each key as a whole map, the only form that it takes."""
    turned = (x.swapaxes(1, 2) for x in (q, k, v))
    whole = jnp.broadcast_to(bias[:, None, None], (len(q), 1, q.shape[2], k.shape[2]))
    return jax.nn.dot_product_attention(
        *turned, bias=whole.astype(q.dtype), implementation="cudnn"
    ).swapaxes(1, 2)


def gathered(q, k, v, keep, most):
    """The competitor: kept tokens gathered once, then dense cuDNN on them, queries as well."""
    moved = compact(tuple(x.swapaxes(1, 2) for x in (q, k, v)), keep, most).values
    q, k, v = (x.swapaxes(1, 2) for x in moved)
    return attention(q, k, v, implementation="cudnn").out


def numerics(names, quick):
    """Largest error beside float32, for each form, out of 1."""
    found = {}
    for dim in DIMS[: 1 if quick else 2]:
        q, k, v, d_out = (x[0, :1, :4] for x in draw(512, dim, seed=1))
        for causal in (False, True):
            exact = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
            right = jax.jit(gradients("reference", causal=causal))(*exact)[:3]
            right = (form("reference", causal=causal)(*exact), *right)
            for name in names:
                ours = jax.jit(gradients(name, causal=causal))(q, k, v, d_out)[:3]
                ours = (form(name, causal=causal)(q, k, v), *ours)
                errors = [
                    float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                    for a, b in zip(ours, right, strict=True)
                ]
                found[f"{name}, D={dim}, {'causal' if causal else 'full'}"] = max(errors)
    return found


def dense_case(count, dim, causal, repeats):
    """Forward and backward without a bias: ours, cuDNN's and XLA's."""
    q, k, v, d_out = draw(count, dim)
    names = ("gpu", "cudnn", "xla")
    flops = 4 * TOKENS * count * WIDTH * (0.5 if causal else 1.0)
    rows = []
    for direction, make, times in (("forward", form, 1.0), ("backward", gradients, 3.5)):
        forms = {name: make(name, causal=causal) for name in names}
        ms, failed = measure(forms, (q, k, v, d_out), repeats)
        rate = {n: flops * times / t / 1e9 if t else None for n, t in ms.items()}
        row = dict(kind="dense", tokens=count, dim=dim, causal=causal, direction=direction)
        # "backward" is forward and backward together: 1 + 2.5 times the products of the forward.
        rows.append(row | dict(ms=ms, tflops=rate, failed=failed))
    return rows


def compressed_case(count, dim, repeats):
    """With a bias for each key, ragged rows, importance."""
    q, k, v, d_out = draw(count, dim)
    batch = q.shape[1]
    rng = np.random.default_rng(0)
    bias = jnp.log(jnp.asarray(rng.integers(1, 9, (batch, count)), jnp.float32))
    facts, inputs = dict(tokens=count, dim=dim), (q, k, v, d_out)
    weights = jnp.full((batch, count), 1 / count, jnp.float32)

    def weighed(q, k, v, *_):
        return attention(q, k, v, importance_weights=weights, implementation="gpu")[::2]

    forms = {
        "no bias": form("gpu"),
        "bias": form("gpu", key_bias=bias),
        "importance of all rows": weighed,
        "cudnn, bias materialised": lambda q, k, v, *_: materialised(q, k, v, bias),
        "cudnn, bias folded": form("cudnn", key_bias=bias),
        "forward and backward": gradients("gpu"),
        "forward and backward, with d(bias)": gradients("gpu", bias),
    }
    ms, failed = measure(forms, inputs, repeats)
    rows = [dict(kind="bias", **facts, ms=ms, failed=failed)]
    for part in PARTS:
        kept = count // part
        keep = jnp.asarray(np.argsort(rng.random((batch, count)), axis=1) < kept)
        uniform = jnp.full((batch,), kept, jnp.int32)
        # Rows that keep between 0.4 and 1.6 times as many: four times apart.
        uneven = np.clip(np.linspace(0.4, 1.6, batch) * kept, 1, count).astype(np.int32)
        most = min(count, int(-(-uneven.max() // 8) * 8))
        lengths = jnp.asarray(uneven)
        cut = dict(q_lengths=lengths, kv_lengths=lengths)

        def padded(q, k, v, *_, most=most, cut=cut):
            q, k, v = (x[:, :, :most] for x in (q, k, v))
            return attention(q, k, v, implementation="cudnn", **cut).out

        forms = {
            "in place": form("gpu", q_lengths=uniform, kv_lengths=uniform),
            "gathered, cudnn": lambda q, k, v, *_, a=keep, b=kept: gathered(q, k, v, a, b),
            "uneven, in place": form("gpu", **cut),
            "uneven, padded cudnn": padded,
        }
        ms, failed = measure(forms, inputs, repeats)
        rows.append(dict(kind="kept", part=f"1/{part}", **facts, ms=ms, failed=failed))
    return rows


def targets(rows):
    """(what, limit, worst, PASS or MISS) of the targets, over the rows that have both sides."""
    found = {}

    def note(what, limit, value, least=True):
        found.setdefault((what, limit, least), []).append(value)

    for row in rows:
        ms = row["ms"]

        def ratio(one, two, ms=ms):
            return ms[one] / ms[two] if ms.get(one) and ms.get(two) else None

        if row["kind"] == "dense" and row["direction"] == "forward":
            wide = row["dim"] == 128 and row["tokens"] >= 2048
            name = "D=128, N >= 2k" if wide else "D=64, or short"
            note(f"forward / cudnn, {name}", 0.8 if wide else 0.7, ratio("cudnn", "gpu"))
        elif row["kind"] == "dense" and row["dim"] == 128 and row["tokens"] >= 2048:
            forward = next(
                r for r in rows if r["kind"] == "dense" and r["direction"] == "forward"
                and all(r[x] == row[x] for x in ("tokens", "dim", "causal"))
            )  # fmt: skip
            if ms["gpu"] and forward["ms"]["gpu"] and not row["causal"]:
                seconds = (ms["gpu"] - forward["ms"]["gpu"]) / 1e3
                rate = 10 * TOKENS * row["tokens"] * WIDTH / seconds / 1e12
                note("backward, D=128, N >= 2k, TFLOP/s", 300.0, rate)
        elif row["kind"] == "bias":
            note(
                "cudnn with its bias materialised / ours",
                1.5,
                ratio("cudnn, bias materialised", "bias"),
            )
            whole = ratio("importance of all rows", "no bias")
            note("importance / forward", 0.6, whole and whole - 1, least=False)
            extra = ratio("forward and backward, with d(bias)", "forward and backward")
            note("extra for d(bias)", 0.05, extra and extra - 1, least=False)
        elif row["kind"] == "kept" and row["part"] == "1/2":
            note(
                "padded cudnn / ours, uneven rows, half kept",
                1.3,
                ratio("uneven, padded cudnn", "uneven, in place"),
            )
    lines = []
    for (what, limit, least), values in found.items():
        values = [v for v in values if v is not None]
        worst = (min(values) if least else max(values)) if values else None
        met = worst is not None and (worst >= limit if least else worst <= limit)
        lines.append((what, limit, worst, "PASS" if met else "MISS"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_gpu.json"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two lengths, D = 128")
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        print(f"error: needs a Hopper GPU, and this is {device.device_kind}", file=sys.stderr)
        return 2
    errors = numerics(("gpu", "cudnn", "xla"), args.quick)
    for name, error in errors.items():
        print(f"{name}: largest error {error:.1e} of the largest value")
    lengths, dims = ((1024, 4096), (128,)) if args.quick else (LENGTHS, DIMS)
    rows = []
    for count in lengths:
        for dim in dims:
            for causal in (False, True):
                rows += dense_case(count, dim, causal, args.repeats)
            rows += compressed_case(count, dim, args.repeats)
            for row in rows[-9:]:
                print(json.dumps(row), flush=True)
    lines = targets(rows)
    print("\n| target | limit | worst | |\n|---|--:|--:|---|")
    for what, limit, worst, met in lines:
        print(f"| {what} | {limit} | {'none' if worst is None else f'{worst:.3f}'} | {met} |")
    result = dict(device=device.device_kind, jax=jax.__version__, errors=errors, rows=rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result | {"targets": lines}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
