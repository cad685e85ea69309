"""How a training state is laid out on a mesh: parameters by logical axes, moments with them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_vlm.sharding import trimmed

__all__ = ["StateLayout", "state_shardings"]


class StateLayout(NamedTuple):
    """A mesh, and a tree of `NamedSharding` with the structure of the training state."""

    mesh: Mesh
    state: Any


def state_shardings(
    state: Mapping[str, Any],
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    zero: bool = False,
) -> dict[str, Any]:
    """A tree of `NamedSharding` like a training state; moments are sharded like their parameters.

    Args:
      state: arrays or shapes; see `train.step.State`.
      params: from `param_shardings`.
      tx: the optimizer.
      mesh: see `make_mesh`.
      zero: see `MeshConfig`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def moment(leaf, sharding):
        if masked(leaf):  # A parameter that another part of the optimizer updates.
            return leaf
        return _cut_further(sharding, leaf.shape, mesh) if zero else sharding

    placed = {name: jax.tree.map(lambda _: everywhere, part) for name, part in state.items()}
    placed["params"] = params
    if "ema" in state:
        placed["ema"] = params
    placed["opt"] = optax.tree.map_params(
        tx,
        moment,
        state["opt"],
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )
    return placed


def _cut_further(sharding: NamedSharding, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding, cut over "data" as well along the first axis that this divides."""
    if mesh.shape["data"] == 1:
        return sharding
    parts = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    for i, (part, size) in enumerate(zip(parts, shape, strict=True)):
        axes = () if part is None else (part,) if isinstance(part, str) else tuple(part)
        axes += ("data",)
        if size % math.prod(mesh.shape[axis] for axis in axes) == 0:
            parts[i] = axes if len(axes) > 1 else axes[0]
            return NamedSharding(mesh, trimmed(parts))
    return sharding
