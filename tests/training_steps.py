"""The training step on the inputs of golden files, for tests beside a reference and without one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import verify
from efficient_vlm.families import architecture, load
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.table import family_of
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.stack import unstack
from efficient_vlm.train import step as steps

GOLDEN = Path(__file__).parent / "golden"
ENCODERS = ("clip_vision", "siglip_vision")
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name not in ENCODERS)


class Golden(NamedTuple):
    """A golden model with its batch.

    Attributes:
      model: at the size of its pictures.
      inputs: with labels.
    """

    family: Family
    config: Config
    model: VisionLanguageModel
    inputs: ModelInputs

    def read(self, folder: Path) -> dict[str, Any]:
        """Parameters of a checkpoint of this model, stacked, float32."""
        plain = architecture.build_model(self.config)
        source = load.FamilyCheckpoint(Checkpoint.open(folder), self.family, self.config, plain)
        return jax.tree.map(jnp.asarray, load.stacked(source, np.float32))


def open_golden(name: str, answer: int) -> Golden:
    """The inputs of io.npz, of which the last `answer` tokens of each row are to be predicted."""
    config = architecture.read_config(GOLDEN / name)
    family, model = family_of(config), architecture.build_model(config)
    with np.load(GOLDEN / name / "io.npz") as io:
        inputs = verify.read_inputs(family, config, model, io)
    prompts = [
        prompt._replace(targets=np.arange(len(prompt.ids)) >= len(prompt.ids) - answer)
        for prompt in inputs.prompts
    ]
    inputs = inputs._replace(prompts=prompts)
    return Golden(family, config, inputs.model, inputs.placed())


def recorded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the gradient that it was last given as the first part of its state."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), tx.init(params)

    def update(grads, state, params):
        updates, inner = tx.update(grads, state[1], params)
        return updates, (grads, inner)

    return optax.GradientTransformation(init, update)


class Trained(NamedTuple):
    """Attributes:
    losses, norms: of each step.
    gradient: of the first step.
    params: after the last.
    """

    losses: list[float]
    norms: list[float]
    gradient: Any
    params: Any


def train(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    count: int,
    adamw: Mapping[str, float],
    tuning: Any = None,
) -> Trained:
    """`count` steps of AdamW on one batch, by the step of training runs; decays everything."""
    tx = recorded(optax.adamw(**adamw))
    given = {}
    if tuning is not None:
        whole, given["frozen"] = tuning

        def objective(trained, frozen, inputs, rng):
            return steps.loss_fn(model, whole(trained, frozen), inputs, rng, {})

        given["objective"] = objective
    step = steps.make_train_step(model, tx, **given)
    state = steps.init_state(jax.tree.map(jnp.copy, params), tx)
    losses, norms, gradient = [], [], None
    for _ in range(count):
        state, metrics = step(state, inputs)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if gradient is None:
            gradient = jax.tree.map(np.asarray, state["opt"][0])
    return Trained(losses, norms, gradient, state["params"])


def by_layer(params: Any) -> dict[str, np.ndarray]:
    """Path -> array, of each layer its own, float64."""
    flat = flatten_dict(jax.tree.map(np.asarray, unstack(params)), sep="/")
    return {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
