"""Compiles the plans of docs/plans.md and writes it: `python docs/plans.py`.

What is compiled is kept in docs/plans.json, so that an interrupted run goes on; delete it to
compile everything again. Needs the compilers, `pip install -e '.[test,aot-gpu]'`; some six seconds
a plan for inference, half a minute to five minutes for training.
"""

import argparse
import itertools
import json
from pathlib import Path

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.cli.audit_aot import make_work
from efficient_vlm.cli.methods import make_entry, read_methods
from efficient_vlm.cli.subject import read_subject
from efficient_vlm.costs.compiled.chips import chip_of, devices_of, has_compiler
from efficient_vlm.costs.compiled.compiled import compile_plan
from efficient_vlm.costs.compiled.options import parse_mesh
from efficient_vlm.costs.match import Target
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets
from efficient_vlm.files import write_atomic

HERE = Path(__file__).parent
TOPOLOGIES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v6e-256": "v6e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v5p-512": "v5p:8x8x4",
    "h100-8": "h100:8",
    "tpu7x-8": "tpu7x:2x2x1",
    "b200-8": "b200:8",
    "b300-8": "b300:8",
}
TASKS = ("prefill", "decode", "train")
# Machines of which the page shows one model; the command of a row makes that of any other. Training
# for a tpu7x takes minutes of its compiler: `--task=train --topology=tpu7x-8 --mesh=fsdp:8`.
ONE_MODEL = "smolvlm-256m"
NEWEST = {"tpu7x-8": TASKS[:2], "b200-8": TASKS, "b300-8": TASKS}
# Devices that share the width of a layer, for training and for inference (of 16 GiB and of more),
# and pictures in a training batch of each group of them.
MODELS = {
    "smolvlm-256m": dict(train=1, serve=(1, 1), pictures=4),
    "qwen2-vl-2b": dict(train=1, serve=(1, 1), pictures=2),
    "molmoe-1b": dict(train=1, serve=(4, 1), pictures=1),
    "molmo-7b-d": dict(train=4, serve=(4, 4), pictures=1),
    "molmo-72b": dict(train=8, serve=(16, 8), pictures=1),
}
SHARES = (1, 4, 9)
# Models and the machine of which the page shows LoRA of the decoder as well.
ADAPTED = {"smolvlm-256m": "v5e-16"}
LORA = AdaptConfig(name="lora")
SERVED = 8  # Pictures in an inference batch of each group.
NEW = 64


def settings():
    """Every plan as (model, machine, task, share), in the order in which they are compiled."""
    for task in TASKS:
        for name, machine, share in itertools.product(MODELS, TOPOLOGIES, SHARES):
            if machine not in NEWEST or (name == ONE_MODEL and task in NEWEST[machine]):
                yield name, machine, task, share
    for name, machine in ADAPTED.items():
        for share in SHARES:
            yield name, machine, "lora", share


def shape(name: str, machine: str, task: str, devices: int) -> tuple[str, int]:
    """Mesh and batch of a plan."""
    sizes = MODELS[name]
    if task in ("train", "lora"):
        groups = devices // sizes["train"]
        return f"fsdp:{groups},tensor:{sizes['train']}", groups * sizes["pictures"]
    tensor = sizes["serve"][not machine.startswith("v5e")]
    return f"data:{devices // tensor},tensor:{tensor}", devices // tensor * SERVED


def compiled(name: str, machine: str, task: str, share: int) -> dict:
    """The row of one plan."""
    subject = read_subject(preset=name, new=NEW)
    chosen = read_methods(subject, ["none" if share == 1 else "pool"], [])[0]
    target = None if share == 1 else Target("mean_processed", subject.baseline.entering / share)
    ledger = make_entry(subject, chosen, target).ledger
    topology = TOPOLOGIES[machine]
    mesh, batch = shape(name, machine, task, len(devices_of(topology)))
    given = (task, batch) if task != "lora" else ("train", batch, "full", LORA)
    work = make_work(subject, ledger.compressor, *given)
    row = dict(model=name, machine=machine, task=task, share=share, tokens=ledger.entering)
    try:
        found = compile_plan(work, topology, parse_mesh(mesh)).to_json()
    except UserError as error:
        return row | dict(mesh_text=mesh, batch=batch, error=str(error).splitlines()[0])
    return row | dict(mesh_text=mesh, batch=batch) | found


def key(row: dict) -> tuple:
    return row["model"], row["machine"], row["task"], row["share"]


def command(row: dict) -> str:
    """What makes a row by itself: the method's budget is of each image, or of all that it pools."""
    words = [f"--preset={row['model']}", f"--task={row['task']}"]
    if row["task"] == "lora":
        words[1:] = ["--task=train", "--adapt=lora"]
    words += [f"--topology={TOPOLOGIES[row['machine']]}", f"--mesh={row['mesh_text']}"]
    words += [f"--batch={row['batch']}"]
    if row["share"] > 1:
        preset = presets.get(row["model"])
        images = 1 if preset["pooled"] else preset["images"]
        words += ["--compressor=pool", f"--compressor.budget={row['tokens'] // images}"]
    return " ".join(["efficient-vlm audit aot", *words])


def render(rows: list[dict]) -> str:
    """docs/plans.md."""
    known = {key(row): row for row in rows}
    asked = list(settings())
    lines = [
        "# Plans for pods",
        "",
        "What published models need on TPUs and GPUs, and what fewer visual tokens buy: every line "
        "is a program of ours, compiled by the chip's own compiler on a host without one. **Memory "
        "is the compiler's. Times are estimates: bounds at the published speed of the chip, "
        "nothing was run on either.** All numbers are of one device. `python docs/plans.py` makes "
        "the page; each row ends with the command that makes it alone. Inference has two programs "
        "of each row: the command is that of the first token; with `--task=decode` it is that of "
        "a further one.",
        "",
        f"Tokens are averaged down (`pool`) to 1/4 and 1/9 of those of the preset's picture; "
        f"{NEW} tokens of answer. Inference: {SERVED} pictures for each group of devices that "
        "share a model, bfloat16 parameters, the stages as `generate` runs them. Training: the "
        "whole model, float32 parameters and moments of AdamW, bfloat16 products, remat of all. "
        "LoRA: the same, but frozen parameters have no gradients and no moments. "
        "v5p-128 and v5p-512 have 64 and 256 chips; tpu7x-8 has four, each of which is two "
        "devices.",
        "",
        "h100-8 is one host of eight, with our Hopper kernels in encoder and decoder; b200-8 and "
        "b300-8 are as well, with XLA's attention, since Hopper's instructions are not theirs, so "
        "that an encoder's products are written to memory and read again. Of these two and tpu7x-8 "
        f"the page has {ONE_MODEL} alone, of tpu7x-8 its inference. On a GPU the "
        "compiler tries out tiles of products, which it cannot do without one; that changes speed, "
        "not what is counted here. Experts count as evenly loaded.",
        "",
        f"{len(known)} of {len(asked)} plans have been compiled so far."
        if len(known) < len(asked)
        else f"All {len(asked)} plans were compiled.",
    ]
    for name in MODELS:
        mine = [known[k] for k in asked if k in known and k[0] == name]
        if mine:
            lines += ["", f"## {name}", *_inference(mine), *_training(mine)]
    return "\n".join(lines) + "\n"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _memory(row: dict) -> str:
    total = row["hbm_bytes"]["total"]
    return _gib(total) if row["fits"] else f"**{_gib(total)}, does not fit**"


def _gain(row: dict, rows: list[dict]) -> str:
    """Chips that this plan needs for the pictures a second of the one with all tokens."""
    full = next((r for r in rows if key(r) == (*key(row)[:3], 1)), None)
    if full is None or not all(r.get("fits") for r in (row, full)):
        return ""
    chips = row["devices"] // chip_of(row["topology"]).devices
    return f"{chips * row['estimated_seconds'] / full['estimated_seconds']:.3g}"


FACTS = ("machine", "mesh", "batch", "tokens", "GiB")
STAGES = ("encode", "compress", "prefill", "decode, a token")
INFERENCE = (*STAGES, "chips for the first token as often")
TRAINING = (
    *("of it temporaries", "TFLOPs", "GiB sent", "ms at least", "bound by"),
    "chips for as many pictures a second",
)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[dict, list[str]]]) -> list[str]:
    """`rows`: each plan with what stands behind its facts: memory, then `columns`."""
    if not rows:
        return []
    columns = (*FACTS, *columns)
    rule = "|---|---|" + "--:|" * (len(columns) - 2) + "---|"
    lines = ["", title, "", f"| {' | '.join([*columns, 'command'])} |", rule]
    for row, cells in rows:
        facts = [row["machine"], f"`{row['mesh_text']}`", str(row["batch"]), f"{row['tokens']:,}"]
        cells = [*facts, *([row["error"]] if "error" in row else cells)]
        cells += [""] * (len(columns) - len(cells))
        lines.append(f"| {' | '.join([*cells, f'`{command(row)}`'])} |")
    return lines


def _inference(rows: list[dict]) -> list[str]:
    def cells(plans):
        fullest = max(plans.values(), key=lambda r: r["hbm_bytes"]["total"])
        prefill, decode = plans.get("prefill"), plans.get("decode")
        stages = {s["name"]: s["estimated_seconds"] for s in prefill["stages"]} if prefill else {}
        times = [_ms(stages.get(n)) for n in STAGES[:3]]
        times.append(_ms(decode["estimated_seconds"]) if decode else "")
        return [_memory(fullest), *times, _gain(prefill, rows) if prefill else ""]

    # The two programs of a plan share a line; after `--only` there may be one of them.
    pairs = {}
    for row in rows:
        if row["task"] in TASKS[:2]:
            pairs.setdefault((row["machine"], row["share"]), {})[row["task"]] = row
    mine = []
    for plans in pairs.values():
        sound = {task: row for task, row in plans.items() if "error" not in row}
        mine.append((plans.get("prefill") or plans["decode"], cells(sound) if sound else []))
    return _table("Inference; milliseconds at least for each stage:", INFERENCE, mine)


def _training(rows: list[dict]) -> list[str]:
    def cells(row):
        found = [_memory(row), _gib(row["hbm_bytes"]["temporaries"])]
        if not row["fits"]:
            return found
        found += [f"{row['flops'] / 1e12:.3g}", _gib(sum(row["collective_bytes"].values()))]
        seconds = row["stages"][0]["seconds"]
        bound = max(seconds, key=seconds.get)
        return [*found, _ms(row["estimated_seconds"]), bound, _gain(row, rows)]

    titles = {
        "train": "Training, a step:",
        "lora": f"LoRA of rank {LORA.rank} on the decoder's products, a step:",
    }
    tables = []
    for task, title in titles.items():
        mine = [(r, [] if "error" in r else cells(r)) for r in rows if r["task"] == task]
        tables += _table(title, TRAINING, mine)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="part of model/machine/task/share, such as molmo-7b-d/v5e")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of plans.json and plans.md")
    args = parser.parse_args()
    labels = {one: "/".join(map(str, one)) for one in settings()}
    labels = {one: label for one, label in labels.items() if (args.only or "") in label}
    if not labels:
        parser.error(f"--only={args.only[:80]}: no such plan; a part of MODEL/MACHINE/TASK/SHARE")
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "plans.json"
    rows = json.loads(stored.read_text()) if stored.exists() else []
    known = set(map(key, rows))
    asked = {one: label for one, label in labels.items() if one not in known}
    gpus = {machine for _, machine, *_ in asked if chip_of(TOPOLOGIES[machine]).gpu}
    for machine in sorted(gpus):
        if not has_compiler(chip_of(TOPOLOGIES[machine])):
            fix = "pip install 'efficient_vlm[aot-gpu]', or --only=/v for TPUs"
            parser.error(f"{machine}: no compiler; {fix}")
        devices_of(TOPOLOGIES[machine])  # Only before JAX asks for any devices.
    for one, label in asked.items():
        rows.append(compiled(*one))
        print(label, rows[-1].get("error") or ("fits" if rows[-1]["fits"] else "does not fit"))
        write_atomic(stored, (json.dumps(rows, indent=1) + "\n").encode())
    page = args.out / "plans.md"
    write_atomic(page, render(rows).encode())
    print(f"{len(asked)} compiled, {len(labels) - len(asked)} were there. Written: {page}")


if __name__ == "__main__":
    main()
