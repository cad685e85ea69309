"""The parameters of a model as places for adapters: their axes, and which of them are products."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from efficient_vlm.models.init import boxed_parameters
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.linear import WeightForm
from efficient_vlm.nn.stack import STACKS
from efficient_vlm.sharding import is_box, logical_axes, path_of

__all__ = ["Place", "in_one_stack", "is_form", "places"]

# Axes of tables, which are looked up or added, not multiplied with.
_TABLES = ("vocab", "rows", "columns", "queries", "position")
_LAYER = re.compile(rf"(^|/)({'|'.join(sorted(STACKS))})/\d+(?=/)")


class Place(NamedTuple):
    """One parameter.

    Attributes:
      path: in the tree, "/" between.
      axes: logical name of each axis, None for those without.
      leading: number of axes of layers and experts in front.
      inputs: number of axes that a product contracts; 0 for what is no product.
    """

    path: str
    axes: tuple[str | None, ...]
    leading: int
    inputs: int

    @property
    def input_axes(self) -> tuple[str | None, ...]:
        """Names of leading axes and inputs."""
        return self.axes[: self.leading + self.inputs]

    @property
    def output_axes(self) -> tuple[str | None, ...]:
        """Names of the outputs."""
        return self.axes[self.leading + self.inputs :]


def is_form(leaf: Any) -> bool:
    """Whether a node of a tree is a parameter: an array, with axes or without, or a form."""
    return is_box(leaf) or isinstance(leaf, WeightForm)


def in_one_stack(path: str) -> str:
    """The path that a parameter of one layer has where all layers are stacked."""
    return _LAYER.sub(r"\1\2", path)


def places(params: Any, model: VisionLanguageModel | None = None) -> dict[str, Place]:
    """Path -> place of each parameter.

    Args:
      params: arrays or shapes, stacked or split, with their logical axes or without.
      model: that the parameters are of; None where they have their axes.

    Raises:
      ValueError: neither axes nor a model.
    """
    flat = {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_form)[0]
    }
    known = _axes(params)
    if not any(map(is_box, flat.values())):
        if model is None:
            raise ValueError("parameters without logical axes: give the model as well")
        known = _axes(boxed_parameters(model))
    return {path: _place(path, leaf, known) for path, leaf in flat.items()}


def _axes(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_form)[0]
    return {
        path_of(path): (None,) * len(leaf.shape)
        if isinstance(leaf, WeightForm)
        else logical_axes(leaf)
        for path, leaf in leaves
    }


def _place(path: str, leaf: Any, known: Mapping[str, tuple[str | None, ...]]) -> Place:
    axes = known.get(path) or known.get(in_one_stack(path), ())[1:]
    rank = len(nn.unbox(leaf).shape)
    if len(axes) != rank:  # A parameter that the model does not have.
        return Place(path, (None,) * rank, 0, 0)
    leading = sum(name in ("layers", "experts") for name in axes)
    inner, name = axes[leading:], path.rpartition("/")[2]
    stored = name == "kernel" or "experts" in axes or path.startswith("reduce/")
    if not stored or len(inner) < 2 or any(axis in _TABLES for axis in inner):
        return Place(path, axes, leading, 0)
    # [heads, head_dim, outputs] has two axes of inputs; a matrix may call its one input "heads".
    two = len(inner) > 2 and inner[0] in ("heads", "kv_heads")
    return Place(path, axes, leading, 2 if two else 1)
