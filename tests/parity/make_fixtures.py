#!/usr/bin/env python
"""Tiny random checkpoints in the published layout, with the outputs of the reference library.

    python tests/parity/make_fixtures.py OUT_DIR [case ...] [--golden]

needs `pip install -e '.[test,parity]'`. Without --golden it writes every live case ("family",
"family__odd", "family__variant"); with --golden the smaller ones that are committed, one per
family. Each case becomes OUT_DIR/<case>/ with config.json, the weights, and io.npz, whose keys
tests/golden/README.md explains.

A case counts as good when the model reloaded from disk repeats the outputs, when every row alone
gives what it gives in the padded batch, and when the tokens generated with a cache are those
which one pass without a cache would choose.
"""

import argparse
import copy
import inspect
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import cases_grid  # noqa: F401 - imported for the cases they register
import cases_text  # noqa: F401
import cases_vision  # noqa: F401
import numpy as np
import torch
import transformers
from hub_layout import restore_hub_layout, to_version_4
from safetensors import safe_open
from tiny_torch import CASES, EAGER, GOLDEN, Case

NEW_TOKENS = 8
# Two roads through float32 arithmetic: far below what any misread weight would cause. A choice
# between tokens must be clearer than that.
TOLERANCE = 3e-5


def to_numpy(value) -> np.ndarray:
    if not torch.is_tensor(value):
        return np.asarray(value)
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs, output_hidden_states=True, return_dict=True)


@torch.no_grad()
def image_features(model, inputs) -> torch.Tensor:
    """(placeholders of the batch, width): what takes the place of the placeholders, in order."""
    accepted = inspect.signature(model.get_image_features).parameters
    features = model.get_image_features(
        **{name: value for name, value in inputs.items() if name in accepted}
    )
    features = getattr(features, "pooler_output", features)
    if torch.is_tensor(features):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


@torch.no_grad()
def continue_row(case: Case, row) -> tuple[np.ndarray, float]:
    """Greedy continuation with a cache -> (ids (1, prompt + 8), smallest lead of a choice)."""
    settings = case.model.generation_config
    settings.eos_token_id = None  # nothing is suppressed: every step is a plain argmax
    settings.pad_token_id = 0
    prompt = replace(row, prefix=None)
    tokens = case.model.generate(
        **case.collate([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    whole = replace(row, ids=tokens[0].tolist(), prefix=len(row.ids))
    logits = forward(case.model, case.collate([whole])).logits[0, len(row.ids) - 1 : -1]
    best = logits.topk(2).values
    if not torch.equal(logits.argmax(-1), tokens[0, len(row.ids) :]):
        raise ValueError("generation with a cache differs from one pass without")
    return to_numpy(tokens), float((best[:, 0] - best[:, 1]).min())


def save(name: str, case: Case, folder: Path) -> None:
    """Write config and weights as they would be published."""
    model = copy.deepcopy(case.model).to(torch.bfloat16) if case.bfloat16 else case.model
    options = dict(max_shard_size=case.shard_size) if case.shard_size else {}
    model.save_pretrained(folder, save_original_format=case.original_format, **options)
    if case.original_format:
        restore_hub_layout(name.split("__")[0], folder, model.config)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if case.version_4:
        config = to_version_4(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


def row_difference(case: Case, outputs: torch.Tensor) -> float:
    """Largest difference between a row alone and the same row in the padded batch."""
    worst = 0.0
    for i, row in enumerate(case.rows):
        alone = forward(case.model, case.collate([row])).logits[0]
        worst = max(worst, float((alone - outputs[i, : len(row.ids)]).abs().max()))
    return worst


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return shapes


def make_case(name: str, root: str | Path, golden: bool = False) -> dict:
    """Write one case under `root` and return what was measured; raises ValueError if it is bad."""
    started = time.perf_counter()
    case = (GOLDEN if golden else CASES)[name]()
    if case.bfloat16:
        with torch.no_grad():
            for weight in case.model.parameters():
                weight.copy_(weight.bfloat16().float())
    folder = Path(root) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(name, case, folder)

    inputs = case.inputs or case.collate(case.rows)
    key = "logits" if case.rows else "last_hidden_state"
    out = forward(case.model, inputs)
    arrays = {f"in/{k}": to_numpy(v) for k, v in inputs.items()}
    arrays |= {f"in_extra/{k}": to_numpy(v) for k, v in case.extras(inputs).items()}
    arrays[f"out/{key}"] = to_numpy(out[key])
    if case.rows:  # what padding gives means nothing and does not compress
        arrays["out/logits"] = to_numpy(out.logits * inputs["attention_mask"][..., None])
    if out.get("pooler_output") is not None:
        arrays["out/pooler_output"] = to_numpy(out.pooler_output)
    if case.rows and "pixel_values" in inputs:
        arrays["out/image_features"] = to_numpy(image_features(case.model, inputs))
    if not golden:
        arrays |= {f"dbg/hs_{i}": to_numpy(h) for i, h in enumerate(out.hidden_states or ())}

    reloaded = type(case.model).from_pretrained(folder, **EAGER)
    reload = float((forward(reloaded.eval(), inputs)[key] - out[key]).abs().max())
    rows = row_difference(case, out[key])
    lead = float("inf")
    for i, row in enumerate(case.rows):
        tokens, smallest = continue_row(case, row)
        arrays[f"gen/tokens_{i}" if i else "gen/tokens"] = tokens
        lead = min(lead, smallest)
    np.savez_compressed(folder / "io.npz", **arrays)
    if not golden:
        memory = {k: list(v.shape) for k, v in case.model.state_dict().items()}
        keys = dict(disk=tensor_shapes(folder), memory=memory, model=type(case.model).__name__)
        (folder / "keys.json").write_text(json.dumps(keys, indent=0))
    report = dict(
        kilobytes=round(sum(path.stat().st_size for path in folder.iterdir()) / 1000),
        std=float(out[key].std()),
        reload=reload,
        rows=rows,
        lead=lead,
        seconds=round(time.perf_counter() - started, 2),
    )
    if not np.isfinite(report["std"]) or max(reload, rows) > TOLERANCE or lead < 3 * TOLERANCE:
        raise ValueError(f"{name} is not a fixture to trust: {report}")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("case", nargs="*", help="default: all")
    parser.add_argument("--golden", action="store_true", help="the small committed cases")
    options = parser.parse_args(arguments)
    known = GOLDEN if options.golden else CASES
    if unknown := set(options.case) - set(known):
        parser.error(f"unknown case {sorted(unknown)}; known: {', '.join(known)}")

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # such small matrices are slower on two
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    failed = 0
    for name in options.case or known:
        try:
            report = make_case(name, options.out_dir, options.golden)
        except Exception as error:  # the other cases are still wanted
            failed += 1
            print(f"BAD {name}: {error!r}", flush=True)
            if os.environ.get("TRACEBACK"):
                raise
            continue
        text = "  ".join(
            f"{k} {v:.1e}" if isinstance(v, float) and k != "seconds" else f"{k} {v}"
            for k, v in report.items()
        )
        print(f"ok  {name:26s} {text}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
