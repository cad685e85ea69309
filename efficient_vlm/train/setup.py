"""What a run is made of before its first step: settings, data, models and their step programs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.families.processor import Processor
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train.arms import Arm
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.optimizer import OptimizerConfig
from efficient_vlm.train.parameters import Start

__all__ = ["Setup"]


class Setup(NamedTuple):
    """What stays the same during a run.

    Attributes:
      settings, data, optimizer: the sections of the config.
      mesh: of the devices of all processes; None for one device.
      pipeline: the training data.
      model: as configured; the arms are this model at their own compressors and budgets.
      arms: the (compressor, budget) pairs that steps are drawn from.
      start: makes the first state.
      programs: the jitted step of each arm.
      compile_seconds: time spent compiling so far.
      inputs: from a batch of the pipeline to what a program reads.
      whole: from the parameters in a state to those of the model.
      total_params: parameters of the model; None where all are trained.
      processor: of a published model; None for one of our own.
    """

    settings: TrainConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: Mesh | None
    pipeline: Pipeline | ChatPipeline
    model: VisionLanguageModel
    arms: list[Arm]
    start: Start
    programs: list[Callable]
    compile_seconds: float
    inputs: Callable[[Any], ModelInputs]
    whole: Callable[[Any], Any] = lambda params: params
    processor: Processor | None = None
    total_params: int | None = None

    @property
    def num_params(self) -> int:
        """Parameters that are trained, those of all compressors included."""
        return sum(x.size for x in jax.tree.leaves(self.start.shapes["params"]))

    @property
    def compilations(self) -> dict[str, int]:
        """Label of an arm -> programs compiled for it; arms that were never drawn are left out."""
        counts = (program._cache_size() for program in self.programs)
        return {arm.label: n for arm, n in zip(self.arms, counts, strict=True) if n}
