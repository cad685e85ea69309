"""Fine-tuning of a loaded model in a notebook, and its loss; in files: `efficient-vlm train`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from efficient_vlm.adapt.build import is_adapted
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.prompts import soft_ids
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.preference_rows import PairSource
from efficient_vlm.data.row_source import Reading, RowSource
from efficient_vlm.data.tables.memory import MemoryTable
from efficient_vlm.data.taught import Taught
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.processor import Processor
from efficient_vlm.fields import construct
from efficient_vlm.inference.on_policy import OnPolicy
from efficient_vlm.inference.programs import bounded_jit
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.stack import restack
from efficient_vlm.processing.gather import fitted
from efficient_vlm.terminal import Progress
from efficient_vlm.train.arms import Arm
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.losses import token_cross_entropy
from efficient_vlm.train.objective import DistilConfig, PreferenceConfig, check_aims
from efficient_vlm.train.optimizer import OptimizerConfig
from efficient_vlm.train.published import Tuning, make_start, make_step
from efficient_vlm.train.teacher import taught_by


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A loaded model as what a run starts from; see `train.base.Base`."""

    model: VisionLanguageModel
    processor: Processor
    params: Any

    @property
    def dtype(self) -> np.dtype:
        return jax.tree.leaves(self.params)[0].dtype

    def held(self) -> set[str]:
        return set(flatten_dict(jax.eval_shape(restack, self.params), sep="/"))

    def parameters(self) -> dict[str, Any]:
        return flatten_dict(restack(self.params), sep="/")


def finetune(
    vlm: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    adapt: Mapping[str, Any] | None,
    batch_size: int,
    seed: int,
    data: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    distil: Mapping[str, Any],
    preference: Mapping[str, Any],
    compressor: Mapping[str, Any] | None,
    log: Callable[[int, Mapping[str, float]], None] | None,
) -> tuple[VisionLanguageModel, Any]:
    """The model and its trained parameters; see `Pretrained.finetune`."""
    if adapt is not None and not isinstance(adapt, Mapping):
        raise UserError(f"adapt: {short(adapt)} is not a mapping", fix='adapt=dict(name="lora")')
    adapting = construct(AdaptConfig, {"seed": seed, **(adapt or {"name": "full"})}, "adapt")
    settings = TrainConfig(steps=steps, seed=seed)
    given = {"learning_rate": learning_rate, "warmup_steps": min(steps // 10, 100), **optimizer}
    update = construct(OptimizerConfig, given, "optimizer")
    taught = construct(DistilConfig, distil, "distil")
    preferred = construct(PreferenceConfig, preference, "preference")
    check_aims(taught, preferred, adapting)
    if is_adapted(vlm.params):
        raise UserError("finetune: this model has adapters", fix="start from vlm.merge()")
    model = vlm.model
    if compressor is not None:
        model = model.clone(compressor=dict(compressor), pooled_start=not model.in_place)
    loaded = _Loaded(model, vlm.processor, vlm.params)
    arm = Arm(vlm.processor.seeing(model))
    tuning = Tuning(loaded, [arm], adapting, None)
    given = dict(batch_size=batch_size, seed=seed, **data)
    if taught.on_policy:  # Each row is answered by itself.
        given["pack"] = False
    pairs = preferred.name is not None
    how = (taught, model, vlm.processor, str(np.dtype(model.dtype)))
    say = print if log is None else lambda line: None
    ask = None if taught.teacher is None else functools.partial(taught_by, *how, say=say)
    pipeline = _pipeline(vlm, rows, given, soft_ids(tuning.like), arm.trained, pairs, ask)
    start, frozen = make_start(tuning, settings, update)
    aims = (taught, preferred, pipeline.apart)
    step = make_step(arm.model, tuning, start, frozen, settings, *aims)
    if taught.on_policy:
        whole = functools.partial(tuning.whole, frozen=frozen)
        step = OnPolicy(step, arm.model, whole, vlm.processor, taught, seed)
    state, batches = start.state(), iter(pipeline)
    with Progress(steps, quiet=log is not None) as progress:
        for number in range(1, steps + 1):
            state, metrics = step(state, next(batches).inputs)
            values = {name: np.asarray(value) for name, value in metrics.items()}
            if not values["ok"]:
                raise UserError(
                    f"finetune: the loss of step {number} is not finite",
                    fix="a smaller learning_rate, or dtype='float32'",
                )
            progress.update(number, values)
            if log is not None:
                log(number, {n: float(v) for n, v in values.items() if v.ndim == 0})
    return model, tuning.whole(state["params"], frozen)


def loss(vlm: Any, rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> float:
    """Mean loss per target token of each row once; see `Pretrained.loss`."""
    total, count = mean_loss(vlm, _pipeline(vlm, rows, dict(data), vlm.soft_ids, vlm.model))
    return total / count


def mean_loss(
    vlm: Any, pipeline: ChatPipeline, check_stop: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """The sum of the losses of all targets of a pipeline's samples, each once, and their number."""
    total = count = 0.0
    for batch in pipeline.epoch():
        check_stop()
        model = fitted(pipeline.model, batch.inputs.pictures, vlm.family.variable)
        part, number = _sums(model, vlm.fused, batch.inputs)
        total, count = total + float(part), count + float(number)
    return total, count


@bounded_jit(1)
def _sums(model, params, inputs):
    """Sum of the losses of all targets, and their number."""
    logits = model.apply({"params": params}, inputs, rng=jax.random.key(0)).logits
    return token_cross_entropy(logits, inputs.labels)["loss"]


def _pipeline(
    vlm: Any,
    rows: Sequence[Mapping[str, Any]],
    data: Any,
    soft: Any,
    model: VisionLanguageModel,
    pairs: bool = False,
    ask: Callable[[DataConfig, Any], Taught] | None = None,
) -> ChatPipeline:
    """Batches of rows, with what `ask` gives for their data and source."""
    fields = {"max_images": 64, "num_threads": 0, "max_skip_fraction": 0.0, **data}
    config = DataConfig.from_mapping({"path": "rows.json", **fields})
    table = MemoryTable(rows, config.max_image_bytes)
    kind = PairSource if pairs else RowSource
    source = kind(table, Reading(max_bytes=config.max_image_bytes))
    models = [vlm.processor.seeing(model)]
    given = dict(soft=soft, pairs=pairs, taught=ask and ask(config, source))
    return ChatPipeline(config, source, vlm.processor, models, **given)
