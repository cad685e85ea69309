"""Attention on a Hopper GPU beside cuDNN and XLA on the same card.

    pip install -e '.[cuda]' && python benchmarks/attention_gpu.py

First numbers are compared with float32 attention. Then each form gets fresh inputs, [B, N, H, D] as
projections give them, and the times of all kernels that it launches are added up (CUPTI, through
JAX's profiler of kernels); medians over sets of inputs and repeats. 16,384 tokens and 2,048 = heads
x head dim in all cases. Prints a table of the targets and writes the times with the name of the
device to benchmarks/results/attention_gpu.json.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, compact

TOKENS, WIDTH, SETS = 16_384, 2_048, 3
LENGTHS, DIMS = (512, 1024, 2048, 4096, 8192, 16_384), (64, 128)
PARTS = (1, 2, 4, 9)
_XLA_LONGEST = {"forward": 16_384, "backward": 8_192}  # It keeps the whole map.


def draw(count, dim, seed=0):
    """`SETS` of q, k, v, d_out [SETS, B, N, H, D] in bfloat16."""
    shape = (SETS, TOKENS // count, count, WIDTH // dim, dim)
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def compiled(forms):
    """Programs of name -> (function, arguments), compiled side by side; what failed, and why."""
    programs, failed = {}, {}

    def compile(name, lowered):
        try:
            return lowered.compile()
        except Exception as error:  # A form that a card lacks must not end the others.
            failed[name] = str(error).splitlines()[0][:160]

    with ThreadPoolExecutor() as pool:
        for name, (form, given) in forms.items():
            try:
                lowered = jax.jit(lambda *x, form=form: form(*x)).lower(*given)
            except (RuntimeError, UserError) as error:
                failed[name] = str(error).splitlines()[0][:160]
                continue
            programs[name] = pool.submit(compile, name, lowered)
    programs = {name: program.result() for name, program in programs.items()}
    return {name: program for name, program in programs.items() if program}, failed


def measure(forms, inputs, repeats):
    """Median milliseconds on the device of each form of a case; what failed, and why."""
    ms, one = dict.fromkeys(forms), [x[0] for x in inputs]
    programs, failed = compiled({name: (form, one) for name, form in forms.items()})
    for name, program in programs.items():
        sets = ([x[which] for x in inputs] for which in range(SETS))
        times = [time for one in sets for time in device_ms(program, one, repeats)]
        ms[name] = statistics.median(times)
    return ms, failed


def device_ms(program, inputs, repeats):
    """Milliseconds of all kernels of a program, for each of the repeats."""
    from jax.experimental.mosaic.gpu import profiler

    # Detaching from CUPTI after each measurement takes longer than most of them.
    measured = profiler.Cupti(finalize=False).measure(program, iterations=repeats)
    return measured(*inputs)[1]


def call(q, k, v, **options):
    """`attention` of arrays [B, N, H, D]."""
    found = attention(*(x.swapaxes(1, 2) for x in (q, k, v)), **options)
    return found._replace(out=found.out.swapaxes(1, 2))


def ours(**options):
    """The result of the Hopper kernels."""
    return lambda q, k, v, *_: call(q, k, v, implementation="gpu", **options).out


def peer(implementation, **options):
    """That of another."""

    def run(q, k, v, *_):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)

    return run


def gradients(form):
    """dq, dk, dv of a form, the forward pass included."""
    return lambda q, k, v, d_out: jax.vjp(form, q, k, v)[1](d_out)


def bias_gradients(bias):
    """The same of ours with a bias, and its gradient."""

    def run(q, k, v, d_out):
        def form(q, k, v, bias):
            return call(q, k, v, key_bias=bias, implementation="gpu").out

        return jax.vjp(form, q, k, v, bias)[1](d_out)

    return run


def materialised(bias):
    """cuDNN with the bias of each key as a whole map, the only form that it takes."""

    def run(q, k, v, *_):
        whole = jnp.broadcast_to(bias[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
        return peer("cudnn", bias=whole.astype(q.dtype))(q, k, v)

    return run


def folded(bias):
    """cuDNN with the bias in two more columns of q and k, as our `cudnn` does it."""

    return lambda q, k, v, *_: call(q, k, v, key_bias=bias, implementation="cudnn").out


def gathered(keep, most):
    """The competitor: kept tokens gathered once, then dense cuDNN on them, queries as well."""

    def run(q, k, v, *_):
        return peer("cudnn")(*compact((q, k, v), keep, most).values)

    return run


def padded(lengths, most):
    """cuDNN on as many tokens as the longest row has, the rest masked by length."""

    def run(q, k, v, *_):
        cut = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        return peer("cudnn", **cut)(*(x[:, :most] for x in (q, k, v)))

    return run


def numerics(quick):
    """Largest error of outputs and gradients beside float32, of the largest value."""
    forms = {}
    for dim in DIMS[1:] if quick else DIMS:
        given = [x[0, :1, :, :4] for x in draw(512, dim, seed=1)]
        exact = [x.astype(jnp.float32) for x in given]
        for causal in (False, True):
            for name in ("reference", "gpu", "cudnn"):

                def form(q, k, v, name=name, causal=causal):
                    return call(q, k, v, causal=causal, implementation=name).out

                def both(q, k, v, d_out, form=form):
                    return form(q, k, v), *gradients(form)(q, k, v, d_out)

                forms[dim, causal, name] = both, exact if name == "reference" else given
    with jax.default_matmul_precision("highest"):
        programs, _ = compiled(forms)
    values = {key: program(*forms[key][1]) for key, program in programs.items()}
    found = {}
    for (dim, causal, name), ours in values.items():
        pairs = zip(ours, values[dim, causal, "reference"], strict=True)
        errors = [jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max() for a, b in pairs]
        found[f"{name}, D={dim}, {'causal' if causal else 'full'}"] = float(max(errors))
    return {name: error for name, error in found.items() if not name.startswith("reference")}


def dense_case(count, dim, causal, repeats):
    """Forward and backward without a bias: ours, cuDNN's and XLA's."""
    forms = {"gpu": ours(causal=causal)}
    forms |= {name: peer(name, is_causal=causal) for name in ("cudnn", "xla")}
    named = {"forward": forms, "backward": {name: gradients(f) for name, f in forms.items()}}
    flops = 4 * TOKENS * count * WIDTH * (0.5 if causal else 1.0)
    rows = []
    for direction, forms in named.items():
        if causal or count > _XLA_LONGEST[direction]:
            del forms["xla"]
        ms, failed = measure(forms, draw(count, dim), repeats)
        # "backward" is forward and backward together: 1 + 2.5 times the products of the forward.
        times = 1.0 if direction == "forward" else 3.5
        rate = {n: round(flops * times / t / 1e9) if t else None for n, t in ms.items()}
        row = dict(kind="dense", tokens=count, dim=dim, causal=causal, direction=direction)
        rows.append(row | dict(ms=ms, tflops=rate, failed=failed))
    return rows


def compressed_case(count, dim, repeats):
    """With a bias for each key, importance, rows that keep some of their tokens."""
    batch, rng = TOKENS // count, np.random.default_rng(0)
    bias = jnp.log(jnp.asarray(rng.integers(1, 9, (batch, count)), jnp.float32))
    weights = jnp.full((batch, count), 1 / count, jnp.float32)

    def weighed(q, k, v, *_):
        return call(q, k, v, importance_weights=weights, implementation="gpu")[::2]

    named = {
        "no bias": ours(),
        "bias": ours(key_bias=bias),
        "importance of all rows": weighed,
        "cudnn, bias materialised": materialised(bias),
        "cudnn, bias folded": folded(bias),
        "forward and backward": gradients(ours()),
        "forward and backward, with d(bias)": bias_gradients(bias),
    }
    groups = {("bias", None): named}
    for part in PARTS:
        kept = count // part
        keep = jnp.asarray(np.argsort(rng.random((batch, count)), axis=1) < kept)
        uniform = jnp.full((batch,), kept, jnp.int32)
        groups["kept", part] = {
            "in place": ours(q_lengths=uniform, kv_lengths=uniform),
            "gathered, cudnn": gathered(keep, kept),
        }
        if batch > 1:
            # Rows that keep between 0.4 and 1.6 times as many: four times apart.
            uneven = np.clip(np.linspace(0.4, 1.6, batch) * kept, 1, count).astype(np.int32)
            most = min(count, int(-(-uneven.max() // 8) * 8))
            lengths = jnp.asarray(uneven)
            groups["kept", part] |= {
                "uneven, in place": ours(q_lengths=lengths, kv_lengths=lengths),
                "uneven, padded cudnn": padded(lengths, most),
            }
    every = {(group, name): form for group in groups for name, form in groups[group].items()}
    ms, failed = measure(every, draw(count, dim), repeats)
    rows = []
    for group, forms in groups.items():
        row = dict(kind=group[0], part=group[1] and f"1/{group[1]}", tokens=count, dim=dim)
        row["ms"] = {name: ms[group, name] for name in forms}
        row["failed"] = {name: failed[group, name] for name in forms if (group, name) in failed}
        rows.append(row)
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

        wide = row["dim"] == 128 and row["tokens"] >= 2048
        if row["kind"] == "dense" and row["direction"] == "forward":
            name = "D=128, N >= 2k" if wide else "D=64, or short"
            note(f"forward: cudnn / ours, {name}", 0.8 if wide else 0.7, ratio("cudnn", "gpu"))
        elif row["kind"] == "dense" and wide and not row["causal"]:
            forward = next(
                r["ms"]["gpu"] for r in rows if r["kind"] == "dense" and r["direction"] == "forward"
                and all(r[x] == row[x] for x in ("tokens", "dim", "causal"))
            )  # fmt: skip
            if ms["gpu"] and forward:
                seconds = (ms["gpu"] - forward) / 1e3
                rate = 10 * TOKENS * row["tokens"] * WIDTH / seconds / 1e12
                note("backward, D=128, N >= 2k, TFLOP/s", 300.0, rate)
        elif row["kind"] == "bias":
            whole = ratio("cudnn, bias materialised", "bias")
            note("cudnn with its bias materialised / ours", 1.5, whole)
            whole = ratio("importance of all rows", "no bias")
            note("importance / forward", 0.6, whole and whole - 1, least=False)
            extra = ratio("forward and backward, with d(bias)", "forward and backward")
            note("extra for a bias and d(bias)", 0.05, extra and extra - 1, least=False)
        elif row["kind"] == "kept" and row["part"] == "1/2":
            whole = ratio("uneven, padded cudnn", "uneven, in place")
            note("padded cudnn / ours, uneven rows, half kept", 1.3, whole)
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
    parser.add_argument("--repeats", type=int, default=5, help="of each of three sets of inputs")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="in this order")
    parser.add_argument("--quick", action="store_true", help="two lengths, D = 128")
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        print(f"error: needs a Hopper GPU, and this is {device.device_kind}", file=sys.stderr)
        return 2
    result = dict(device=device.device_kind, jax=jax.__version__, rows=[])
    result["errors"] = numerics(args.quick)
    for name, error in result["errors"].items():
        print(f"{name}: largest error {error:.1e} of the largest value")
    lengths, dims = [int(x) for x in args.lengths.split(",")], DIMS
    if args.quick:
        lengths, dims = (1024, 4096), DIMS[1:]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for count in lengths:
        for dim in dims:
            found = compressed_case(count, dim, args.repeats)
            for causal in (False, True):
                found += dense_case(count, dim, causal, args.repeats)
            for row in found:
                print(json.dumps(row), flush=True)
            result["rows"] += found
            # What is measured stays if a later case ends the run.
            result["targets"] = targets(result["rows"])
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n| target | limit | worst | |\n|---|--:|--:|---|")
    for what, limit, worst, met in result["targets"]:
        print(f"| {what} | {limit} | {'none' if worst is None else f'{worst:.3f}'} | {met} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
