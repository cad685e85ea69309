"""Presets: parameter counts, FLOPs and token counts of the published models, without weights."""

import json
import math
import subprocess
import sys

import pytest

from efficient_vlm.costs import flops
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets, published
from efficient_vlm.families.architecture import build_model, name_map, parameter_shapes
from efficient_vlm.families.table import family_of
from efficient_vlm.models.vlm import VisionLanguageModel

# Encoder and decoder TFLOPs with 64 text tokens, and KV KiB a token, counted independently from the
# published configurations (connector and head left out).
COSTS = {
    "llava-1.5-7b": (576, 0.37, 8.50, 512),
    "paligemma-3b-224": (256, 0.22, 1.28, 18),
    "paligemma-3b-448": (1024, 0.97, 4.49, 18),
    "paligemma-3b-896": (4096, 5.46, 19.0, 18),
    "smolvlm-256m": (832, 2.78, 0.25, 22.5),
    "qwen2-vl-2b": (999, 7.65, 2.98, 28),
}


def build(name):
    return VisionLanguageModel(**presets.get(name)["model"])


def count(name: str) -> dict[str, int]:
    """Parameters of a published checkpoint, counted on our model without allocating any.

    Tied tables count once; tensors that the checkpoint holds and no parameter of ours is made of
    are added from the table (`unused`). Active are those that one token uses: `top_k` of the
    experts of each mixture.
    """
    entry = published.get(name)
    config = entry["config"]
    model = build_model(config)
    sizes = {path: math.prod(leaf.shape) for path, leaf in parameter_shapes(model).items()}
    used = name_map(family_of(config), config, model).tensors()
    unread = sum(
        size for part, size in entry["unused"].items() if not any(part in tensor for tensor in used)
    )
    total = sum(sizes.values()) + unread
    moe, idle = model.decoder.get("moe"), 0
    if moe:
        parts = ("moe/gate", "moe/up", "moe/down")
        experts = sum(size for path, size in sizes.items() if path.endswith(parts))
        idle = experts * (moe["num_experts"] - moe["top_k"]) // moe["num_experts"]
    return {"params": total, "params_active": total - idle}


@pytest.mark.parametrize("name", presets.names())
def test_parameters_of_the_published_model(name):
    """To the unit. The table's numbers are counted apart: tests/parity/test_published_counts.py."""
    entry = published.get(name)
    active = entry["params_active"] or entry["params"]
    assert count(name) == {"params": entry["params"], "params_active": active}


@pytest.mark.parametrize("name", COSTS)
def test_tokens_flops_and_kv_bytes(name):
    preset = presets.get(name)
    visual, encoder, decoder, kib = COSTS[name]
    cost = flops.model_cost(
        build(name), text_tokens=preset["text_tokens"], new_tokens=0, images=preset["images"]
    )
    assert preset["text_tokens"] == 64
    assert cost.visual_tokens == visual == preset["visual_tokens"]
    assert cost.flops["encoder"] / 1e12 == pytest.approx(encoder, abs=0.011)
    assert cost.flops["decoder"] / 1e12 == pytest.approx(decoder, rel=5e-3, abs=0.006)
    assert cost.kv_bytes == (visual + 64) * kib * 1024


@pytest.mark.parametrize("name", presets.visual_names())
def test_visual_tokens_of_the_default_picture(name):
    """Images times the tokens of each are the published tokens, but where crops overlap."""
    preset = presets.get(name)
    rows, columns = build(name).slot_grid
    computed = preset["images"] * rows * columns
    overlap = {"molmo": 13 * 144, "molmo2": 7 * 196}.get(preset["family"])
    assert computed == (overlap or preset["visual_tokens"])
    assert (preset["pooled"] == preset["visual_tokens"]) is (preset["family"] == "molmo2")


@pytest.mark.parametrize("name", ["molmo-7b-d", "molmoe-1b"])
def test_molmo(name):
    """13 crops cost 4.76 TFLOPs in 23 layers; the features are those of layers 15 and 22."""
    cost = flops.model_cost(build(name), text_tokens=64, images=13)
    assert cost.flops["encoder"] / 1e12 == pytest.approx(4.76 * 22 / 23, abs=0.01)
    # The decoder at the 1152 visual tokens of a picture of 768 x 1024, whose crops overlap, the 44
    # that mark its rows and crops, and 64 of text.
    decoder, length = build(name).make_decoder(), 1152 + 44 + 64
    total = decoder.num_layers * flops.layer_flops(decoder, length, length) / 1e12
    assert total == pytest.approx({"molmo-7b-d": 17.1, "molmoe-1b": 2.92}[name], rel=5e-3)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "mobilevlm-1.7b"])
def test_clip_runs_23_layers_with_a_class_token(name):
    cost = flops.model_cost(build(name), text_tokens=1)
    assert [layer.attention for layer in cost.encoder_layers] == [577] * 23


def test_a_picture_near_its_own_size():
    """768 x 1024 in whole tokens of 28 x 28 pixels, and of 32 x 32."""
    assert presets.get("qwen2-vl-2b")["model"]["encoder"]["image_size"] == (756, 1036)
    assert presets.get("qwen3-vl-8b")["model"]["encoder"]["image_size"] == (768, 1024)
    assert build("qwen3-vl-8b").make_encoder().position_grid == (48, 48)


def test_a_preset_is_a_copy():
    preset = presets.get("llava-1.5-7b")
    preset["model"]["encoder"]["depth"] = 1
    assert presets.get("llava-1.5-7b")["model"]["encoder"]["depth"] == 24
    assert presets.get("llava-1.5-13b")["model"]["encoder"]["depth"] == 24


def test_unknown_preset():
    with pytest.raises(UserError, match="did you mean 'llava-1.5-7b'") as caught:
        presets.get("llava-1.5-7")
    assert len(str(caught.value).splitlines()) <= 3


def test_the_table_needs_no_jax():
    code = (
        "import sys; from efficient_vlm.cli.presets import presets_command;"
        "code = presets_command(as_json=True); assert 'jax' not in sys.modules; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    rows = {row["name"]: row for row in json.loads(run.stdout)}
    assert tuple(rows) == published.names()
    assert rows["molmoe-1b"]["params_active"] == 1_584_731_136
    assert rows["smolvlm-256m"]["visual_tokens"] == 832 and rows["smolvlm-256m"]["images"] == 13
    assert rows["phi-2"]["visual_tokens"] is None and rows["phi-2"]["context"] == 2048


def test_the_table_for_people(capsys):
    from efficient_vlm.cli.presets import presets_command

    assert presets_command(as_json=False) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in published.names())
    assert max(map(len, out.splitlines())) <= 110
