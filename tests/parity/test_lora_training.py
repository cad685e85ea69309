"""Training of low-rank adapters beside peft: the same factors, losses, gradients and AdamW."""

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import jax.numpy as jnp
import numpy as np
import peft
import torch
import training_reference as reference
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from test_training import check_gradients, check_weights
from training_steps import GOLDEN, open_golden, train

from efficient_vlm.adapt.build import combine, partition, prepare
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.families.architecture import build_model, name_map

pytestmark = pytest.mark.parity

RANK, ALPHA = 3, 5.0
# The products of the decoder; modules of the encoders have other names or stand elsewhere.
TARGETS = r".*(text_model|language_model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
PRODUCT = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.\w+_proj")


class Peft:
    """A golden model with adapters on all products of its decoder, and its loss."""

    def __init__(self, name):
        subject = reference.open_library(name)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS,
            # Random: with a B of 0, A would have no gradient.
            init_lora_weights=False,
        )
        torch.manual_seed(0)
        # Layers are replaced in place, so the loss is that of the adapted model.
        model = peft.get_peft_model(subject.model, config)
        self.loss = subject.loss
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in self.trained)

    def factors(self, value):
        """("layers.0.self_attn.q_proj", "a" or "b") -> value(parameter), transposed."""
        found = {}
        for name, parameter in self.trained.items():
            (product,) = PRODUCT.findall(name)
            part = "a" if "lora_A" in name else "b"
            found[product, part] = value(parameter).detach().numpy().T.copy()
        return found

    def train(self):
        """Losses, factors before, gradients of the first step, factors after the last."""
        adamw = reference.ADAMW
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=adamw["learning_rate"],
            betas=(adamw["b1"], adamw["b2"]),
            eps=adamw["eps"],
            weight_decay=adamw["weight_decay"],
        )
        before, losses, gradients = self.factors(lambda p: p), [], None
        for _ in range(reference.STEPS):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            losses.append(float(loss.detach()))
            gradients = gradients or self.factors(lambda p: p.grad)
            optimizer.step()
        return losses, before, gradients, self.factors(lambda p: p)


def layers_of(names, factors, like):
    """Factors as ours, of each layer its own: ".../layers/0/attention/query/kernel/a" -> array.

    Args:
      names: the name map, which says what a product is called.
      factors: see `Peft.factors`.
      like: path -> our array of all layers.
    """
    found = {}
    for path, array in like.items():
        product, _, part = path.rpartition("/")
        for layer in range(len(array)):
            own = product.replace("language/layers", f"language/layers/{layer}")
            (piece,) = names.leaves[own].pieces
            (name,) = PRODUCT.findall(piece.name)
            found[f"{own}/{part}"] = factors[name, part].reshape(array.shape[1:])
    return found


def by_layer(tree):
    return {
        path.replace("language/layers", f"language/layers/{layer}"): np.asarray(array[layer])
        for path, array in flatten_dict(tree, sep="/").items()
        for layer in range(len(array))
    }


@pytest.mark.parametrize("name", ["smolvlm", "llava", "qwen2_5_vl"])
def test_adapters_are_trained_as_by_peft(name):
    golden = open_golden(name, reference.ANSWER)
    config = AdaptConfig(name="lora", rank=RANK, alpha=ALPHA, targets="decoder")
    adapted = prepare(golden.read(GOLDEN / name), config, golden.model)
    trained, frozen = partition(adapted.params, adapted.trainable)
    names = name_map(golden.family, golden.config, build_model(golden.config))

    losses, before, gradients, after = Peft(name).train()
    assert len(before) == sum(len(array) for array in trained.values())
    start = layers_of(names, before, trained)
    params = {
        path: jnp.stack(
            [
                start[path.replace("language/layers", f"language/layers/{layer}")]
                for layer in range(len(array))
            ]
        )
        for path, array in trained.items()
    }
    like = nn.unbox(adapted.params)

    def whole(own, frozen):
        return combine(flatten_dict(own, sep="/"), frozen, like)

    ours = train(
        golden.model,
        unflatten_dict(params, sep="/"),
        golden.inputs,
        reference.STEPS,
        reference.ADAMW,
        tuning=(whole, frozen),
    )
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    check_gradients(by_layer(ours.gradient), layers_of(names, gradients, trained))
    check_weights(by_layer(ours.params), layers_of(names, after, trained), start)
