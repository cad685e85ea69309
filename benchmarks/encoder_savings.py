"""Patches that leave the encoder early: time to the first token, beside transformers.

    pip install -e '.[test,parity]' && python benchmarks/encoder_savings.py

Random weights, float32, two threads; all sides take turns in one process. `encoder_cut` keeps half
or a quarter of the projector's blocks behind layer 2, by attention received. SmolVLM-256M sees five
tiles of 512 x 512 pixels and reads 64 text tokens: time is from pixels to the first token. Of
Qwen2-VL-2B it is the encoder with its merger alone, 8 of its 32 layers on 672 x 672 pixels; "page"
is the same for a page whose lower half is white, by `pixelprune` with tau 0, which finds that. For
each: medians, ratios to all patches and to transformers, what the FLOP count of `audit` predicts,
and the temporary buffers of the compiled encoder.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import generate_vs_transformers as peer
import jax
import numpy as np

import efficient_vlm as evlm
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.errors import UserError
from efficient_vlm.families import published
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.stages import encode_stage, programs_of
from efficient_vlm.models.inputs import Pictures
from efficient_vlm.processing.pictures.base import Pictured

# What is left -> options of `encoder_cut`.
CUTS = {"1/2": dict(keep=(0.5,)), "1/4": dict(keep=(0.25,))}
QWEN_LAYERS, QWEN_PIXELS = 8, 672


def variants(vlm, quick: bool) -> dict:
    """The model with all patches, and with fewer."""
    where = (1 if quick else 2,)
    return {"all": vlm} | {
        left: vlm.with_compressor("encoder_cut", layers=where, **cut) for left, cut in CUTS.items()
    }


def in_turns(sides: dict, turns: int) -> dict[str, float]:
    """Median seconds of each function; one call before is not counted."""
    for call in sides.values():
        call()
    times = {name: [] for name in sides}
    for _ in range(turns):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def table(seconds: dict[str, float], flops: dict[str, int], memory: dict[str, int]) -> dict:
    """Ratios of the medians, and what FLOPs predict."""
    found = {}
    for left in seconds.keys() - {"transformers"}:
        measured = seconds["all"] / seconds[left]
        predicted = flops["all"] / flops[left]
        found[left] = {
            "seconds": seconds[left],
            "beside_all": measured,
            "beside_transformers": seconds["transformers"] / seconds[left],
            "predicted": predicted,
            "share_of_prediction": measured / predicted,
            "encoder_temporaries_bytes": memory[left],
        }
    return {"transformers_seconds": seconds["transformers"], **dict(sorted(found.items()))}


def report(name: str, found: dict) -> None:
    """Lines for a person."""
    print(f"{name}: transformers {found['transformers_seconds']:.2f} s")
    for left, row in found.items():
        if left != "transformers_seconds":
            print(
                f"  {left:>4} {row['seconds']:6.2f} s; {row['beside_all']:.2f} times all, "
                f"{row['share_of_prediction']:.2f} of what FLOPs predict; "
                f"{row['beside_transformers']:.2f} times transformers; encoder's temporaries "
                f"{row['encoder_temporaries_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )


def temporaries(model, params, pictures) -> int:
    """Bytes that the compiled encoder needs beside its weights, inputs and results."""
    static = programs_of(model, model.layout(pictures)).encode
    visible = {name: params[name] for name in params if name != "language"}
    compiled = encode_stage.lower(*static, visible, pictures).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# --- SmolVLM --------------------------------------------------------------------------------------


def smolvlm(folder: Path, batch: int, turns: int, quick: bool) -> dict:
    """From pixels to the first token of each row."""
    import torch

    theirs = peer.reference(folder, quick)
    tiles = 1 if quick else peer.TILES
    pixels, ids = peer.question(theirs.config.image_token_id, tiles)
    given = torch.from_numpy((pixels.transpose(0, 3, 1, 2) - 0.5) / 0.5)[None]
    given = given.repeat(batch, 1, 1, 1, 1)
    tokens = torch.from_numpy(ids)[None].repeat(batch, 1)

    def reference() -> None:
        with torch.no_grad():
            out = theirs(input_ids=tokens, pixel_values=given, use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1)

    full = np.full((tiles, 2), 32)
    picture = Pictured(pixels, full, "", full // 4, np.zeros((tiles, 4), np.float32))
    sides, flops, memory = {"transformers": reference}, {}, {}
    for left, vlm in variants(evlm.from_pretrained(folder), quick).items():
        request = vlm.place([ids] * batch, [[picture]] * batch)

        def ours(vlm=vlm, request=request) -> None:
            generate(request.model, vlm.fused, request.inputs, new_tokens=1, eos_id=-1)

        sides[left] = ours
        flops[left] = model_cost(vlm.model, text_tokens=peer.TEXT, images=tiles).total
        memory[left] = temporaries(request.model, vlm.fused, request.inputs.pictures)
    return table(in_turns(sides, turns), flops, memory)


# --- the encoder of Qwen2-VL ----------------------------------------------------------------------


def qwen(folder: Path, batch: int, turns: int, quick: bool, page: bool = False) -> dict:
    """Encoder and merger."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = dict(published.get("qwen2-vl-2b")["config"])
    config["vision_config"] = {**config["vision_config"], "depth": 3 if quick else QWEN_LAYERS}
    config |= dict(num_hidden_layers=1, vocab_size=1024, image_token_id=5, vision_start_token_id=6)
    config |= dict(vision_end_token_id=7, video_token_id=8, bos_token_id=1, eos_token_id=2)
    config.pop("architectures", None)
    built = transformers.Qwen2VLConfig(**config)
    theirs = transformers.Qwen2VLForConditionalGeneration._from_config(
        built, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    theirs.save_pretrained(folder)
    side = 224 if quick else QWEN_PIXELS
    patches = side // 14
    rng = np.random.default_rng(0)
    pixels = rng.random((batch, 1, side, side, 3), np.float32)
    if page:
        pixels[:, :, side // 2 :] = 1.0
    flat = torch.from_numpy(rng.standard_normal((batch * patches**2, 1176), np.float32))
    grid = torch.tensor([[1, patches, patches]] * batch)

    def reference() -> None:
        with torch.no_grad():
            theirs.model.visual(flat, grid_thw=grid)

    pictures = Pictures(pixels, np.ones((batch, 1), bool))
    sides, flops, memory = {"transformers": reference}, {}, {}
    vlm = evlm.from_pretrained(folder)
    models = {left: one.model for left, one in variants(vlm, quick).items()}
    if page:
        models = {"all": vlm.model, "page": vlm.with_compressor("pixelprune").model}
    for left, model in models.items():
        model = model.sized(side, side).with_room(pictures)
        static = programs_of(model, model.layout(pictures)).encode
        visible = {name: vlm.fused[name] for name in vlm.fused if name != "language"}

        def ours(static=static, visible=visible) -> None:
            jax.block_until_ready(encode_stage(*static, visible, pictures))

        sides[left] = ours
        cost = model_cost(model, text_tokens=1).flops
        flops[left] = cost["encoder"] + cost["compressor"]
        memory[left] = temporaries(model, vlm.fused, pictures)
    return table(in_turns(sides, turns), flops, memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--only", default="smolvlm,qwen,page")
    parser.add_argument("--quick", action="store_true", help="few layers, small pictures, one turn")
    parser.add_argument("--out", default="benchmarks/results/encoder_savings_cpu.json")
    args = parser.parse_args()
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("transformers is not installed", fix="pip install -e '.[parity]'") from None
    torch.set_num_threads(peer.THREADS)
    turns = 1 if args.quick else args.turns
    result = {"machine": peer.machine(), "turns": turns, "quick": args.quick}
    work = {"smolvlm": smolvlm, "qwen": qwen, "page": functools.partial(qwen, page=True)}
    for batch in map(int, args.batches.split(",")):
        for name in args.only.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                found = work[name](Path(scratch) / "model", batch, turns, args.quick)
            result[f"{name}, batch {batch}"] = found
            report(f"{name}, batch {batch}", found)
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
