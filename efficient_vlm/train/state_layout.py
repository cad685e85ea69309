"""How a training state is laid out on a mesh: parameters by logical axes, moments with them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_vlm.sharding import trimmed
from efficient_vlm.train.adam8bit import Codes

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

    def whole(leaf):
        return isinstance(leaf, optax.MaskedNode | Codes)

    def moment(leaf, sharding):
        if isinstance(leaf, optax.MaskedNode):  # Another part of the optimizer updates it.
            return leaf
        if isinstance(leaf, Codes):
            return leaf.replace(codes=moment(leaf.codes, sharding), largest=blocks(leaf, sharding))
        return _cut_further(sharding, leaf.shape, mesh) if zero else sharding

    def blocks(leaf, sharding):
        """Blocks lie along the last axis, which need not divide into them."""
        parts = sharding.spec[: leaf.codes.ndim - 1]
        return moment(leaf.largest, NamedSharding(mesh, trimmed(list(parts))))

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
        is_leaf=whole,
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
