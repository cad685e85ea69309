"""From parameters to adapted ones, to what is trained of them, and back to plain arrays."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.forms import Adapter, plain
from efficient_vlm.adapt.make import changed, extended, with_prefix
from efficient_vlm.adapt.places import is_form, places
from efficient_vlm.adapt.prompts import Extended
from efficient_vlm.adapt.select import TARGETS, TRAINED, selected
from efficient_vlm.errors import UserError
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PREFIX
from efficient_vlm.nn.linear import WeightForm
from efficient_vlm.sharding import is_box, path_of

__all__ = ["Adapted", "combine", "is_adapted", "merge", "partition", "prepare", "without_adapters"]

_TABLE = "language/embedding"
# Fields of forms that are trained.
_FIELDS = ("a", "b", "magnitude", "rows")


class Adapted(NamedTuple):
    """Parameters of which some are forms, and what is trained of them.

    Attributes:
      params: as the model takes them.
      trainable: the same structure, True or False at each array.
    """

    params: Any
    trainable: Any


def prepare(params: Any, config: AdaptConfig, model: VisionLanguageModel | None = None) -> Adapted:
    """Adapts a model.

    At first it answers as before: exactly with a plain base, up to the rounding of codes with a
    quantised one, and but for what learned tokens change with "prompt" and "prefix".

    Args:
      params: arrays, or shapes (`jax.ShapeDtypeStruct`), for which nothing is computed; stacked or
        split, with their logical axes (new arrays get theirs) or without.
      config: the settings.
      model: that they are of; None where they have their axes.

    Raises:
      UserError: a pattern that matches nothing, or parameters that are adapted already.
    """
    if is_adapted(params):
        raise UserError("params: adapted already", fix="merge them first: adapt.build.merge")
    known = places(params, model)
    trained = selected("adapt.train", config.trained, known, TRAINED)
    targets, coded = _products(known, trained, config)

    def change(path: Any, leaf: Any) -> Any:
        name = path_of(path)
        if name in targets | coded:
            return changed(leaf, known[name], config, name in targets, name in coded)
        if name == _TABLE and config.name == "prompt":
            return extended(leaf, config)
        return leaf

    adapted = jax.tree_util.tree_map_with_path(change, params, is_leaf=is_form)
    if config.name == "prefix":
        adapted = with_prefix(adapted, config)
    return Adapted(adapted, _trainable(adapted, trained))


def _products(
    known: Mapping[str, Any], trained: set[str], config: AdaptConfig
) -> tuple[set[str], set[str]]:
    """The products that get an adapter, and those that are quantised."""
    if not config.low_rank:
        return set(), set()
    products = {path for path, place in known.items() if place.inputs}
    targets = selected("adapt.targets", config.targets, products, TARGETS) - trained
    if not targets:
        raise UserError(
            "adapt.targets: all of them are in adapt.train as well",
            fix="name products that are not trained themselves, or use adapt.name=full",
        )
    if not config.base_form:
        return targets, set()
    decoder = re.compile(f"{TARGETS['decoder']}|{TARGETS['experts']}")
    return targets, targets | {path for path in products - trained if decoder.search(path)}


def _trainable(params: Any, trained: set[str]) -> Any:
    """True or False at each array."""

    def flags(path: Any, leaf: Any) -> Any:
        name = path_of(path)
        if not isinstance(leaf, WeightForm):
            return name in trained or name.rpartition("/")[2] in PREFIX
        none = jax.tree.map(lambda _: False, leaf, is_leaf=is_box)
        return none.replace(**{field: True for field in _FIELDS if hasattr(leaf, field)})

    return jax.tree_util.tree_map_with_path(flags, params, is_leaf=is_form)


def is_adapted(params: Any) -> bool:
    """Whether any parameter is a form."""
    leaves = jax.tree.leaves(params, is_leaf=is_form)
    return any(isinstance(leaf, WeightForm) for leaf in leaves)


def partition(params: Any, trainable: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, and the rest, each as path -> array.

    A gradient of the first has no parts for the rest, and neither has the state of an optimizer.

    Args:
      params: arrays or shapes, with their logical axes or without.
      trainable: of `Adapted`.
    """
    flags = jax.tree_util.tree_leaves_with_path(trainable)
    is_trained = {path_of(path): flag for path, flag in flags}
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        name = path_of(path)
        parts[not is_trained[name]][name] = leaf
    return parts


def combine(trained: Mapping[str, Any], frozen: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `partition`: parameters in the structure of `like`, arrays or shapes."""

    def find(path: Any, _: Any) -> Any:
        name = path_of(path)
        return trained[name] if name in trained else frozen[name]

    return jax.tree_util.tree_map_with_path(find, like, is_leaf=is_box)


def without_adapters(params: Any) -> Any:
    """Parameters of the model that was adapted; nothing is copied."""

    def bare(leaf: Any) -> Any:
        return leaf.base if isinstance(leaf, Adapter) else leaf

    return jax.tree.map(bare, params, is_leaf=is_form)


def merge(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Parameters with one plain array for each adapted or quantised weight.

    Rows of prompt tuning, and keys and values of prefix tuning, are no part of any weight: they
    stay as they are.

    Args:
      params: of `Adapted`, without logical axes.
      dtype: of the merged weights, which are computed in float32; None leaves them there.
    """

    def merged(leaf: Any) -> Any:
        if isinstance(leaf, Extended):
            return leaf.replace(base=merged(leaf.base))
        if not isinstance(leaf, WeightForm):
            return leaf
        array = plain(leaf)
        return array if dtype is None else array.astype(dtype)

    return jax.tree.map(merged, nn.unbox(params), is_leaf=is_form)
