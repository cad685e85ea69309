"""Every config that starts from a published model trains a tiny one, evaluates it and loads it.

What must hold of a recipe: which parameters it trains, how many visual tokens the decoder sees,
finite losses, and rows of results. That a step is right is tested elsewhere.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_published
from flax.traverse_util import flatten_dict
from PIL import Image

import efficient_vlm as evlm
from efficient_vlm.cli import config_file as configs
from efficient_vlm.nn.stack import restack
from efficient_vlm.processing import pointing
from efficient_vlm.train.config import is_published
from efficient_vlm.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "samples" / "smolvlm"
PRODUCTS = r"language/.*(attention/(query|key|value|out)|mlp/(gate|up|down))/kernel$"
# Config -> sample, what it changes of the merged model, its own overrides.
RECIPES = {
    "finetune": (None, PRODUCTS, ()),
    "llava_stage1": ("llava", r"connect/.*", ("train.accumulate=2",)),
    "llava_stage2": ("llava", r"(connect|language)/.*", ()),
    "smolvlm_lora": (
        None, rf"{PRODUCTS}|vit/.*attention/(query|key|value)/kernel$", ()
    ),
    "paligemma_transfer": ("paligemma", r".*", ()),
    "molmo_pointing": ("molmo_qwen2", r".*", ()),
    "distil_quarter:divprune,1": (None, PRODUCTS, ()),
    "picture_classes:DATA": (None, PRODUCTS, ("data.held_out=river",)),
}  # fmt: skip


def published_configs():
    """Those that learn from answers; `train/test_preferred.py` has those of preferences."""
    paths = sorted((ROOT / "configs").glob("*.py"))
    loaded = {path: configs.load(str(path)) for path in paths}
    return [p for p, c in loaded.items() if is_published(c) and "preference" not in c]


def test_every_recipe_is_tried():
    assert {path.stem for path in published_configs()} == {name.split(":")[0] for name in RECIPES}


@pytest.mark.parametrize("path", published_configs(), ids=lambda path: path.stem)
def test_the_command_of_a_recipe_is_one_of_ours(path):
    """The first lines name the file itself, and options that the config has."""
    doc = path.read_text().split('"""')[1]
    commands = re.findall(r"efficient-vlm train [^\n]*(?:\\\n[^\n]*)*", doc)
    assert commands and all(f"--config=configs/{path.name}" in command for command in commands)
    for command in commands:
        given = re.findall(r"--config\.([\w.]+=\S+)", command)
        configs.load(str(path), [each for each in given if "PATH" not in each])


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "finetune"])
def test_a_wrong_argument_is_told(name):
    path = ROOT / "configs" / f"{name.split(':')[0]}.py"
    if path.stem != "picture_classes":  # Which takes any name.
        with pytest.raises(evlm.UserError, match="wrong"):
            configs.load(f"{path}:wrong")


def pictures(folder, count=8):
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def rows_of(stem, folder):
    """A file of eight conversations of one turn; answers to the recipe's kind of question."""
    pictures(folder)
    found = []
    for i in range(8):
        question, answer = "Which is it?", f"number {i}"
        if stem == "molmo_pointing":
            points = [pointing.Point(0.1 * i, 0.5), pointing.Point(0.9, 0.25)]
            question, answer = "Point to the dots.", pointing.write(points, "dots")
        talk = [("user", f"<image>{question}"), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in talk]
        found.append({"images": [f"{i}.png"], "messages": messages})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))
    return folder / "rows.jsonl"


def tiles(folder, monkeypatch):
    """A labelled picture set as TensorFlow Datasets prepares it."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "data"))
    import layout_samples

    return layout_samples.tiles(folder)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """sample(name) -> directory, each written once; None for that of tests/samples."""
    folder, made = tmp_path_factory.mktemp("published"), {None: SAMPLE}

    def sample(name):
        if name not in made:
            made[name] = tiny_published.published(name, folder / name)
        return made[name]

    return sample


def params_of(vlm):
    return {k: np.asarray(v) for k, v in flatten_dict(restack(vlm.params), sep="/").items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name, samples, tmp_path, monkeypatch):
    stem, _, arg = name.partition(":")
    sample, trained, own = RECIPES[name]
    model = samples(sample)
    spec = str(ROOT / "configs" / f"{stem}.py")
    overrides = [f"model.pretrained={model}", "model.dtype=float32", "train.log_every=1", *own]
    overrides += ["data.batch_size=2", "train.steps=3", "train.checkpoint_every=3"]
    overrides += ["eval.images=2", "eval.batch_size=2", "eval.new_tokens=2"]
    if arg == "DATA":
        spec += f":{tiles(tmp_path, monkeypatch)}"
        overrides[-3] = "eval.images=6"
    else:
        spec += f":{arg}" if arg else ""
        overrides += [f"data.path={rows_of(stem, tmp_path)}", "data.test_fraction=0.25"]
    config = configs.load(spec, overrides)
    workdir = tmp_path / "run"
    results = evlm.fit(config, workdir, say=lambda line: None)

    assert results["train"]["steps"] == 3 and results["train"]["skipped_steps"] == 0
    assert results["train"]["skipped_samples"] == {}
    metrics = read_metrics(workdir)
    assert len(metrics) == 3 and all(math.isfinite(row["loss"]) for row in metrics)
    assert all(math.isfinite(row["loss"]) and row["targets"] for row in results["losses"])
    check_what_was_trained(workdir, model, trained)

    methods = [(row["compressor"], row["visual_tokens"]) for row in results["cost"]]
    settings = {(row["compressor"], row["budget"]) for row in results["eval"]}
    assert len(settings) == len(methods) == len(results["losses"])
    if stem == "distil_quarter":
        (whole, all_tokens), (method, fewer) = methods
        assert (whole, method) == ("none", "divprune") and all_tokens == 4 * fewer > 0
        assert all(row["distillation"] > 0 for row in metrics)
    if stem == "picture_classes":
        counts = {row["task"]: row["n"] for row in results["eval"]}
        assert counts == {"exact_match": 6, "seen": 4, "held_out": 2}
    if stem == "molmo_pointing":
        assert results["metric"] == "points" and "F1" in results["protocol"]


def check_what_was_trained(workdir, model, pattern):
    """Against the base, parameter by parameter, once adapters are merged."""
    before = params_of(evlm.from_pretrained(model))
    after = params_of(evlm.from_pretrained(workdir).merge())
    assert before.keys() == after.keys()
    changed = {path for path, value in before.items() if (value != after[path]).any()}
    wanted = {path for path in before if re.match(pattern, path)}
    assert changed <= wanted, sorted(changed - wanted)[:5]
    # A parameter may get no gradient: a bias of keys, a row of padding, what no picture reaches.
    assert len(changed) >= 0.8 * len(wanted), sorted(wanted - changed)[:9]
