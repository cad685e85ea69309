"""The programs of a plan, lowered for a mesh: the training step and the stages of inference as they
are, of shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from efficient_vlm import sharding
from efficient_vlm.errors import UserError
from efficient_vlm.families.architecture import boxed_parameters
from efficient_vlm.inference import stages
from efficient_vlm.models.cache import cache_shardings
from efficient_vlm.models.image_inputs import ImageExtras
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train import step as steps
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.placement import Placement, state_shardings

__all__ = ["TASKS", "Program", "Work", "lowered"]

TASKS = ("train", "prefill", "decode")
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
    """

    model: VisionLanguageModel
    task: str
    batch: int
    images: int
    text: int
    new: int
    pooled: int | None = None
    remat: str = "full"


class Program(NamedTuple):
    """One program: its name, `jax.stages.Lowered`, bytes of its arguments on one device."""

    name: str
    lowered: Any
    argument_bytes: int


def lowered(work: Work, mesh: Mesh) -> Iterator[Program]:
    """The programs of a task in the order in which they run.

    Parameters are float32 with the moments of AdamW in training, and of the model's own dtype in
    inference. They are arguments of every stage, used or not: all of them are there.

    Raises:
      UserError: a batch that does not divide over the mesh, or a model that this task cannot take.
    """
    sharding.check_batch(work.batch, mesh)
    yield from _train(work, mesh) if work.task == "train" else _serve(work, mesh)


def _train(work: Work, mesh: Mesh) -> Iterator[Program]:
    if work.pooled:
        raise UserError(
            "--task=train: this model pools patches across crops, which training steps do not",
            allowed="prefill, decode; or --images=N, for images of their own",
        )
    parts = {
        name: {**getattr(work.model, name), "remat": work.remat} for name in ("encoder", "decoder")
    }
    model = work.model.clone(**parts)
    tokens = (work.batch, 1, work.text + work.new)
    numbers = _on(mesh, _shape((work.batch, 1), jnp.int32))
    batch = {
        **_pictures(work, mesh),
        "tokens": _on(mesh, _shape(tokens, jnp.int32)),
        "lengths": numbers,
        "prompt_lengths": numbers,
        "loss_mask": _on(mesh, _shape(tokens, bool)),
    }
    boxed = jax.eval_shape(lambda: steps.init_params([model], batch, 0))
    tx = make_optimizer(OptimizerConfig(), 1000, boxed)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), nn.unbox(boxed))
    lies = state_shardings(state, sharding.param_shardings(boxed, mesh), tx, mesh)
    step = steps.make_train_step(model, tx, placement=Placement(mesh, lies))
    state = _placed(state, lies)
    yield Program("train", step.lower(state, batch), _bytes((state, batch)))


def _serve(work: Work, mesh: Mesh) -> Iterator[Program]:
    model = work.model
    boxed = boxed_parameters(model)
    params = jax.tree.map(lambda p: _shape(p.shape, model.dtype), nn.unbox(boxed))
    params = _placed(params, sharding.param_shardings(boxed, mesh))
    pictures = _pictures(work, mesh)
    images, there = pictures["images"], pictures["image_mask"]
    prompts = _on(mesh, _shape((work.batch, 1, work.text), jnp.int32))
    lengths = _on(mesh, _shape((work.batch, 1), jnp.int32))
    extras = ImageExtras()
    if work.pooled:
        index = (work.batch, work.pooled, model.make_projector().side ** 2)
        extras = ImageExtras(pool_index=_on(mesh, _shape(index, jnp.int32)))
    layout = model.layout(images, extras)
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

    question = (prompts, lengths, None)
    encode, (visual, signals) = run("encode", chosen.encode, params, images, there, extras)
    fixed = (model, layout)
    compress, visual = run("compress", fixed, params, visual, signals, *question)
    fixed = (chosen.prefill, layout, work.new)
    prefill, (first, cache, _) = run("prefill", fixed, params, visual, *question, None)
    if work.task == "prefill":
        yield from (encode, compress, prefill)
        return
    cache = _placed(cache, cache_shardings(cache, mesh))
    yield run("decode", (chosen.decode,), params, first.tokens, cache)[0]


def _pictures(work: Work, mesh: Mesh) -> dict[str, Any]:
    encoder = work.model.make_encoder()
    sides = [side * encoder.patch_size for side in encoder.grid]
    rows = (work.batch, work.images)
    pictures = {"images": _shape((*rows, *sides, 3), jnp.uint8), "image_mask": _shape(rows, bool)}
    return _on(mesh, pictures)


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
