"""Fine-tuning of a SmolVLM-256M of random weights, beside transformers and peft on torch.

    pip install -e '.[test,parity]' && python benchmarks/train_vs_transformers.py

One tile of 512 x 512 pixels (64 visual tokens) and 64 text tokens a row, batches of 4, float32,
AdamW, gradients clipped at norm 1. Each side is a process of its own and they take turns; what was
compiled comes from a turn before that is not counted. Prints rows per second, the peak of memory,
and ratios (ours / theirs); then LoRA at a quarter of the visual tokens beside what the ledger
predicts of it, and LoRA on a mixed sample (a fifth text alone, answers of 10 to 600 words), whose
rows are packed or each padded to the longest.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

ROWS, TEXT, TOKENS, THREADS, RANK = 4, 64, 64, 2, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Job -> who does it.
JOBS = {
    "full": ("transformers", "ours"),
    "lora": ("peft", "ours"),
    "quarter": ("ours",),
    "mixed": ("padded", "ours"),
}
# Without one a question is no part of a prompt, as in LLaVA's first stage.
TEMPLATE = (
    "{% for message in messages %}{{ 'w5 ' if message['role'] == 'user' else 'w7 ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} w6 "
    "{% endfor %}{% if add_generation_prompt %}w7 {% endif %}"
)
MIXED = 48  # Rows of the mixed sample, about 2,000 token places a batch either way.


def batch(image_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [ROWS, 512, 512, 3] in [0, 1], and ids [ROWS, TOKENS + TEXT]; all text behind the
    picture but its first token is to be predicted."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40_000, (ROWS, TOKENS + TEXT))
    ids[:, 1 : 1 + TOKENS] = image_token
    return rng.random((ROWS, 512, 512, 3), np.float32), ids


def targets_of(ids: np.ndarray, image_token: int) -> np.ndarray:
    """bool, which ids are to be predicted."""
    targets = ids != image_token
    targets[:, : 2 + TOKENS] = False
    return targets


def time_reference(folder: Path, steps: int, lora: bool) -> list[float]:
    """Seconds of training steps of transformers, with peft's adapters if asked for."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    token = model.config.image_token_id
    if lora:
        import peft

        pattern = rf".*text_model.*\.({'|'.join(TARGETS)})"
        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=pattern)
        model = peft.get_peft_model(model, settings)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels, ids = batch(token)
    given = torch.from_numpy((pixels.transpose(0, 3, 1, 2) - 0.5) / 0.5)[:, None]
    labels = torch.from_numpy(np.where(targets_of(ids, token), ids, -100))
    ids, seconds = torch.from_numpy(ids), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=given,
            labels=labels,
            use_cache=False,
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        float(out.loss.detach())
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def time_ours(folder: Path, steps: int, adapt: dict, compressor: dict) -> list[float]:
    """Seconds of our training steps."""
    import jax

    from efficient_vlm.adapt.config import AdaptConfig
    from efficient_vlm.processing.gather import Room
    from efficient_vlm.processing.pictures.base import Pictured
    from efficient_vlm.processing.request import Example, pack_request
    from efficient_vlm.runtime import enable_compilation_cache
    from efficient_vlm.train.arms import Arm
    from efficient_vlm.train.base import open_base
    from efficient_vlm.train.config import TrainConfig
    from efficient_vlm.train.optimizer import OptimizerConfig
    from efficient_vlm.train.pretrained_fields import PretrainedFields
    from efficient_vlm.train.published import Tuning, make_start, make_step

    enable_compilation_cache()
    base = open_base(PretrainedFields(str(folder), compressor=compressor))
    model = base.processor.seeing(base.model)
    token = base.processor.rules["image_token"]
    pixels, ids = batch(token)
    full, boxes = np.full((1, 2), 32), np.zeros((1, 4), np.float32)
    examples = [
        [Example([row], [Pictured(tile[None], full, "", full // 4, boxes)], [target])]
        for tile, row, target in zip(pixels, ids, targets_of(ids, token), strict=True)
    ]
    room = Room(text=TEXT, images=1, size=(512, 512))
    inputs = pack_request(model, examples, base.processor.rules, room).inputs
    settings = TrainConfig(steps=1000)
    tuning = Tuning(base, [Arm(model)], AdaptConfig(**adapt), None)
    start, frozen = make_start(tuning, settings, OptimizerConfig(learning_rate=1e-4))
    step, state, seconds = make_step(model, tuning, start, frozen, settings), start.state(), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = step(state, inputs)
        if not np.isfinite(float(metrics["loss"])):
            raise SystemExit("error: the loss is not finite")
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def mixed_rows() -> list[dict]:
    """Rows with a picture or none, and answers of very unlike lengths."""
    rng, rows = np.random.default_rng(0), []
    for number in range(MIXED):
        picture = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        words = int(np.clip(rng.lognormal(4.0, 0.9), 10, 600))
        text = " ".join(f"w{n}" for n in rng.integers(3, 40_000, words))
        asked = {"role": "user", "content": "<image> w17" if number % 5 else "w17"}
        images = [picture] if number % 5 else []
        rows.append({"images": images, "messages": [asked, {"role": "assistant", "content": text}]})
    return rows


def time_mixed(folder: Path, packed: bool) -> float:
    """Seconds of one epoch of LoRA over the mixed sample, everything compiled."""
    import jax

    from efficient_vlm.adapt.config import AdaptConfig
    from efficient_vlm.data.chat import ChatPipeline
    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.data.row_source import Reading, RowSource
    from efficient_vlm.data.tables.memory import MemoryTable
    from efficient_vlm.runtime import enable_compilation_cache
    from efficient_vlm.train.arms import Arm
    from efficient_vlm.train.base import open_base
    from efficient_vlm.train.config import TrainConfig
    from efficient_vlm.train.optimizer import OptimizerConfig
    from efficient_vlm.train.pretrained_fields import PretrainedFields
    from efficient_vlm.train.published import Tuning, make_start, make_step

    enable_compilation_cache()
    # One tile a picture: the encoder's part is what it is in the other jobs.
    base = open_base(PretrainedFields(str(folder), pictures={"split": False}))
    model = base.processor.seeing(base.model)
    size = dict(batch_size=2, pack_tokens=1024) if packed else dict(batch_size=4, pack=False)
    config = DataConfig(source="auto", path="rows.json", num_threads=0, max_images=8, **size)
    source = RowSource(MemoryTable(mixed_rows()), Reading())
    # A single shape is what padding to the longest is where shapes are static.
    pipeline = ChatPipeline(config, source, base.processor, [model], programs=4 if packed else 1)
    batches = [batch.inputs for batch in pipeline.epoch()]
    tuning = Tuning(base, [Arm(model)], AdaptConfig(name="lora", rank=RANK), None)
    settings = TrainConfig(steps=1000)
    start, frozen = make_start(tuning, settings, OptimizerConfig(learning_rate=1e-4))
    step, state = make_step(model, tuning, start, frozen, settings), start.state()
    for inputs in {inputs.text.shape: inputs for inputs in batches}.values():
        state, _ = step(state, inputs)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for inputs in batches:
        state, _ = step(state, inputs)
    jax.block_until_ready(state)
    return time.perf_counter() - began


def work(job: str, side: str, folder: Path, steps: int) -> None:
    """One process; its last line is JSON."""
    if job == "mixed":
        seconds = [time_mixed(folder, packed=side == "ours")]
    elif side != "ours":
        seconds = time_reference(folder, steps, lora=job == "lora")
    else:
        adapt = dict(name="full") if job == "full" else dict(name="lora", rank=RANK)
        kept = dict(name="divprune", budget=TOKENS // 4) if job == "quarter" else dict(name="none")
        seconds = time_ours(folder, steps, adapt, kept)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak}))


def run_worker(job: str, side: str, folder: Path, steps: int) -> dict:
    """What `work` prints, from a process of its own."""
    cache = dict(EFFICIENT_VLM_COMPILATION_CACHE=str(folder.parent / "programs"))
    words = [f"--worker={job}", f"--side={side}", f"--folder={folder}", f"--steps={steps}"]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: {job} by {side} failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def predicted(folder: Path) -> float:
    """Share of the time of all visual tokens that a quarter of them takes, by FLOPs.

    The frozen encoder runs forward; decoder and head run forward and, for the gradients of
    activations, as much again.
    """
    import efficient_vlm as evlm
    from efficient_vlm.costs.flops import model_cost

    vlm, found = evlm.from_pretrained(folder, check=False), []
    for budget in (None, TOKENS // 4):
        model = vlm.model if budget is None else vlm.with_compressor("divprune", budget).model
        flops = model_cost(model, text_tokens=TEXT, new_tokens=1, image_size=(512, 512)).flops
        twice = flops["decoder"] + TEXT * flops["head"]  # The head reads one token in the ledger.
        found.append(flops["encoder"] + flops["compressor"] + 2 * twice)
    return found[1] / found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--only", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--quick", action="store_true", help="two layers each, one turn")
    parser.add_argument("--out", type=Path, help="file for all samples, JSON")
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.side, args.folder, args.steps)
    from random_smolvlm import write_checkpoint

    found: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "model"
        write_checkpoint(folder, *((2, 2) if args.quick else (12, 30)))
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(dict(chat_template=TEMPLATE)))
        turns = 1 if args.quick else args.turns
        for turn in range(turns + 1):  # The first fills caches.
            for job in args.only.split(","):
                for side in JOBS[job][:: 1 if turn % 2 else -1]:
                    sample = run_worker(job, side, folder, args.steps)
                    print(f"turn {turn} of {turns}, {job}, {side}: {sample}", flush=True)
                    if turn:
                        found.setdefault(job, {}).setdefault(side, []).append(sample)
        share = predicted(folder)
    medians = {
        (job, side): {key: statistics.median(s[key] for s in samples) for key in samples[0]}
        for job, sides in found.items()
        for side, samples in sides.items()
    }
    for (job, side), value in medians.items():
        rows = MIXED if job == "mixed" else ROWS
        rate, peak = rows / value["seconds"], value["peak_bytes"]
        print(f"{job:8} {side:13} {rate:7.3f} rows/s  peak {peak / 1e9:5.2f} GB")
    for job, other in (("full", "transformers"), ("lora", "peft")):
        if (job, "ours") in medians and (job, other) in medians:
            ours, theirs = medians[job, "ours"], medians[job, other]
            speed = theirs["seconds"] / ours["seconds"]
            memory = ours["peak_bytes"] / theirs["peak_bytes"]
            print(f"{job}: {speed:.2f} times the rows per second, {memory:.2f} of the memory")
    if ("mixed", "ours") in medians:
        faster = medians["mixed", "padded"]["seconds"] / medians["mixed", "ours"]["seconds"]
        print(f"mixed: {faster:.2f} times the rows per second of padded ones")
    if ("quarter", "ours") in medians and ("lora", "ours") in medians:
        measured = medians["quarter", "ours"]["seconds"] / medians["lora", "ours"]["seconds"]
        saved = (1 - measured) / (1 - share)
        print(f"a quarter of the tokens: {measured:.3f} of the time, {share:.3f} predicted")
        print(f"  {saved:.2f} of the predicted saving")
    if args.out:
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        result = {"machine": machine, "quick": args.quick, "samples": found, "predicted": share}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
