"""What compressors save in time, stage by stage, beside what our FLOP count predicts.

    python benchmarks/compressors.py

The visual geometry is that of LLaVA-1.5 (24 x 24 patches and a CLS token of width 1024, 16 heads,
MLP 4096), with the first 4 of the 23 encoder layers; the decoder has 8 layers of width 1024.
Weights are random. Everything runs in this process; see PROTOCOL for what is measured how.
"""

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from compressors_model import QUICK, Geometry, Method
from compressors_run import DECODE_STEPS, Run
from compressors_table import targets, write_table

from efficient_vlm import runtime
from efficient_vlm.compressors.imports import import_methods
from efficient_vlm.compressors.methods import METHODS, find

ROOT = Path(__file__).resolve().parent.parent
# At a batch above 1 one round of `none` takes seconds: one method of each kind, unless --methods.
LARGE_BATCH = (
    *("average_pool", "deco", "random", "fastervlm", "visionzip", "divprune", "cdpruner"),
    *("tome", "fastv", "pyramiddrop", "feather", "sparsevlm"),
)
PROTOCOL = """\
Stages are the programs of `inference.stages`, compiled ahead and called on the same inputs in one
process. Times exclude compilation and one warm-up call; compile seconds are reported separately. A
round goes through all methods, alternately forward and backward, with `none` before every third one
and at the end. A speed-up is the mean of the two nearest `none` over the method, so that drift of
the machine affects both; it is the median over the rounds, like the milliseconds. Calls shorter
than 20 ms are repeated inside a sample. Methods that share a program (prefill of 64 re-indexed
tokens, an encoder without requested signals) share its measurement. Each call ends in
`block_until_ready`. "decode" is one token for every row, mean of DECODE_STEPS steps.
"scoring" is what a method computes in addition to the model, called alone: the rows or means of
attention that it requests from the encoder, and its module (score, select, fold); inside the
decoder the one-cut modules at the shape of each cut, and, for PyramidDrop, keys and query of the
next layer. Predicted speed-ups are ratios of FLOPs of `costs.flops`: decoder and head for prefill,
with the cuts inside the decoder; all stages for the first token."""


def rows_of(run: Run) -> list[dict[str, Any]]:
    """One row a method, plain types."""
    found, none, rows = run.found, run.none, []
    base = {stage: found.timing[stage]["none"].ms for stage in found.timing}
    for method in run.methods:
        cost, name = method.cost, method.name
        timing = {stage: found.timing[stage][name] for stage in found.timing}
        # Times from the interleaved ratios, so that drift between phases cancels.
        relative = {stage: base[stage] / timing[stage].speedup for stage in timing}
        first = ("encode", "compress", "prefill")
        to_first = sum(base[s] for s in first) / sum(relative[s] for s in first)
        predicted = prefill_flops(none, none) / prefill_flops(method, none)
        measured = timing["prefill"].speedup
        signal, module = found.signal_ms.get(name, 0.0), found.module_ms.get(name)
        scoring = None if module is None else signal + module
        rows.append(
            dict(
                method=name,
                options=method.options,
                where=method.module.where,
                batch=run.batch_size,
                visual_tokens=dict(
                    entering=cost.visual_tokens, mean_processed=cost.mean_visual_tokens
                ),
                ms={stage: t.ms for stage, t in timing.items()},
                speedup={stage: t.speedup for stage, t in timing.items()},
                spread={stage: t.spread for stage, t in timing.items()},
                speedup_prefill_measured=measured,
                speedup_prefill_predicted=predicted,
                efficiency=measured / predicted,
                speedup_first_token_measured=to_first,
                speedup_first_token_predicted=none.cost.total / cost.total,
                slower_than_none=name != "none" and to_first < 1,
                slower_stages=[s for s, t in timing.items() if t.speedup < 0.97],
                signal_ms=signal,
                module_ms=module,
                scoring_share_of_prefill=None if scoring is None else scoring / base["prefill"],
                kv_bytes=found.kv_bytes[name],
                kv_bytes_predicted=cost.kv_bytes * run.batch_size,
                prefill_temporary_bytes=found.temporaries[name],
                flops=dict(cost.flops),
                compile_s={stage: found.compile_s[stage][name] for stage in found.timing},
            )
        )
        if name == "visionzip":
            share = (signal + run.select_one_row()) / base["prefill"]
            rows[-1]["score_alone_share_of_prefill"] = share
    return rows


def prefill_flops(method: Method, none: Method) -> int:
    """FLOPs of the prefill program: decoder, head, and the cuts that happen inside it."""
    flops = method.cost.flops
    total = flops["decoder"] + flops["head"]
    if method.module.in_decoder:
        total += flops["compressor"] - none.cost.flops["compressor"]  # Both project all patches.
    return total


def environment() -> dict[str, Any]:
    """Versions, processor and load."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        **runtime.environment(),
        "processor": names[0] if names else "unknown",
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Measures, prints the table and the targets, writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,8", help="batch sizes (1,8)")
    parser.add_argument("--methods", help="names, default: all (batch 1), one of each kind (8)")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="file that registers methods of your own",
    )
    parser.add_argument("--rounds", type=int, help="default 5 at batch 1, 3 above")
    parser.add_argument("--encoder-layers", type=int, help="of CLIP-L's 23 (4)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test, not a benchmark")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="Markdown file")
    args = parser.parse_args()
    import_methods(args.imports)
    geometry = QUICK if args.quick else Geometry()
    if args.encoder_layers:
        geometry = dataclasses.replace(geometry, encoder_layers=args.encoder_layers)
    out, table = args.out, args.table
    whole = not (args.quick or args.methods or args.imports)
    if whole:  # Parts of a run do not overwrite it.
        out = out or ROOT / "benchmarks/results/compressors_cpu.json"
        table = table or ROOT / "docs/benchmark_compressors.md"
    facts, start, rows, known, rounds = environment(), time.perf_counter(), [], None, {}
    for batch in (int(part) for part in args.batch.split(",")):
        names = args.methods.split(",") if args.methods else METHODS if batch == 1 else LARGE_BATCH
        for name in names:
            find(name)
        rounds[batch] = args.rounds or (5 if batch == 1 else 3)
        run = Run(geometry, names, batch, rounds[batch], known)
        run.measure()
        known = run.known
        rows += rows_of(run)
        del run
        gc.collect()
    facts["load_average_at_end"] = round(os.getloadavg()[0], 2)
    result = dict(
        command=" ".join(["python", "benchmarks/compressors.py", *sys.argv[1:]]),
        environment=facts,
        geometry=dataclasses.asdict(geometry),
        protocol=PROTOCOL.replace("DECODE_STEPS", str(DECODE_STEPS)),
        rounds=rounds,
        seconds=round(time.perf_counter() - start, 1),
        targets=targets(rows),
        rows=rows,
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    text = write_table(result)
    if table:
        table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
