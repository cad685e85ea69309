"""Checks of the parameters and compressor of a published model, before anything runs."""

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from efficient_vlm.errors import UserError
from efficient_vlm.families.architecture import parameter_shapes
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PREFIX
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.gather import capped


def check_parameters(model: VisionLanguageModel, params: Any) -> None:
    """Raises UserError for a tree that is not one of this model's parameters."""
    wanted = {path: leaf.shape for path, leaf in parameter_shapes(model).items()}
    try:
        leaves = flatten_dict(jax.eval_shape(unstack, params), sep="/")
        shapes = {
            path: leaf.shape
            for path, leaf in leaves.items()
            if path.rpartition("/")[2] not in PREFIX
        }
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError):  # Not such a tree.
        shapes = {}
    wrong = [path for path in wanted if path not in shapes]
    wrong += [path for path, shape in shapes.items() if wanted.get(path) != shape]
    if wrong:
        path = wrong[0]
        raise UserError(
            f"params: {len(wrong)} do not fit; {path} has shape {shapes.get(path, 'none')}",
            allowed=f"{wanted.get(path, 'no such parameter')}",
            fix="a tree like vlm.params",
        )


def check_compressor(model: VisionLanguageModel, variable: bool = False) -> None:
    """Raises UserError for a compressor that this model cannot have, before anything runs.

    Args:
      model: at its nominal image size.
      variable: see `gather.capped`; where the prompt decides the number of tokens, a larger budget
        is not an error yet.
    """
    if model.encoder is None:
        if model.compressor["name"] != "none":
            raise UserError(
                f"compressor.name: {model.compressor['name']}, but this model sees no images"
            )
        return
    model = capped(model, math.prod(model.slot_grid), 1, variable)
    plain = model.clone(compressor={"name": "none"})
    more = set(parameter_shapes(model)) - set(parameter_shapes(plain))
    if more:
        raise UserError(
            f"compressor.name: {model.compressor['name']} has weights of its own ({min(more)}), "
            "which no published checkpoint holds",
            allowed="training-free methods, see docs/compressors.md",
        )
