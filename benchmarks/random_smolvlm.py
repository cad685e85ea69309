"""A checkpoint in the geometry of SmolVLM-256M as a hub has it: random weights, made-up words.

It needs neither torch nor transformers, and no network. The longer edge of a picture becomes 1024
pixels, so that a square one is cut into four tiles and has the whole as a fifth.
"""

import json
import math
from pathlib import Path

import numpy as np

VOCABULARY, IMAGE, END = 49_280, 49_190, 49_279
NORMS = ("input_layernorm", "post_attention_layernorm")


def tensors(vision_layers: int, text_layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor; those of one axis are scales and biases."""
    wide, deep, narrow = 768, 3072, 576
    vision, text = "model.vision_model.", "model.text_model."
    found = {
        f"{vision}embeddings.patch_embedding.weight": (wide, 3, 16, 16),
        f"{vision}embeddings.patch_embedding.bias": (wide,),
        f"{vision}embeddings.position_embedding.weight": (1024, wide),
        f"{vision}post_layernorm.weight": (wide,),
        f"{vision}post_layernorm.bias": (wide,),
        "model.connector.modality_projection.proj.weight": (narrow, 16 * wide),
        f"{text}embed_tokens.weight": (VOCABULARY, narrow),
        f"{text}norm.weight": (narrow,),
        "lm_head.weight": (VOCABULARY, narrow),
    }
    linear = {f"self_attn.{name}_proj": (wide, wide) for name in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (deep, wide), "mlp.fc2": (wide, deep)}
    for layer in range(vision_layers):
        at = f"{vision}encoder.layers.{layer}."
        for name, shape in linear.items():
            found |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{at}{name}.weight": (wide,), f"{at}{name}.bias": (wide,)}
    linear = {f"self_attn.{name}_proj": (narrow, narrow) for name in ("q", "o")}
    linear |= {f"self_attn.{name}_proj": (192, narrow) for name in ("k", "v")}
    linear |= {"mlp.gate_proj": (1536, narrow), "mlp.up_proj": (1536, narrow)}
    linear |= {"mlp.down_proj": (narrow, 1536)}
    for layer in range(text_layers):
        at = f"{text}layers.{layer}."
        found |= {f"{at}{name}.weight": shape for name, shape in linear.items()}
        found |= {f"{at}{name}.weight": (narrow,) for name in NORMS}
    return found


def settings(vision_layers: int, text_layers: int) -> dict[str, dict]:
    """File -> content."""
    text = dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, vocab_size=VOCABULARY)
    text |= dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=text_layers)
    text |= dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, mlp_bias=False)
    text |= dict(max_position_embeddings=8192, attention_bias=False, tie_word_embeddings=False)
    text |= dict(rope_parameters=dict(rope_theta=100_000.0, rope_type="default"))
    vision = dict(model_type="idefics3_vision", hidden_act="gelu_pytorch_tanh")
    vision |= dict(layer_norm_eps=1e-6, hidden_size=768, intermediate_size=3072, num_channels=3)
    vision |= dict(num_hidden_layers=vision_layers, num_attention_heads=12)
    vision |= dict(image_size=512, patch_size=16)
    config = dict(model_type="idefics3", image_token_id=IMAGE, scale_factor=4)
    config |= dict(tie_word_embeddings=False, text_config=text, vision_config=vision)
    pictures = dict(size=dict(longest_edge=1024), max_image_size=dict(longest_edge=512))
    pictures |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_image_splitting=True)
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token |= dict(id=IMAGE, content="<image>", special=True)
    words = {f"w{i}": i for i in range(VOCABULARY) if i != IMAGE} | {"<image>": IMAGE}
    tokenizer = dict(version="1.0", pre_tokenizer=dict(type="Whitespace"), added_tokens=[token])
    tokenizer |= dict(model=dict(type="WordLevel", vocab=words, unk_token="w3"))
    return {
        "config.json": config,
        "preprocessor_config.json": pictures,
        "tokenizer.json": tokenizer,
        "generation_config.json": dict(eos_token_id=END),
    }


def write_checkpoint(folder: Path, vision_layers: int, text_layers: int) -> None:
    """Random weights in float32, a tensor at a time, and what lies beside them.

    Args:
      folder: to make.
      vision_layers, text_layers: 12 and 30 in SmolVLM-256M.
    """
    folder.mkdir(parents=True)
    for name, content in settings(vision_layers, text_layers).items():
        (folder / name).write_text(json.dumps(content))
    header, at = {}, 0
    shapes = tensors(vision_layers, text_layers)
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[at, end])
        at = end
    rng, text = np.random.default_rng(0), json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write(values + np.float32(len(shape) == 1 and name.endswith("weight")))
