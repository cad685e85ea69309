"""What a run ends with, and what evaluation needs of it: fresh from training, or from its files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from efficient_vlm import config as configs
from efficient_vlm.data import transforms
from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.models.build import construct
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import make_arms, make_model
from efficient_vlm.train.checkpoint import Checkpoints
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.leaves import state_sha256
from efficient_vlm.train.parameters import load_params
from efficient_vlm.train.processes import agreed

__all__ = ["Trained", "outcome", "restore"]


@dataclasses.dataclass
class Trained:
    """What evaluation needs of a finished run.

    Attributes:
      model, params: the model, and its parameters (the average, if there is one); of several
        processes only the first has them, in host memory.
      pipeline: the training data, for tokenizer and tasks.
      summary: the "train" part of results.json.
    """

    model: VisionLanguageModel
    params: Any
    pipeline: Pipeline
    summary: dict[str, Any]


def outcome(
    state: steps.State, workdir: Path, warn: Callable[[str], None]
) -> tuple[dict[str, str], Any]:
    """Digests of a state whose step has been saved, and its parameters, averaged if they are.

    The digests, "params_sha256" and "state_sha256", say whether two runs would go on alike. Of
    several processes, which all call this, only the first gets anything: it reads what all have
    written, since no device may have room for a whole leaf.
    """
    name = "ema" if "ema" in state else "params"

    def digests(of: Callable[[str], str]) -> dict[str, str]:
        return {"params_sha256": of("params"), "state_sha256": of("")}

    if jax.process_count() == 1:
        return digests(lambda part: state_sha256(state[part] if part else state)), state[name]

    def read() -> tuple[dict[str, str], Any]:
        like = jax.tree.map(lambda x: np.broadcast_to(np.empty((), x.dtype), x.shape), state[name])
        with Checkpoints(workdir / "checkpoints", read_only=True, warn=warn) as checkpoints:
            restored = checkpoints.restore_latest({name: like}, subset=True)
            if restored is None:
                raise RuntimeError("no checkpoint of a run that has just written one")
            step, held, _ = restored
            return digests(lambda part: checkpoints.sha256(step, part)), held[name]

    return agreed(read) or ({}, None)


def restore(config: Mapping[str, Any], workdir: Path, pipeline: Pipeline) -> Trained:
    """The model of a run and its newest parameters, for evaluation."""
    settings = construct(TrainConfig, configs.section(config, "train"), "train")
    model = make_model(config, pipeline.tokenizer.vocab_size)
    example = transforms.empty(pipeline.spec, pipeline.tokenizer.pad_id)
    boxed = jax.eval_shape(
        lambda: steps.init_params(
            [arm.model for arm in make_arms(model, settings.elastic)],
            transforms.stack([example]),
            0,
        )
    )
    name = "params" if settings.ema is None else "ema"
    return Trained(model, load_params(workdir, nn.unbox(boxed), name), pipeline, {})
