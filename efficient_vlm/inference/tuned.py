"""A fine-tuned run as a model that can be asked, measured and exported."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.families.checks import check_compressor
from efficient_vlm.families.load import known_dtype
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.weights import Weights
from efficient_vlm.fields import construct, section
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train.arms import make_arms
from efficient_vlm.train.base import check_base, open_base
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.parameters import load_params
from efficient_vlm.train.pretrained_fields import PretrainedFields
from efficient_vlm.train.published import Tuning, nested
from efficient_vlm.train.workdir_config import read_run_config


def load_run(
    workdir: Path,
    *,
    compressor: Mapping[str, Any] | None = None,
    dtype: Any = None,
    **picture_options: Any,
) -> tuple[VisionLanguageModel, Weights, Processor, dict[str, np.ndarray]]:
    """What a `Pretrained` is made of, from a run's newest parameters; adapters stay adapters.

    Args:
      workdir: of the run.
      compressor: in place of the run's own.
      dtype: of activations; None for that of the run.
      **picture_options: beside those of the run, see `from_pretrained`.

    Raises:
      UserError: no checkpoint yet, or base weights other than those that the run started from.
    """
    config = read_run_config(workdir)
    fields = construct(PretrainedFields, section(config, "model"), "model")
    if dtype is not None:
        fields = dataclasses.replace(fields, dtype=str(known_dtype("dtype", dtype)))
    if picture_options:
        fields = dataclasses.replace(fields, pictures={**fields.pictures, **picture_options})
    settings = construct(TrainConfig, section(config, "train"), "train")
    base = open_base(fields)
    check_base(workdir, base)
    arms = make_arms(base.model, settings.elastic)
    adapting = construct(AdaptConfig, {"name": "full", **section(config, "adapt")}, "adapt")
    tuning = Tuning(base, arms, adapting, None)
    shapes = nn.unbox(nested(tuning.trained))
    trained = load_params(workdir, shapes, "params" if settings.ema is None else "ema")
    _, frozen = tuning.values()
    model, params = base.model, tuning.whole(trained, frozen)
    if compressor is not None:
        model = model.clone(compressor=dict(compressor))
        check_compressor(model, base.processor.family.variable, params)
    return model, Weights(params), base.processor, base.carried()
