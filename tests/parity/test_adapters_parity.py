"""Live: PEFT reads adapters of ours, and we read PEFT's, with equal logits and equal merges."""

import copy
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402

from efficient_vlm.adapt.build import combine, merge, partition, prepare  # noqa: E402
from efficient_vlm.adapt.config import AdaptConfig  # noqa: E402
from efficient_vlm.adapt.forms import DoRA, LoRA  # noqa: E402
from efficient_vlm.checkpoints.safetensors_read import Checkpoint  # noqa: E402
from efficient_vlm.cli import verify  # noqa: E402
from efficient_vlm.families import architecture, load  # noqa: E402
from efficient_vlm.families.adapters import WEIGHTS, load_adapter, save_adapter  # noqa: E402
from efficient_vlm.families.peft_names import Modules  # noqa: E402
from efficient_vlm.families.table import family_of  # noqa: E402

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["smolvlm", "llava", "qwen2_5_vl", "paligemma", "gemma3", "internvl"]
EAGER = dict(attn_implementation="eager", dtype=torch.float32)
# Two roads through float32, as a share of the largest logit.
TOLERANCE = 1e-5
LINEARS = (
    r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv|attn\.proj|modality_projection\.proj"
    r"|up_proj|down_proj|fc1|linear_1)"
)


class Base:
    """One tiny published model: ours, theirs, and the same inputs for both."""

    def __init__(self, name):
        folder = GOLDEN / name
        self.config = architecture.read_config(folder)
        self.family, self.model = family_of(self.config), architecture.build_model(self.config)
        whole = (self.family, self.config, self.model)
        self.source = load.FamilyCheckpoint(Checkpoint.open(folder), *whole)
        self.params = load.stacked(self.source, np.float32)
        with np.load(folder / "io.npz") as file:
            io = dict(file)
        self.inputs = verify.read_inputs(*whole, io)
        self.given = {k[3:]: torch.from_numpy(v) for k, v in io.items() if k.startswith("in/")}
        cls = transformers.AutoModelForImageTextToText
        self.theirs = cls.from_pretrained(folder, **EAGER).eval()
        placed = self.inputs.placed()
        forward = jax.jit(lambda p: self.inputs.model.apply({"params": p}, placed).logits)
        self._forward, self._lengths = forward, placed.lengths

    @property
    def whole(self):
        return self.family, self.config, self.model

    def ours(self, params):
        out = np.asarray(self._forward(params))
        return [row[:length] for row, length in zip(out, self._lengths, strict=True)]

    @torch.no_grad()
    def reference(self, model):
        """Logits behind each text token of each row."""
        logits = model(**self.given).logits.numpy()
        mask = self.given["attention_mask"].numpy().astype(bool)
        token = self.inputs.place["image_token"]
        rows = zip(logits, mask, self.inputs.prompts, strict=True)
        return [row[live][prompt.ids != token] for row, live, prompt in rows]

    def fresh(self):
        return copy.deepcopy(self.theirs)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    return Base(request.param)


def difference(ours, theirs):
    scale = max(np.abs(row).max() for row in theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a[:, : b.shape[1]] - b).max()) for a, b in pairs) / scale


def moved(adapted):
    """After some training: what is trained has other values."""
    trained, frozen = partition(*adapted)
    for i, (path, leaf) in enumerate(sorted(trained.items())):
        noise = np.random.default_rng(i).normal(size=leaf.shape)
        trained[path] = jnp.asarray(leaf + 0.1 * noise, jnp.float32)
    return combine(trained, frozen, adapted.params)


@pytest.mark.parametrize("name", ["rslora", "dora"])
def test_peft_reads_ours(base, name, tmp_path):
    """On encoder and decoder; a connector with an adapter, or trained itself and saved whole."""
    whole = name == "dora" or base.family.name == "gemma3"  # Its connector is no Linear.
    targets = ("decoder", "encoder") if whole else ("decoder", "encoder", "connector")
    config = AdaptConfig(
        name=name, rank=3, alpha=5.0, targets=targets, train="connector" if whole else ()
    )
    adapted = prepare(base.params, config, base.model)
    params = moved(adapted)
    save_adapter(tmp_path, *base.whole, params, base_name="us/base", trainable=adapted.trainable)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "us/base"
    assert bool(settings["modules_to_save"]) == whole and settings["use_dora"] == (name == "dora")
    model = peft.PeftModel.from_pretrained(base.fresh(), tmp_path).eval()
    theirs = base.reference(model)
    assert difference(base.ours(params), theirs) < TOLERANCE
    assert difference(base.ours(base.params), theirs) > 1e-2
    # And we read what we have written.
    again = load_adapter(tmp_path, *base.whole, base.params)
    assert difference(base.ours(again), theirs) < TOLERANCE


def peft_adapter(base, folder, **fields):
    """PEFT's own adapter with random factors, saved -> its model."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base.fresh(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "magnitude" not in name else 0.02
                weight.add_(scale * torch.randn_like(weight))
            elif "modules_to_save" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


SETTINGS = {
    "lora": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.v_proj": 20}),
    "dora": dict(use_dora=True, use_rslora=True),
}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_we_read_pefts(base, kind, tmp_path):
    """Ranks and alphas for some modules; equal logits, and each merged weight equal."""
    fields = dict(r=4, lora_alpha=6, target_modules=LINEARS, **SETTINGS[kind])
    if kind == "lora":
        norms = ["norm"] if base.family.name == "smolvlm" else None
        fields["modules_to_save"] = norms
    model = peft_adapter(base, tmp_path, **fields)
    params = load_adapter(tmp_path, *base.whole, base.params)
    is_form = lambda leaf: isinstance(leaf, LoRA | DoRA)  # noqa: E731
    forms = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_form) if is_form(leaf)]
    assert forms and all(isinstance(form, DoRA) == (kind == "dora") for form in forms)
    theirs = base.reference(model)
    assert difference(base.ours(params), theirs) < TOLERANCE
    assert difference(base.ours(base.params), theirs) > 1e-2
    plain, modules = merge(params), Modules(*base.whole)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain)
    }

    def parameter(path):
        prefix, layer, rest = load.in_stack(path)
        return flat[path] if layer is None else flat[f"{prefix}/{rest}"][layer]

    merged = model.merge_and_unload().state_dict()
    compared = 0
    for name in modules.names.tensors():
        ours, other = modules.names.assemble(name, parameter), merged[modules.in_memory(name)]
        np.testing.assert_allclose(ours, other.numpy(), atol=2e-6 * (1 + np.abs(ours).max()))
        compared += 1
    assert compared == len(modules.names.tensors())


# What older versions of transformers called the modules: to 4.51, and from 4.52 on.
OLDER = {
    "llava": [
        ((r"^model\.language_model\.", "language_model.model."),),
        ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
    ],
    "qwen_vl": [
        ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    ],
}
OLDER["llava"][0] += (
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)
OLDER["paligemma"] = OLDER["gemma3"] = OLDER["llava"]
OLDER["internvl"] = [
    (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    )
]


def test_names_of_older_versions(base, tmp_path):
    peft_adapter(base, tmp_path, r=2, target_modules=LINEARS)
    expected = load_adapter(tmp_path, *base.whole, base.params)
    tensors = load_file(tmp_path / WEIGHTS)
    for renames in OLDER.get(base.family.name, []):

        def older(name, renames=renames):
            name = name.removeprefix("base_model.model.")
            for pattern, replacement in renames:
                changed, count = re.subn(pattern, replacement, name)
                if count:
                    return f"base_model.model.{changed}"
            return f"base_model.model.{name}"

        names = {older(name): value for name, value in tensors.items()}
        assert set(names) != set(tensors) and len(names) == len(tensors)
        save_file(names, tmp_path / WEIGHTS)
        found = load_adapter(tmp_path, *base.whole, base.params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_some_layers_alone(tmp_path):
    """In split form the other layers stay plain, in a stack they get zeros."""
    base = Base("llava")
    model = peft_adapter(
        base,
        tmp_path,
        r=2,
        target_modules=["q_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
        use_dora=True,
    )
    theirs = base.reference(model)
    split = load.load_parameters(base.source)
    for params in (base.params, split):
        adapted = load_adapter(tmp_path, *base.whole, params)
        assert difference(base.ours(adapted), theirs) < TOLERANCE
    query = lambda i: adapted["language"]["layers"][i]["attention"]["query"]["kernel"]  # noqa: E731
    assert isinstance(query("1"), DoRA) and not isinstance(query("0"), DoRA)
