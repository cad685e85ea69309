"""Files of PEFT's kind without PEFT: what is written, what comes back, what is refused.

Equality with PEFT itself is in tests/parity/test_adapters_parity.py.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficient_vlm.adapt.build import combine, merge, partition, prepare
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.forms import LoRA
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.errors import UserError
from efficient_vlm.families import architecture, load
from efficient_vlm.families.adapters import WEIGHTS, load_adapter, save_adapter
from efficient_vlm.families.table import family_of

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = "adapter_config.json"


def opened(name):
    """((family, config, model), parameters in split form as NumPy arrays) of a golden model."""
    config = architecture.read_config(GOLDEN / name)
    whole = family_of(config), config, architecture.build_model(config)
    source = load.FamilyCheckpoint(Checkpoint.open(GOLDEN / name), *whole)
    return whole, load.stacked(source, np.float32)


@pytest.fixture(scope="module")
def llava():
    return opened("llava")


def adapted(base, **fields):
    """Parameters with an adapter whose values are no zeros, and what is trained of them."""
    (*_, model), params = base
    made = prepare(params, AdaptConfig(rank=2, **fields), model)
    trained, frozen = partition(*made)
    trained = {
        path: jnp.asarray(np.random.default_rng(i).normal(size=leaf.shape), jnp.float32)
        for i, (path, leaf) in enumerate(sorted(trained.items()))
    }
    return combine(trained, frozen, made.params), made.trainable


@pytest.fixture
def written(llava, tmp_path):
    params, _ = adapted(llava, targets="attention")
    save_adapter(tmp_path, *llava[0], params, base_name="llava-hf/tiny")
    return tmp_path


def equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_what_is_written_comes_back(llava, tmp_path, name):
    params, flags = adapted(llava, name=name, targets=("decoder", "encoder"), train="connector")
    save_adapter(tmp_path, *llava[0], params, trainable=flags)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 2
    assert settings["use_dora"] == (name == "dora")
    # alpha / sqrt(r) of rsLoRA is (alpha * sqrt(r)) / r.
    alpha = 32 * 2**0.5 if name == "rslora" else 32
    assert settings["lora_alpha"] == pytest.approx(alpha)
    modules = [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    assert settings["modules_to_save"] == modules
    tensors = load_file(tmp_path / WEIGHTS)
    start = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    config = llava[0][1]["text_config"]
    assert tensors[f"{start}.lora_A.weight"].shape == (2, config["hidden_size"])
    assert f"base_model.model.{modules[0]}.bias" in tensors
    equal(merge(load_adapter(tmp_path, *llava[0], llava[1])), merge(params))


def test_a_fused_linear_is_one_adapter(tmp_path):
    """Queries and values of an encoder whose qkv is one Linear: ranks add up, keys stay."""
    base = opened("qwen2_5_vl")
    params, _ = adapted(base, targets=r"vit/layers/attention/(query|value)/")
    save_adapter(tmp_path, *base[0], params)
    tensors = load_file(tmp_path / WEIGHTS)
    (name,) = {re.sub(r"\.lora_.*", "", key) for key in tensors if "blocks.0." in key}
    assert name == "base_model.model.model.visual.blocks.0.attn.qkv"
    assert tensors[f"{name}.lora_A.weight"].shape[0] == 4
    b = tensors[f"{name}.lora_B.weight"]
    third = len(b) // 3
    assert not b[third : 2 * third].any() and not b[:third, 2:].any() and b[:third, :2].any()
    equal(merge(load_adapter(tmp_path, *base[0], base[1])), merge(params))


def test_layers_of_unlike_rank_and_scale(llava, written):
    """In a stack the smaller ones are filled with zeros; the result is that of each layer alone."""
    tensors, settings = load_file(written / WEIGHTS), json.loads((written / SETTINGS).read_text())
    name = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
    tensors[a], tensors[b] = tensors[a][:1], np.ascontiguousarray(tensors[b][:, :1])
    save_file(tensors, written / WEIGHTS)
    change(written, rank_pattern={"layers.0.self_attn.q_proj": 1}, alpha_pattern={name: 5})
    form = load_adapter(written, *llava[0], llava[1])
    form = form["language"]["layers"]["attention"]["query"]["kernel"]
    assert isinstance(form, LoRA) and form.a.shape[-1] == 2
    base = np.asarray(form.base[0])
    expected = base + 5 * (tensors[b] @ tensors[a]).T.reshape(base.shape)
    np.testing.assert_allclose(form.merged()[0], expected, atol=1e-4)
    assert settings["rank_pattern"] == {}


def change(folder, **fields):
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(peft_type="LOHA"), "peft_type='LOHA'"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base as well"),
        (dict(r="2"), "r='2'"),
        (dict(r=3), "has the rank 2"),
        (dict(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern=['q_proj']"),
        (dict(alpha_pattern={"q_proj": "8"}), "alpha_pattern={'q_proj': '8'}"),
        (dict(alpha_pattern={"q_proj(": 3}), "alpha_pattern: 'q_proj('"),
    ],
)
def test_settings_that_are_not_read(llava, written, fields, words):
    change(written, **fields)
    refused(llava, written, words)


def refused(base, folder, words):
    with pytest.raises(UserError) as error:
        load_adapter(folder, *base[0], base[1])
    text = str(error.value)
    assert words in text and text.count("\n") <= 2, text


def test_an_adapter_for_another_base(llava, written, tmp_path_factory):
    """Other names, other shapes: three lines that say which base it names."""
    other = opened("smolvlm")
    refused(other, written, "an adapter for another base")
    refused(other, written, "load it on its base, 'llava-hf/tiny'")
    tensors = load_file(written / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file({**tensors, name: tensors[name][:, 1:].copy()}, written / WEIGHTS)
    refused(llava, written, "has factors [2, ")
    save_file({k: v for k, v in tensors.items() if k != name}, written / WEIGHTS)
    refused(llava, written, "one factor of two")
    save_file({**tensors, name: tensors[name] * np.nan}, written / WEIGHTS)
    refused(llava, written, "NaN or Inf")
    refused(llava, tmp_path_factory.mktemp("empty"), "no adapter_config.json")


def test_what_peft_has_no_name_for(llava, tmp_path):
    cases = [
        (dict(targets="vit/embed/"), "but is no Linear of transformers"),
        (dict(name="prompt"), "learned tokens"),
        (dict(name="prefix"), "learned tokens"),
        (dict(name="full", train="connector"), "no product has an adapter"),
        (dict(targets="encoder", train="bias"), "is trained itself, and so is an adapter"),
    ]
    for fields, words in cases:
        params, flags = adapted(llava, **fields)
        with pytest.raises(UserError) as error:
            save_adapter(tmp_path, *llava[0], params, trainable=flags)
        assert words in str(error.value) and str(error.value).count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_experts_have_no_name(tmp_path):
    base = opened("olmoe")
    params, _ = adapted(base, targets="experts")
    with pytest.raises(UserError, match="export the merged model instead"):
        save_adapter(tmp_path, *base[0], params)
