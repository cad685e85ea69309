"""What `test_sharded_adapters.py` runs in a process with eight CPU devices."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tiny_models import DECODER, MOE, VOCAB

from efficient_vlm import sharding
from efficient_vlm.adapt.build import combine, partition, prepare
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.models.init import boxed_parameters, init_params
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel


def run(adapt, mesh, capacity=None):
    """Largest difference of loss and gradients between a mesh and one device, and what is cut."""
    decoder = {**DECODER, "segments": [dict(layers=1)], "moe": {**MOE, "capacity": capacity}}
    model = VisionLanguageModel(
        vocab_size=VOCAB, encoder=None, compressor=dict(name="none"), decoder=decoder
    )
    config = AdaptConfig(rank=2, targets=("experts", "decoder"), **adapt)
    boxed = prepare(boxed_parameters(model), config)
    params = nn.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))
    trained, frozen = partition(*prepare(params, config, model))
    noise = np.random.default_rng(0)
    trained = {
        path: leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in sorted(trained.items())
    }
    text = noise.integers(2, VOCAB, (8, 6)).astype(np.int32)
    inputs = ModelInputs.of_rows(text, np.full(8, 6))

    def loss(trained, frozen, inputs):
        whole = combine(trained, frozen, boxed.params)
        logits = model.apply({"params": whole}, inputs).logits
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(trained, frozen, inputs)
    devices = sharding.make_mesh(sharding.MeshConfig(**mesh))
    parts = partition(*boxed)
    places = [sharding.param_shardings(part, devices) for part in parts]
    placed = [
        {path: jax.device_put(leaf, place[path]) for path, leaf in part.items()}
        for part, place in zip((trained, frozen), places, strict=True)
    ]
    with sharding.active(devices):
        given = sharding.global_batch(inputs, devices)
        found = jax.jit(jax.value_and_grad(loss))(*placed, given)
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(b).max() + 1e-9)),
        found,
        expected,
    )
    cut = [path for path, place in places[0].items() if any(place.spec)]
    return max(jax.tree.leaves(differences)), len(cut), len(places[0])


if __name__ == "__main__":
    print(json.dumps([run(**job) for job in json.loads(sys.argv[1])]))
