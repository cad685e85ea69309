"""The model of a config.json and the shapes of its parameters, without weights."""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from efficient_vlm.checkpoints.foreign import ADAPTER_CONFIG, adapter_of
from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.checkpoints.safetensors_format import refuse_pointer
from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.defaults import complete
from efficient_vlm.families.heads import with_head
from efficient_vlm.families.table import FAMILIES, family_of, refuse_layout
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.hub_tokenizer import special_id


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """config.json of a model, completed with the defaults of its classes.

    Whether the head is the embedding table is as the weights have it, see `heads.with_head`.

    Args:
      path: a directory, or its weights by name.

    Raises:
      UserError: no config.json, not a JSON object, another layout of a known model, or a size that
        no model has.
    """
    directory, weights = locate(path)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json", fix="give a directory with config.json and safetensors"
        )
    text = path.read_bytes()
    refuse_pointer(text, path)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}", fix="download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object", fix="download it again")
    refuse_layout(config)
    if (directory / ADAPTER_CONFIG).is_file():
        kind, _ = adapter_of(directory)
        warnings.warn(f"{directory}: holds a {kind} adapter, which is not applied", stacklevel=2)
    config = complete(with_head(config, weights))
    family = FAMILIES.get(config.get("model_type"))
    for name, token in family.special_ids.items() if family else ():
        if name not in config and (token_id := special_id(directory, token)) is not None:
            config[name] = token_id
    return config


def build_model(
    config: Config, *, dtype: Any = jnp.float32, compressor: Mapping[str, Any] | None = None
) -> VisionLanguageModel:
    """The model of a config.json, without weights.

    Args:
      config: content of config.json.
      dtype: of activations.
      compressor: name, budget and options, see `compressors.build`; None for all tokens.

    Raises:
      UserError: an unknown family, or a config that is not one of its family.
    """
    family, config = family_of(config), complete(config)
    fix = "use the config.json that came with the weights"
    try:
        fields = family.model(config)
        # Values of a wrong type raise where they are used, which is when shapes are made.
        abstract_parameters(VisionLanguageModel(**fields))
    except KeyError as error:
        raise UserError(
            f"config.json: no {short(error.args[0])}, which every {config['model_type']} model has",
            fix=fix,
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json: {first_line(error)}", fix=fix) from error
    if compressor is not None:
        fields = {**fields, "compressor": dict(compressor)}
    return VisionLanguageModel(**fields, dtype=dtype)


def parameter_shapes(model: VisionLanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of each parameter in split form, without computing anything."""
    return flatten_dict(jax.eval_shape(unstack, abstract_parameters(model)), sep="/")


def name_map(
    family: Family, config: Config, model: VisionLanguageModel, spelling: str = "hub"
) -> NameMap:
    """The name map of a model, checked to cover every parameter."""
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).items()}
    names = NameMap(shapes)
    family.tensors(names, complete(config), spelling)
    if missing := names.missing():
        raise ValueError(f"{family.name}: no tensor is named for {missing[:3]} of {len(missing)}")
    return names
