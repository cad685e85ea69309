"""From what the reference library saves to what is published.

Version 5 renames weights when it loads them and renames them back when it saves, but not wholly:
CLIP and SigLIP towers lose the level `vision_model.` they carry in published files, and Molmo2's
two tables of embeddings come back as two equal halves of their concatenation.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
NESTED = (r"^vision_tower\.", "vision_tower.vision_model.")
RENAMES = {
    "llava": NESTED,
    "paligemma": NESTED,
    "paligemma2": NESTED,
    "gemma3": NESTED,
    "lfm2_vl": (r"^model\.vision_tower\.", "model.vision_tower.vision_model."),
    "siglip_vision": (r"^", "vision_model."),
    "siglip2_naflex_vision": (r"^", "vision_model."),
    "clip_vision": (r"^", "vision_model."),
}


def restore_hub_layout(family: str, folder: Path, config) -> None:
    """Rewrite the saved weights (and the index of sharded ones) under their published names."""
    pattern, replacement = RENAMES.get(family, (r"^", ""))

    def rename(name):
        return re.sub(pattern, replacement, name)

    for path in folder.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
        if family.startswith("molmo2"):
            split_embeddings(tensors, config.text_config.vocab_size)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def split_embeddings(tensors: dict, vocab_size: int) -> None:
    """Divide Molmo2's embeddings into `vocab_size` rows and the additional ones, in place."""
    names = [f"model.transformer.wte.{name}" for name in ("embedding", "new_embedding")]
    table = torch.cat([tensors[name] for name in names])
    tensors[names[0]], tensors[names[1]] = table[:vocab_size], table[vocab_size:]


def to_version_4(config: dict) -> dict:
    """The same config as version 4 of the library, and so nearly every published file, spells it.

    `rope_parameters` were `rope_theta`, `rope_scaling` and `partial_rotary_factor`; Gemma 3 had
    `rope_local_base_freq` for its sliding layers; the text config of Qwen2-VL and Qwen2.5-VL lay
    flat beside `vision_config`; Qwen's windows went without `layer_types`; `dtype` was
    `torch_dtype`.
    """
    config = {
        key: to_version_4(value) if key.endswith("_config") else value
        for key, value in config.items()
    }
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if "max_window_layers" in config:
        config.pop("layer_types", None)
    rope = config.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        names = ("rope_theta", "partial_rotary_factor")
        config |= {name: rope[name] for name in names if name in rope}
        scaling = {name: value for name, value in rope.items() if name not in names}
        if "mrope_section" in scaling and not scaling.get("mrope_interleaved"):
            scaling = dict(type="mrope", mrope_section=scaling["mrope_section"])
        config["rope_scaling"] = None if scaling == dict(rope_type="default") else scaling
    if config.get("model_type") in ("qwen2_vl", "qwen2_5_vl"):
        text = config.pop("text_config")
        config = {key: value for key, value in text.items() if key != "model_type"} | config
    return config
