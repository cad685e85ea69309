"""The programs of a plan, lowered for a mesh: the training step and the stages of inference as they
are, of shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from efficient_vlm import sharding
from efficient_vlm.adapt.build import combine, partition, prepare
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.inference import stages
from efficient_vlm.models.cache import cache_shardings
from efficient_vlm.models.init import boxed_parameters, example_shapes
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train import step as steps
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.state_layout import StateLayout, state_shardings

__all__ = ["PROGRAMS", "TASKS", "Program", "Work", "lowered"]

# Task -> its programs, in the order in which they run.
PROGRAMS = {
    "train": ("train",),
    "prefill": ("encode", "compress", "prefill"),
    "decode": ("decode",),
}
TASKS = tuple(PROGRAMS)
_shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
      model: with its compressor.
      task: of TASKS.
      batch: pictures, each with one question, on all devices together.
      images: that a picture becomes.
      text: tokens of a prompt.
      new: tokens of an answer: targets in training, room in the cache else.
      pooled: see `cli.subject.Subject`.
      remat: of encoder and decoder layers in training, see `stack.rematerialised`.
      adapt: how the model is adapted in training; None for all parameters. What is frozen has no
        gradients and no moments.
    """

    model: VisionLanguageModel
    task: str
    batch: int
    images: int
    text: int
    new: int
    pooled: int | None = None
    remat: str = "full"
    adapt: AdaptConfig | None = None


class Program(NamedTuple):
    """One program: its name, `jax.stages.Lowered`, bytes of its arguments on one device."""

    name: str
    lowered: Any
    argument_bytes: int


def lowered(work: Work, mesh: Mesh) -> Iterator[Program]:
    """The programs of a task, those of PROGRAMS.

    Parameters are float32 with the moments of AdamW in training, and of the model's own dtype in
    inference. They are arguments of every stage, used or not: all of them are there.

    Raises:
      UserError: a batch that does not divide over the mesh.
    """
    sharding.check_batch(work.batch, mesh)
    yield from _train(work, mesh) if work.task == "train" else _serve(work, mesh)


def _train(work: Work, mesh: Mesh) -> Iterator[Program]:
    parts = {
        name: {**getattr(work.model, name), "remat": work.remat} for name in ("encoder", "decoder")
    }
    model = work.model.clone(**parts)
    # The last target is only ever predicted.
    inputs = _inputs(work, mesh, work.text + work.new - 1)
    inputs = inputs.replace(labels=inputs.text)
    boxed = _parameters(model, work)
    adapted = prepare(boxed, work.adapt or AdaptConfig(name="full"), model)
    trained, frozen = partition(adapted.params, adapted.trainable)
    boxed, like = unflatten_dict(trained, sep="/"), nn.unbox(adapted.params)
    tx = make_optimizer(OptimizerConfig(), 1000, boxed)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), nn.unbox(boxed))
    lies = state_shardings(state, sharding.param_shardings(boxed, mesh), tx, mesh)
    frozen = _placed(nn.unbox(frozen), sharding.param_shardings(frozen, mesh))

    def objective(trained, frozen, inputs, rng):
        params = combine(flatten_dict(trained, sep="/"), frozen, like)
        return steps.loss_fn(model, params, inputs, rng, {})

    given = dict(layout=StateLayout(mesh, lies), objective=objective, frozen=frozen)
    step = steps.make_train_step(model, tx, **given)
    state = _placed(state, lies)
    yield Program("train", step.lower(state, inputs), _bytes((state, frozen, inputs)))


def _serve(work: Work, mesh: Mesh) -> Iterator[Program]:
    model = work.model
    boxed = _parameters(model, work)
    params = jax.tree.map(lambda p: _shape(p.shape, model.dtype), nn.unbox(boxed))
    params = _placed(params, sharding.param_shardings(boxed, mesh))
    inputs = _inputs(work, mesh, work.text)
    pictures, text = inputs.pictures, inputs.replace(pictures=None, prompt=None)
    layout = model.layout(pictures)
    chosen = stages.programs_of(model, layout)

    def run(name: str, static: tuple, *given: Any) -> tuple[Program, Any]:
        """The lowered stage, and what it gives, lying where the next one takes it."""
        function, count = getattr(stages, f"{name}_stage"), len(static)
        options = dict(static_argnums=tuple(range(count)), keep_unused=True)
        if name == "decode":
            options["donate_argnums"] = count + 2
        function = function.__wrapped__
        with sharding.active(mesh):
            given_back = jax.eval_shape(functools.partial(function, *static), *given)
            program = jax.jit(function, **options).lower(*static, *given)
        return Program(name, program, _bytes(given)), _on(mesh, given_back)

    encode, (visual, signals) = run("encode", chosen.encode, params, pictures)
    fixed = (model, layout)
    compress, visual = run("compress", fixed, params, visual, signals, text, None)
    fixed = (chosen.prefill, layout, work.new)
    prefill, (first, cache, _) = run("prefill", fixed, params, visual, text, None)
    if work.task == "prefill":
        yield from (encode, compress, prefill)
        return
    cache = _placed(cache, cache_shardings(cache, mesh))
    yield run("decode", (chosen.decode,), params, first.tokens, cache)[0]


def _parameters(model: VisionLanguageModel, work: Work) -> Any:
    """Boxed shapes, for all images of a picture: a method in the decoder may keep more tokens than
    one of them has."""
    return boxed_parameters(model, pictures=work.images, pooled=work.pooled)


def _inputs(work: Work, mesh: Mesh, text: int) -> ModelInputs:
    sizes = dict(rows=work.batch, pictures=work.images, text=text, pooled=work.pooled)
    return _on(mesh, example_shapes(work.model, **sizes))


def _on(mesh: Mesh, shapes: Any) -> Any:
    """Shapes whose first axis lies over those of a batch."""

    def place(leaf: Any) -> Any:
        names = ("batch", *(None,) * (len(leaf.shape) - 1)) if leaf.shape else ()
        spec = sharding.spec_of(names, leaf.shape, mesh.shape)
        return _shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: _shape(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def _bytes(shapes: Any) -> int:
    """Of one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )
