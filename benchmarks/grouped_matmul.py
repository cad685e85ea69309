"""Grouped matmul on this machine against equal dense work and `jax.lax.ragged_dot`.

    python benchmarks/grouped_matmul.py --out=benchmarks/results/grouped_matmul_cpu.json

"dense" is one batched product of [E, M/E, K] and [E, K, N]: the same FLOPs and the same weights
read, with perfectly balanced groups. All forms run in this process on the same inputs, in turn, and
in each turn are called before they are timed: weights of another form may fill the cache.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.kernels.grouped_matmul import grouped_matmul

WARM = 2
CASES = [(4096, 64, 256, 4), (8192, 64, 128, 4), (1024, 1024, 1024, 8), (1024, 1024, 1024, 64)]
QUICK = [(256, 32, 64, 4)]


def dense(lhs, rhs, sizes):
    """Equal FLOPs and weights, balanced groups."""
    del sizes
    groups, inner, outer = rhs.shape
    return jnp.einsum("emk,ekn->emn", lhs.reshape(groups, -1, inner), rhs).reshape(-1, outer)


def ragged(lhs, rhs, sizes):
    """JAX's own."""
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def backward(function):
    """Gradients of both operands, from a cotangent that is an argument: of a constant one, such as
    that of a sum, the compiler computes parts of ours once for each group."""

    def gradients(lhs, rhs, sizes, cotangent):
        return jax.vjp(lambda lhs, rhs: function(lhs, rhs, sizes), lhs, rhs)[1](cotangent)

    return gradients


def main() -> None:
    """Prints a table of medians and ratios, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small case")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: 1 or more")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out={args.out}: no directory {args.out.parent}")
    forms = {"ours": grouped_matmul, "dense": dense, "ragged_dot": ragged}
    rows = []
    for rows_count, inner, outer, groups in QUICK if args.quick else CASES:
        rng = np.random.default_rng(0)
        lhs = jnp.asarray(rng.normal(size=(rows_count, inner)), jnp.float32)
        rhs = jnp.asarray(rng.normal(size=(groups, inner, outer)), jnp.float32)
        # Routing of a trained mixture is uneven: shares drawn from a Dirichlet distribution.
        shares = rng.dirichlet([5.0] * groups)
        sizes = jnp.asarray(rng.multinomial(rows_count, shares), jnp.int32)
        way = jnp.asarray(rng.normal(size=(rows_count, outer)), jnp.float32)
        for direction in ("forward", "backward"):
            wrap, more = (backward, (way,)) if direction == "backward" else (lambda f: f, ())
            programs = {name: jax.jit(wrap(f)) for name, f in forms.items()}
            times = {name: [] for name in programs}
            for _ in range(args.repeats):
                for name, program in programs.items():
                    for _ in range(WARM):
                        jax.block_until_ready(program(lhs, rhs, sizes, *more))
                    start = time.perf_counter()
                    jax.block_until_ready(program(lhs, rhs, sizes, *more))
                    times[name].append(1e3 * (time.perf_counter() - start))
            ms = {name: round(statistics.median(t), 3) for name, t in times.items()}
            ratio = {f"{name}_to_dense": round(ms[name] / ms["dense"], 2) for name in ms}
            shape = f"{rows_count}x{inner}x{outer}, {groups} groups"
            rows.append({"case": shape, "direction": direction, "ms": ms, **ratio})
            versus = ratio["ours_to_dense"]
            print(f"{shape:<28}{direction:<10}{ms}  ours/dense {versus}", flush=True)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} cores"
    result = {"device": device, "jax": jax.__version__, "repeats": args.repeats, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
