"""What a config says of training, and what can be checked of it without data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from efficient_vlm import sharding
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.checks import flag, number_fields, whole
from efficient_vlm.data.config import DataConfig
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.fields import construct, section
from efficient_vlm.train.arms import make_arms, make_model
from efficient_vlm.train.metrics import summary_writer
from efficient_vlm.train.optimizer import OPTIMIZERS, OptimizerConfig, schedule
from efficient_vlm.train.pretrained_fields import PretrainedFields

__all__ = ["TrainConfig", "is_published", "make_mesh", "read_config"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
      steps: optimizer steps.
      seed: of initial values, random compressors and the draw of budgets. The data's order and
        questions are drawn from `data.seed`; `--config.seed=N` sets both.
      optimizer: fields of `optimizer.OptimizerConfig`.
      elastic: budgets to draw from at every step, as {"name", "budget", "weight", "start"} and
        options of the compressor; empty for the model's own compressor alone. Each is one
        executable. "start" is the share of the run after which it is drawn, 0 by default.
      elastic_all: whether every step has the mean loss of all entries of `elastic`, by "weight", in
        one program, in place of a draw: the time of all of them (an encoder that all run alike
        runs once), and the memory of all of their activations.
      accumulate: micro-batches per step.
      mesh: how many devices share what, fields of `sharding.MeshConfig`; batches are divided over
        all of them. One device needs none.
      load_balance, router_z: weights of the router losses of a mixture of experts.
      selector: weight of teaching a text-guided selector, at the full budget, where the decoder
        looks.
      penalty: weight of what compressors add to the loss themselves: of `visionselector`, the
        distance of its soft choice from the one that inference makes.
      penalty_ramp: share of the run over which that weight grows from 0; 0 for none.
      ema: decay of an average of the parameters that is evaluated in their place; None for none.
      checkpoint_every: steps between checkpoints; one more is written at the end.
      keep, keep_every: newest checkpoints to keep, and steps whose multiples are kept for ever.
      log_every: steps between lines of metrics.jsonl.
      save_failures: checkpoints in a row that may fail before the run ends.
      nonfinite_limit: steps in a row without a finite loss and gradient after which the run ends.
      tensorboard: also write TensorBoard files.
      init_from: workdir of another run whose newest parameters to start from.
    """

    steps: int
    seed: int = 0
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elastic: Sequence[Mapping[str, Any]] = ()
    elastic_all: bool = False
    accumulate: int = 1
    mesh: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load_balance: float = 0.01
    router_z: float = 1e-3
    selector: float = 1.0
    penalty: float = 1.0
    penalty_ramp: float = 0.5
    ema: float | None = None
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int | None = None
    log_every: int = 10
    save_failures: int = 3
    nonfinite_limit: int = 3
    tensorboard: bool = False
    init_from: str | None = None

    def __post_init__(self):
        counts = ("steps", "accumulate", "checkpoint_every", "log_every", "keep")
        number_fields(self, "train", *counts, "save_failures", "nonfinite_limit", low=1)
        weights = ("load_balance", "router_z", "selector", "penalty")
        number_fields(self, "train", *weights, "keep_every", low=0)
        number_fields(self, "train", "penalty_ramp", low=0, high=1)
        number_fields(self, "train", "ema", low=0, below=1)
        flag("train.elastic_all", self.elastic_all)
        whole("train.seed", self.seed, 0, 2**63 - 1)


def read_config(config: Mapping[str, Any]) -> tuple[TrainConfig, DataConfig, OptimizerConfig]:
    """What training reads of a config, with everything checked that can be without data."""
    settings = construct(TrainConfig, section(config, "train"), "train")
    if settings.tensorboard:
        summary_writer()
    data_config = DataConfig.from_mapping(section(config, "data"))
    optimizer = construct(OptimizerConfig, settings.optimizer, "train.optimizer")
    if data_config.batch_size % settings.accumulate:
        raise UserError(
            f"train.accumulate: {settings.accumulate}",
            allowed=f"divisors of data.batch_size={data_config.batch_size}",
        )
    schedule(optimizer, settings.steps, optimizer.learning_rate)
    if optimizer.name not in OPTIMIZERS:
        raise unknown("train.optimizer.name", optimizer.name, OPTIMIZERS)
    if is_published(config):
        construct(PretrainedFields, section(config, "model"), "model")
        construct(AdaptConfig, section(config, "adapt"), "adapt")
        return settings, data_config, optimizer
    if data_config.pairs or section(config, "preference").get("name"):
        raise UserError(
            "data.pairs, preference: for published models alone",
            fix="--config=configs/dpo.py --config.model.pretrained=PATH_OR_HUB_NAME",
        )
    # Wrong names and budgets are reported before data are built.
    model = make_model(config, vocab_size=2)
    for each in (model, *(arm.model for arm in make_arms(model, settings.elastic))):
        each.make_compressor()
        each.make_decoder()
    size = model.make_encoder().image_size
    if data_config.size != ((size, size) if isinstance(size, int) else tuple(size)):
        raise UserError(
            f"data.image_size: {data_config.image_size}",
            allowed=f"model.encoder.image_size, {size}",
            fix="set both to the same",
        )
    return settings, data_config, optimizer


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether the run starts from a published model."""
    return "pretrained" in section(config, "model")


def make_mesh(settings: TrainConfig, batch_size: int) -> Mesh | None:
    """The mesh of a run, None for one device.

    Raises:
      UserError: sizes that do not fit the devices or the batch.
    """
    config = construct(sharding.MeshConfig, settings.mesh, "train.mesh")
    if jax.device_count() == 1:
        config.sizes(1)
        return None
    mesh = sharding.make_mesh(config)
    sharding.check_batch(batch_size, mesh, settings.accumulate)
    return mesh
