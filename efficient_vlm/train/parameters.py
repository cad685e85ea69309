"""Parameters of a run: fresh, from another run, or from its newest checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efficient_vlm import sharding
from efficient_vlm.errors import UserError
from efficient_vlm.train import step as steps
from efficient_vlm.train.arms import Arm
from efficient_vlm.train.checkpoint import Checkpoints
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.placement import Placement, state_shardings


def initialise(
    arms: Sequence[Arm],
    batch: Mapping[str, Any],
    settings: Any,
    optimizer: OptimizerConfig,
    mesh: Mesh | None = None,
) -> tuple[steps.State, Any, Placement | None]:
    """A fresh state that serves all arms, the optimizer, and where the state lies.

    Args:
      arms: the models; their parameters are created once per compressor, not per budget.
      batch: anything with the shapes of a batch.
      settings, optimizer: of the run.
      mesh: of the devices, on none of which the whole state is ever; None for one device.
    """
    distinct = {
        tuple(
            sorted((k, str(v)) for k, v in arm.model.compressor.items() if k != "budget")
        ): arm.model
        for arm in arms
    }

    def params():
        return steps.init_params(list(distinct.values()), batch, settings.seed)

    ema = settings.ema is not None
    if mesh is None:
        boxed = params()
        tx = make_optimizer(optimizer, settings.steps, boxed)
        return steps.init_state(boxed, tx, ema=ema), tx, None
    boxed = jax.eval_shape(params)
    tx = make_optimizer(optimizer, settings.steps, boxed)

    def state():
        return steps.init_state(params(), tx, ema=ema)

    lies = state_shardings(
        jax.eval_shape(state),
        sharding.param_shardings(boxed, mesh),
        tx,
        mesh,
        zero=bool(settings.mesh.get("zero")),
    )
    return jax.jit(state, out_shardings=lies)(), tx, Placement(mesh, lies)


def start_from(state: steps.State, workdir: Path) -> steps.State:
    """A fresh state with the newest parameters of another run."""
    params = load_params(workdir, state["params"])
    average = {"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {}
    return {**state, "params": params, **average}


def load_params(workdir: Path, like: Any, name: str = "params") -> Any:
    """The newest parameters of a run.

    Args:
      workdir: of that run.
      like: parameters, or their shapes, of the same structure.
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
