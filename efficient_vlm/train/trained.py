"""What a run ends with, and what evaluation needs of it: fresh from training, or from its files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from efficient_vlm.checkpoints.leaves import state_sha256
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.families.processor import Processor
from efficient_vlm.fields import construct, section
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.sharding import param_shardings
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import make_arms, make_model
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.parameters import load_params
from efficient_vlm.train.processes import agreed

__all__ = ["Trained", "digests", "restore"]


@dataclasses.dataclass
class Trained:
    """What evaluation needs of a finished run.

    Attributes:
      model, params: the model, and its parameters (the average, if there is one).
      mesh: that the parameters lie on, of the devices of all processes; None for one device.
      pipeline: the training data, for tokenizer and tasks.
      summary: the "train" part of results.json.
      processor: of a published model; None for one of our own.
    """

    model: VisionLanguageModel
    params: Any
    mesh: Mesh | None
    pipeline: Pipeline | ChatPipeline
    summary: dict[str, Any]
    processor: Processor | None = None


def digests(
    state: steps.State, step: int, workdir: Path, warn: Callable[[str], None]
) -> dict[str, str]:
    """Digests of a state that has been saved: they say whether two runs would go on alike.

    Of several processes, which all call this, only the first gets anything: it reads what all have
    written, since no device may have room for a whole leaf.

    Returns:
      {"params_sha256": text, "state_sha256": text}.
    """

    def both(of: Callable[[str], str]) -> dict[str, str]:
        return {"params_sha256": of("params"), "state_sha256": of("")}

    if jax.process_count() == 1:
        return both(lambda part: state_sha256(state[part] if part else state))

    def read() -> dict[str, str]:
        with Checkpoints(workdir / "checkpoints", read_only=True, warn=warn) as checkpoints:
            return both(lambda part: checkpoints.sha256(step, part))

    return agreed(read) or {}


def restore(
    config: Mapping[str, Any], workdir: Path, pipeline: Pipeline, mesh: Mesh | None = None
) -> Trained:
    """The model of a run and its newest parameters, for evaluation, where they lie on a mesh."""
    settings = construct(TrainConfig, section(config, "train"), "train")
    model = make_model(config, pipeline.tokenizer.vocab_size)
    arms = make_arms(model, settings.elastic)
    boxed = jax.eval_shape(lambda: steps.init_params([arm.model for arm in arms], 0))
    like = nn.unbox(boxed)
    if mesh is not None:
        places = param_shardings(boxed, mesh)
        like = jax.tree.map(lambda x, at: x.update(sharding=at), like, places)
    name = "params" if settings.ema is None else "ema"
    return Trained(model, load_params(workdir, like, name), mesh, pipeline, {})
