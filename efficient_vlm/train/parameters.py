"""Parameters of a run: fresh, from another run, or from its newest checkpoint."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from efficient_vlm import sharding
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.errors import UserError
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.state_layout import StateLayout, state_shardings
from efficient_vlm.train.workdir_config import refuse_published


class Start(NamedTuple):
    """What a run starts with.

    Attributes:
      state: makes a fresh state, the same one at every call; on a mesh each device makes only its
        part.
      shapes: of the state, with its shardings on a mesh.
      tx: the optimizer.
      layout: None for one device.
    """

    state: Callable[[], steps.State]
    shapes: steps.State
    tx: optax.GradientTransformation
    layout: StateLayout | None


def initialise(
    arms: Sequence[Arm],
    settings: Any,
    optimizer: OptimizerConfig,
    mesh: Mesh | None = None,
) -> Start:
    """A start that serves all arms.

    Args:
      arms: the models; their parameters are created once per compressor, not per budget.
      settings, optimizer: of the run.
      mesh: of the devices; None for one device.
    """
    distinct = {
        tuple(
            sorted((k, str(v)) for k, v in arm.model.compressor.items() if k != "budget")
        ): arm.model
        for arm in arms
    }

    init, key = steps.make_init(list(distinct.values())), jax.random.key(settings.seed)
    boxed = jax.eval_shape(init, key)
    tx = make_optimizer(optimizer, settings.steps, boxed)
    rest = functools.partial(steps.init_state, tx=tx, ema=settings.ema is not None)

    def state():
        return rest(init(key))

    shapes = jax.eval_shape(rest, boxed)
    if mesh is None:
        return Start(state, shapes, tx, None)
    shardings = state_shardings(
        shapes,
        sharding.param_shardings(boxed, mesh),
        tx,
        mesh,
        zero=bool(settings.mesh.get("zero")),
    )
    placed = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
    )
    layout = StateLayout(mesh, shardings)
    return Start(jax.jit(state, out_shardings=shardings), placed, tx, layout)


def start_from(state: steps.State, workdir: Path) -> steps.State:
    """A fresh state with the newest parameters of another run."""
    refuse_published(workdir, "train.init_from")
    params = load_params(workdir, state["params"])
    average = {"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {}
    return {**state, "params": params, **average}


def load_params(workdir: Path, like: Any, name: str = "params") -> Any:
    """The newest parameters of a run.

    Args:
      workdir: of that run.
      like: parameters, or their shapes, of the same structure; with shardings, they are read
        straight to their devices. All processes must make the same call.
      name: "params", or "ema" for their average.

    Raises:
      UserError: no checkpoint, or other shapes.
    """
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"--workdir={workdir}: no checkpoints there", fix="train first: efficient-vlm train ..."
        )
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest({name: like}, subset=True)
    if restored is None:
        raise UserError(
            f"--workdir={workdir}: no checkpoint yet", fix="train first: efficient-vlm train ..."
        )
    return restored[1][name]
