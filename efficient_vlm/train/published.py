"""What a run that starts from a published model is made of before its first step."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from efficient_vlm import sharding
from efficient_vlm.adapt.build import Adapted, combine, merge, partition
from efficient_vlm.adapt.build import prepare as adapt
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.prompts import soft_ids
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.sources import open_source
from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct, section
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.gather import fitted
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm, joined, make_arms
from efficient_vlm.train.base import (
    Base,
    check_base,
    open_base,
    placed,
    with_values,
)
from efficient_vlm.train.config import TrainConfig, make_mesh
from efficient_vlm.train.joint import mean_of, of_all
from efficient_vlm.train.objective import (
    DistilConfig,
    PreferenceConfig,
    check_aims,
    check_own_answers,
    make_objective,
)
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.parameters import Start
from efficient_vlm.train.pretrained_fields import PretrainedFields
from efficient_vlm.train.processes import first_then_all
from efficient_vlm.train.setup import Setup
from efficient_vlm.train.state_layout import StateLayout, state_shardings
from efficient_vlm.train.teacher import taught_on_disk

# Programs that a run may compile: for each shape of rows and each compressor one.
MOST_PROGRAMS = 8


class Tuning:
    """Parameters of a published model, of which some are trained.

    Args:
      base: the model.
      arms: its compressors and budgets in this run.
      config: how it is adapted.
      mesh: of the devices; None for one device.

    Attributes:
      like: shapes of the model's parameters.
      trained, frozen: shapes of both parts with their logical axes, by path.
    """

    def __init__(self, base: Base, arms: list[Arm], config: AdaptConfig, mesh: Mesh | None):
        self.base, self.config, self.mesh = base, config, mesh
        models = {str(sorted_options(arm.model)): arm.model for arm in arms}
        self._init = steps.make_init(list(models.values()))
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        kind = base.dtype
        self._plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), boxed)
        # Fresh weights that stay as they are would only spoil the tokens.
        fresh = flatten_dict(nn.unbox(boxed), sep="/").keys() - base.held()
        self._adapt = functools.partial(adapt, config=with_trained(config, fresh), model=base.model)
        shapes = self._adapt(self._plain)
        self.trained, self.frozen = partition(shapes.params, shapes.trainable)
        self.like = nn.unbox(shapes.params)

    def values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial values of what is trained, nested, and of what is frozen, by path; placed."""
        known = self.base.parameters()
        fresh = functools.partial(self._fresh, jax.random.key(self.config.seed))
        whole = with_values(nn.unbox(self._plain), known, fresh)
        adapted: Adapted = self._adapt(whole)
        trained, frozen = partition(adapted.params, adapted.trainable)
        if self.mesh is None:  # What is frozen may be used elsewhere as well.
            frozen = jax.device_put(frozen)
        else:
            frozen = self._place(frozen, self.frozen)
        return nested(self._place(trained, self.trained)), frozen

    def _fresh(self, key: jax.Array) -> Any:
        return nn.unbox(self._init(key))

    def _place(self, values: Mapping[str, Any], boxed: Mapping[str, Any]) -> dict[str, Any]:
        where = dict.fromkeys(values)
        if self.mesh is not None:
            where = sharding.param_shardings(boxed, self.mesh)
        return {path: placed(values[path], where[path]) for path in values}

    def whole(self, trained: Any, frozen: Mapping[str, Any]) -> Any:
        """The parameters of the model."""
        return combine(flatten_dict(trained, sep="/"), frozen, self.like)


def with_trained(config: AdaptConfig, paths: Iterable[str]) -> AdaptConfig:
    """The config with further parameters that are trained themselves."""
    exact = tuple(f"^{re.escape(path)}$" for path in sorted(paths))
    return dataclasses.replace(config, train=(*config.trained, *exact)) if exact else config


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} -> {"a": {"b": leaf}}."""
    return unflatten_dict(dict(flat), sep="/")


def sorted_options(model: VisionLanguageModel) -> list[tuple[str, str]]:
    """Options of the compressor but its budget, which parameters do not depend on."""
    options = model.compressor.items()
    return sorted((name, str(value)) for name, value in options if name != "budget")


def make_start(
    tuning: Tuning, settings: TrainConfig, optimizer: OptimizerConfig, *, fresh: bool = True
) -> tuple[Start, dict[str, Any]]:
    """The first state, of what is trained alone, and the frozen parameters.

    Args:
      fresh: whether the first state will be asked for: a run that resumes need not hold its values.
    """
    boxed = nested(tuning.trained)
    if not boxed:
        raise UserError("adapt: nothing is trained", fix="set adapt.train or adapt.name")
    tx = make_optimizer(optimizer, settings.steps, boxed)
    rest = functools.partial(steps.init_state, tx=tx, ema=settings.ema is not None)
    first, frozen = tuning.values()
    kept = [first] if fresh else []
    del first

    def trained():
        # The state's buffers are donated: a second state reads the weights again.
        return kept.pop() if kept else tuning.values()[0]

    shapes = jax.eval_shape(rest, boxed)
    if tuning.mesh is None:
        return Start(lambda: rest(trained()), shapes, tx, None), frozen
    shardings = state_shardings(
        shapes,
        sharding.param_shardings(boxed, tuning.mesh),
        tx,
        tuning.mesh,
        zero=bool(settings.mesh.get("zero")),
    )
    like = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
    )
    make = jax.jit(rest, out_shardings=shardings)
    return Start(lambda: make(trained()), like, tx, StateLayout(tuning.mesh, shardings)), frozen


def make_step(
    model: VisionLanguageModel,
    tuning: Tuning,
    start: Start,
    frozen: Mapping[str, Any],
    settings: TrainConfig,
    distil: DistilConfig | None = None,
    preference: PreferenceConfig | None = None,
    apart: bool = False,
    *,
    together: Sequence[Arm] = (),
) -> Callable:
    """The training step of one budget, with a program for each shape of rows.

    Args:
      distil, preference, apart: see `objective.make_objective`.
      together: in place of `model`, those that share every step.
    """
    aux = {name: getattr(settings, name) for name in ("load_balance", "router_z", "penalty")}
    distil, preference = distil or DistilConfig(), preference or PreferenceConfig()
    check_aims(distil, preference, tuning.config)

    def make(models: tuple[VisionLanguageModel, ...]) -> Callable:
        return steps.make_train_step(
            models[0],
            start.tx,
            seed=settings.seed,
            accumulate=settings.accumulate,
            ema=settings.ema,
            layout=start.layout,
            objective=objective(models),
            frozen=frozen,
            penalty_ramp=settings.penalty_ramp * settings.steps,
        )

    def objective(models: tuple[VisionLanguageModel, ...]) -> Callable:
        if together and not distil.teaches and preference.name is None:
            return of_all(together, models, aux, tuning.whole)
        aims = (distil, aux, preference, apart)
        each = [make_objective(model, tuning, *aims) for model in models]
        if not together:
            return each[0]
        return lambda *given: mean_of(together, [loss(*given) for loss in each])

    models = [arm.trained for arm in together] or [model.in_training()]
    return ShapedStep(make, models, tuning.base.processor.family.variable)


class ShapedStep:
    """A training step that has a program for each shape of pictures and text.

    Args:
      make: from models at the size of some pictures to their step.
      models: at one budget, or at several that share the step.
      variable: see `gather.capped`.
    """

    def __init__(self, make: Callable, models: Sequence[VisionLanguageModel], variable: bool):
        self._make, self._models, self._variable = make, tuple(models), variable
        self._steps: dict[tuple[VisionLanguageModel, ...], Callable] = {}

    def __call__(self, state: steps.State, inputs: ModelInputs) -> tuple:
        models = tuple(fitted(model, inputs.pictures, self._variable) for model in self._models)
        if models not in self._steps:
            self._steps[models] = self._make(models)
        uneven = any(model.make_compressor().in_decoder for model in models)
        return self._steps[models](state, inputs.replace(uneven=uneven))

    def _cache_size(self) -> int:
        return sum(step._cache_size() for step in self._steps.values())


def prepare_published(
    config: Mapping[str, Any],
    workdir: Path,
    say: Callable[[str], None],
    settings: TrainConfig,
    data_config: DataConfig,
    optimizer: OptimizerConfig,
) -> Setup:
    """As `prepare.prepare`, for a run whose config names a published model."""
    fields = construct(PretrainedFields, section(config, "model"), "model")
    adapting = construct(AdaptConfig, {"name": "full", **section(config, "adapt")}, "adapt")
    distil = construct(DistilConfig, section(config, "distil"), "distil")
    preference = construct(PreferenceConfig, section(config, "preference"), "preference")
    check_aims(distil, preference, adapting, data_config.pairs)
    mesh = make_mesh(settings, data_config.batch_size)
    sharing = settings.elastic_all and len(settings.elastic) > 1
    check_own_answers(distil, pack=data_config.pack, alone=mesh is None and not sharing)
    rows = None if mesh is None else sharding.own_rows(mesh, data_config.batch_size)
    base = open_base(fields)
    first_then_all(lambda: check_base(workdir, base))
    say(f"Model: {fields.pretrained} ({base.processor.family.name})")
    arms = make_arms(base.model, settings.elastic)
    arms = [Arm(base.processor.seeing(a.model), a.weight, a.start) for a in arms]
    tuning = Tuning(base, arms, adapting, mesh)
    source = open_source(data_config, "train")
    given = (workdir, distil, base, fields.dtype, data_config, source, say)
    asked = distil.teacher is not None
    taught = first_then_all(lambda: taught_on_disk(*given)) if asked else None
    pipeline = ChatPipeline(
        data_config,
        source,
        base.processor,
        [arm.trained for arm in arms],
        rows=rows,
        programs=max(1, MOST_PROGRAMS // len(joined(arms, settings))),
        soft=soft_ids(tuning.like),
        pairs=data_config.pairs,
        taught=taught,
    )
    aims = (distil, preference, pipeline.apart)
    fresh = not any((workdir / "checkpoints").glob("*"))
    start, frozen = make_start(tuning, settings, optimizer, fresh=fresh)
    arms = joined(arms, settings)
    return Setup(
        settings=settings,
        data=data_config,
        optimizer=optimizer,
        mesh=mesh,
        pipeline=pipeline,
        model=base.processor.seeing(base.model),
        arms=arms,
        start=start,
        programs=[
            make_step(arm.model, tuning, start, frozen, settings, *aims, together=arm.together)
            for arm in arms
        ],
        compile_seconds=0.0,
        inputs=lambda batch: batch.inputs,
        whole=functools.partial(tuning.whole, frozen=frozen),
        processor=base.processor,
        total_params=sum(x.size for x in jax.tree.leaves(jax.eval_shape(merge, tuning.like))),
    )
