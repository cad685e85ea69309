"""MobileVLM, which the reference library has no class for: a checkpoint with its names, and what it
computes, from a CLIP tower, a projector written from the papers' formulas, and a Llama.

python tests/parity/mobilevlm_reference.py tests/golden
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers as T
from cases_vision import square_pictures
from safetensors.torch import save_file
from tiny_torch import ODD, build, redraw, write_rows
from torch import nn
from torch.nn import functional as F

IMAGE = -200  # No row of the vocabulary.
SIDE, PATCH, WIDTH = 6, ODD.patch, 36
DECODER = ODD.hidden
SQUEEZED = 16  # A quarter of 48 is 12, which rounds to a multiple of 8.

NORM = ("weight", (DECODER,)), ("bias", (DECODER,))
BLOCK = {
    "0.0": (("weight", (DECODER, 1, 3, 3)),),
    "0.1": NORM,
    "1.fc1": (("weight", (SQUEEZED, DECODER, 1, 1)), ("bias", (SQUEEZED,))),
    "1.fc2": (("weight", (DECODER, SQUEEZED, 1, 1)), ("bias", (DECODER,))),
    "2.0": (("weight", (DECODER, DECODER, 1, 1)),),
    "2.1": NORM,
}


def linear(inputs):
    return ("weight", (DECODER, inputs)), ("bias", (DECODER,))


NAMES = {
    "ldpnet": {
        "model.mlp.1": linear(WIDTH),
        "model.mlp.3": linear(DECODER),
        **{f"model.mb_block.{i}.block.{k}": v for i in (1, 2) for k, v in BLOCK.items()},
    },
    "ldpnetv2": {
        "mlp.mlp.0": linear(WIDTH),
        "mlp.mlp.2": linear(DECODER),
        "peg.peg.0": (("weight", (DECODER, 1, 3, 3)), ("bias", (DECODER,))),
    },
}


def weights(kind):
    """Random weights of a projector; norms near 1, and no bias 0."""
    holder = nn.Module()
    for name, parts in NAMES[kind].items():
        for part, shape in parts:
            start = (
                torch.ones(shape) if part == "weight" and len(shape) == 1 else torch.zeros(shape)
            )
            flat = f"{name}.{part}".replace(".", "_")
            holder.register_parameter(flat, nn.Parameter(start))
    redraw(holder)
    drawn = dict(holder.named_parameters())
    return {
        f"{name}.{part}": drawn[f"{name}.{part}".replace(".", "_")].detach()
        for name, parts in NAMES[kind].items()
        for part, _ in parts
    }


def project(kind, w, x):
    """Patches [B, N, C] to tokens [B, N / 4, D] in float64, from the formulas of the papers."""
    w, x = {name: value.double() for name, value in w.items()}, x.double()

    def at(name):
        return w[f"{name}.weight"], w.get(f"{name}.bias")

    up, down = [name for name in NAMES[kind] if "mlp" in name]
    x = F.linear(F.gelu(F.linear(x, *at(up))), *at(down))
    x = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    if kind == "ldpnetv2":  # arXiv 2402.03766, eq. 3
        x = F.avg_pool2d(x, 2)
        x = x + F.conv2d(x, *at("peg.peg.0"), padding=1, groups=DECODER)
        return x.flatten(2).transpose(1, 2)

    def norm(x, name):
        return F.layer_norm(x.movedim(1, -1), (DECODER,), *at(name), eps=1e-5).movedim(-1, 1)

    for i, stride in ((1, 1), (2, 2)):  # arXiv 2312.16886, eq. 1
        name = f"model.mb_block.{i}.block."
        y = F.conv2d(x, *at(f"{name}0.0"), stride=stride, padding=1, groups=DECODER)
        y = F.hardswish(norm(y, f"{name}0.1"))
        gate = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), *at(f"{name}1.fc1")))
        y = y * F.hardsigmoid(F.conv2d(gate, *at(f"{name}1.fc2")))
        y = norm(F.conv2d(y, *at(f"{name}2.0")), f"{name}2.1")
        x = x + y if stride == 1 else y
    return x.flatten(2).transpose(1, 2)


class Parts(NamedTuple):
    """The modules of a model.

    Attributes:
      tower, llama: of the reference library.
      w: name -> weight of the projector.
    """

    kind: str
    tower: nn.Module
    llama: nn.Module
    w: dict[str, nn.Parameter]

    @classmethod
    def new(cls, kind):
        """With random weights."""
        vision = T.CLIPVisionConfig(
            **ODD.vision, **ODD.vision_eps, image_size=SIDE * PATCH, patch_size=PATCH
        )
        text = T.LlamaConfig(**ODD.text(tie_word_embeddings=False))
        w = {name: nn.Parameter(value) for name, value in weights(kind).items()}
        return cls(kind, build(T.CLIPVisionModel, vision), build(T.LlamaForCausalLM, text), w)

    def named(self):
        """Published name -> parameter."""
        named = dict(self.llama.named_parameters())
        for name, value in self.tower.named_parameters():
            name = name.removeprefix("vision_model.")
            named[f"model.vision_tower.vision_tower.vision_model.{name}"] = value
        return named | {f"model.mm_projector.{name}": value for name, value in self.w.items()}

    def features(self, images):
        """Visual tokens float32 [M, N, D] of pictures [M, 3, H, W]."""
        hidden = self.tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        return project(self.kind, self.w, hidden).float()

    def embeds(self, row, images):
        """What enters the decoder for token ids [L]: float32 [1, L, D]."""
        embeds = self.llama.get_input_embeddings()(row.clamp_min(0))
        if not len(images):
            return embeds[None]
        at = (row == IMAGE)[:, None].expand_as(embeds)
        return embeds.masked_scatter(at, self.features(images))[None]

    def logits(self, row, images):
        """float32 [L, vocab] of one row alone."""
        return self.llama(inputs_embeds=self.embeds(row, images)).logits[0]


def make(kind, folder, flat=False):
    """Writes a checkpoint to `folder`; returns its config, and what the reference computes."""
    parts = Parts.new(kind)
    vision, text = parts.tower.config, parts.llama.config
    tensors = {name: value.detach().contiguous() for name, value in parts.named().items()}
    save_file(tensors, folder / "model.safetensors")
    config = dict(model_type="mobilevlm", mm_projector_type=kind, vision_config=vision.to_dict())
    config |= text.to_dict() | config if flat else dict(text_config=text.to_dict())
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    rows = write_rows(ODD, picture=square_pictures(ODD, SIDE, SIDE**2 // 4))
    ids = [[IMAGE if token == ODD.image_id else token for token in row.ids] for row in rows]
    longest = max(map(len, ids))
    images = torch.stack([image for row in rows for image in row.images])
    with torch.no_grad():
        logits = torch.zeros(len(ids), longest, ODD.vocab)
        generated = {}
        for i, row in enumerate(ids):
            row = torch.tensor(row)
            own = images[sum(len(r.images) for r in rows[:i]) :][: len(rows[i].images)]
            logits[i, : len(row)] = parts.logits(row, own)
            more = parts.llama.generate(
                inputs_embeds=parts.embeds(row, own),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
            )
            key = "gen/tokens" if i == 0 else f"gen/tokens_{i}"
            generated[key] = np.concatenate([row.numpy()[None], more.numpy()], axis=1)
        features = parts.features(images)
    io = {
        "in/input_ids": np.array([row + [0] * (longest - len(row)) for row in ids]),
        "in/attention_mask": np.array([[1] * len(r) + [0] * (longest - len(r)) for r in ids]),
        "in/pixel_values": images.numpy(),
        "out/logits": logits.numpy(),
        "out/image_features": features.flatten(0, 1).numpy(),
        **generated,
    }
    np.savez_compressed(folder / "io.npz", **io)
    return config, io


if __name__ == "__main__":
    for kind, name in (("ldpnet", "mobilevlm"), ("ldpnetv2", "mobilevlm_v2")):
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        make(kind, folder)
