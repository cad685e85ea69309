"""Checks of the parameters and compressor of a published model, before anything runs."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from efficient_vlm.errors import UserError
from efficient_vlm.families.architecture import parameter_shapes
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PREFIX
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.gather import capped

# Parameters of a compressor, which no published checkpoint holds.
OWN = re.compile(r"(reduce|start|language/reducers_\d+)/")


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
    # Of a compressor that is not in use now.
    shapes = {path: s for path, s in shapes.items() if path in wanted or not OWN.match(path)}
    wrong = [path for path in wanted if path not in shapes]
    wrong += [path for path, shape in shapes.items() if wanted.get(path) != shape]
    if wrong:
        path = wrong[0]
        raise UserError(
            f"params: {len(wrong)} do not fit; {path} has shape {shapes.get(path, 'none')}",
            allowed=f"{wanted.get(path, 'no such parameter')}",
            fix="a tree like vlm.params",
        )


def check_compressor(
    model: VisionLanguageModel, variable: bool = False, params: Mapping[str, Any] | None = None
) -> None:
    """Raises UserError for a compressor that this model cannot have, before anything runs.

    Args:
      model: at its nominal image size.
      variable: see `gather.capped`; where the prompt decides the number of tokens, a larger budget
        is not an error yet.
      params: that are there, stacked or split; None for those of a published checkpoint.
    """
    if model.encoder is None:
        if model.compressor["name"] != "none":
            raise UserError(
                f"compressor.name: {model.compressor['name']}, but this model sees no images"
            )
        return
    model = capped(model, math.prod(model.slot_grid), 1, variable)
    held = flatten_dict(dict(params or {}), sep="/")
    lacking = [
        path
        for path, leaf in sorted(own_weights(model).items())
        if path not in held or held[path].shape != leaf.shape
    ]
    if lacking:
        raise UserError(
            f"compressor.name: {model.compressor['name']} has weights of its own ({lacking[0]}), "
            "which this checkpoint does not hold",
            allowed="training-free methods, see docs/compressors.md",
            fix="train it (configs/finetune.py with this model.compressor) and load that workdir",
        )


def own_weights(model: VisionLanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of each parameter of the compressor, which no published checkpoint holds."""
    wanted = parameter_shapes(model)
    if model.in_place:  # It has no form without one.
        return {p: leaf for p, leaf in wanted.items() if p.split("/")[0] in ("connect", "reduce")}
    published = parameter_shapes(model.clone(compressor={"name": "none"}))
    return {path: wanted[path] for path in wanted.keys() - published.keys()}


def refuse_own_weights(model: VisionLanguageModel) -> None:
    """Raises UserError where the compressor in use has weights of its own: no layout of a hub, and
    none of adapters, has a place for them."""
    if own := own_weights(model):
        raise UserError(
            f"save: the compressor has weights of its own ({min(own)}), for which neither "
            "Hugging Face's layout nor PEFT's has a place",
            allowed="models whose compressor is training-free, or none",
            fix='with_compressor("none") for the rest; or load the workdir of the run, as it is',
        )
