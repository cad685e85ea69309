"""Presets: parameter counts, FLOPs and token counts of the published models, without weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.audit import flops
from efficient_vlm.errors import UserError
from efficient_vlm.models import presets
from efficient_vlm.models.vlm import VisionLanguageModel

# Published parameters. Ours and MISSING come to exactly these.
PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "smolvlm-256m": 256_484_928,
    "paligemma-3b-224": 2_923_466_480,
    "paligemma-3b-448": 2_924_351_216,
    "paligemma-3b-896": 2_927_890_160,
    "qwen2-vl-2b": 2_208_985_600,
    "molmo-7b-d": 8_021_025_280,
    "molmoe-1b": 7_221_875_712,
}


def encoder_biases(width, mlp_dim):
    """Of one layer: four of attention, two of the MLP, the shifts of two LayerNorms."""
    return 4 * width + mlp_dim + width + 2 * width


# CLIP runs 23 layers of 24 here. Beside biases: a position for CLS, the LayerNorm in front.
CLIP = 23 * encoder_biases(1024, 4096) + 1024 + 2 * 1024
CLIP_LAST_LAYER = 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 1024 + encoder_biases(1024, 4096)
# SigLIP: biases of the layers, of the last LayerNorm and of the patch embedding.
SIGLIP = 27 * encoder_biases(1152, 4304) + 2 * 1152
# Molmo: no LayerNorm behind its CLIP; the pooling's input is two layers side by side, so its
# query, key and value matrices are 2048 wide; two embeddings of that width mark padding.
MOLMO = CLIP - 1024 + 3 * 1024 * 1024 + 2 * 2048
MISSING = {
    # LLaVA's files hold the layer that is not run; the shift of the LayerNorm behind it, the
    # projector's two biases.
    "llava-1.5-7b": CLIP + CLIP_LAST_LAYER + 1024 + 2 * 4096,
    "llava-1.5-13b": CLIP + CLIP_LAST_LAYER + 1024 + 2 * 5120,
    "smolvlm-256m": 12 * encoder_biases(768, 3072) + 2 * 768,
    **{f"paligemma-3b-{size}": SIGLIP + 2048 for size in (224, 448, 896)},  # The projector's bias.
    # The merger's shift and biases, the second frame of the patch embedding, the biases of queries,
    # keys and values; less our position tables.
    "qwen2-vl-2b": 32 * encoder_biases(1280, 5120)
    + (1280 + 5120 + 1536)
    + 3 * 14 * 14 * 1280
    + 28 * (1536 + 2 * 256)
    - (54 + 74) * 1280,
    # 128 extra entries of the vocabulary, biases of queries, keys and values.
    "molmo-7b-d": MOLMO + 128 * 3584 + 28 * (3584 + 2 * 512),
    # 128 extra entries, norms of queries and keys over all heads at once, not of each.
    "molmoe-1b": MOLMO + 128 * 2048 + 16 * 2 * (2048 - 128),
}
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


@pytest.mark.parametrize("name", presets.names())
def test_parameters_of_the_published_model(name):
    model = build(name)
    size = model.encoder["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = jax.ShapeDtypeStruct((1, 1, height, width, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((1, 1, 4), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    present = jax.ShapeDtypeStruct((1, 1), bool)
    key = jax.random.key(0)
    found = jax.eval_shape(model.init, key, pixels, present, text, lengths, lengths)
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(found))
    assert total + MISSING[name] == PARAMETERS[name]


@pytest.mark.parametrize("name", COSTS)
def test_tokens_flops_and_kv_bytes(name):
    preset = presets.get(name)
    visual, encoder, decoder, kib = COSTS[name]
    cost = flops.model_cost(
        build(name), text_tokens=preset["text_tokens"], new_tokens=0, images=preset["images"]
    )
    assert preset["text_tokens"] == 64
    assert cost.visual_tokens == visual
    assert cost.flops["encoder"] / 1e12 == pytest.approx(encoder, abs=0.011)
    assert cost.flops["decoder"] / 1e12 == pytest.approx(decoder, rel=5e-3, abs=0.006)
    assert cost.kv_bytes == (visual + 64) * kib * 1024


@pytest.mark.parametrize("name", ["molmo-7b-d", "molmoe-1b"])
def test_molmo(name):
    """336 x 336 is two crops of 144 tokens; 13 crops cost 4.76 TFLOPs in the encoder."""
    preset = presets.get(name)
    assert (
        preset["images"] * 144
        == flops.model_cost(build(name), text_tokens=64, images=2).visual_tokens
    )
    many = flops.model_cost(build(name), text_tokens=64, images=13)
    assert many.flops["encoder"] / 1e12 == pytest.approx(4.76, abs=0.01)
    # The decoder at the 1152 visual tokens of a picture of 768 x 1024, whose crops overlap, the 44
    # that mark its rows and crops, and 64 of text.
    decoder, length = build(name).make_decoder(), 1152 + 44 + 64
    total = decoder.num_layers * flops.layer_flops(decoder, length, length) / 1e12
    assert total == pytest.approx({"molmo-7b-d": 17.1, "molmoe-1b": 2.92}[name], rel=5e-3)


@pytest.mark.parametrize("name", [n for n in presets.names() if "molmo" in n or "llava" in n])
def test_clip_runs_23_layers_with_a_class_token(name):
    cost = flops.model_cost(build(name), text_tokens=1)
    assert [layer.attention for layer in cost.encoder_layers] == [577] * 23


def test_a_preset_is_a_copy():
    preset = presets.get("llava-1.5-7b")
    preset["model"]["encoder"]["depth"] = 1
    assert presets.get("llava-1.5-7b")["model"]["encoder"]["depth"] == 23
    assert presets.get("llava-1.5-13b")["model"]["encoder"]["depth"] == 23


def test_unknown_preset():
    with pytest.raises(UserError, match="did you mean 'llava-1.5-7b'") as caught:
        presets.get("llava-1.5-7")
    assert len(str(caught.value).splitlines()) <= 3
