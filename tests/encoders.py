"""Vision towers by themselves, against the last hidden state that the reference gave."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.families import vision
from efficient_vlm.models.encoder import ViT
from efficient_vlm.nn.stack import unstack


def check_encoder(folder: Path) -> None:
    """Features of a CLIP or SigLIP tower of `folder`, of all patches."""
    config = json.loads((folder / "config.json").read_text())
    is_clip = config["model_type"] == "clip_vision_model"
    fields = (vision.clip if is_clip else vision.siglip)(config)
    grid = (config["image_size"] // config["patch_size"],) * 2
    fields = {**fields, "pixel_mean": 0.0, "pixel_std": 1.0, "position_grid": grid}
    with np.load(folder / "io.npz") as io:
        pixels = io["in/pixel_values"].transpose(0, 2, 3, 1)
        wanted = io["out/last_hidden_state"]
    vit = ViT(**{**fields, "image_size": pixels.shape[1:3]})
    shapes = jax.eval_shape(lambda: unstack(vit.init(jax.random.key(0), pixels)["params"]))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(shapes), sep="/").items()}
    names = NameMap(shapes)
    tensors = vision.clip_tensors if is_clip else vision.siglip_tensors
    tensors(names, config, "vision_model.", path="")
    assert not names.missing()
    checkpoint = Checkpoint.open(folder)
    params = {path: np.empty(shapes[path], np.float32) for path in names.leaves}
    for path, leaf in names.leaves.items():
        leaf.read(checkpoint.read, params[path])
    features, _ = vit.apply({"params": unflatten_dict(params, sep="/")}, pixels)
    wanted = wanted[:, 1:] if is_clip else wanted
    np.testing.assert_allclose(features, wanted, atol=1e-4 * np.abs(wanted).max())
