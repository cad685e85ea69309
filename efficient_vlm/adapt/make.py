"""New arrays of adapted parameters, from the old ones or from their shapes."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.forms import Adapter, DoRA, LoRA
from efficient_vlm.adapt.places import Place
from efficient_vlm.adapt.prompts import Extended
from efficient_vlm.adapt.quantised import NF4, Doubled, Int8
from efficient_vlm.nn.attention import PREFIX
from efficient_vlm.nn.linear import Weight
from efficient_vlm.sharding import is_box

__all__ = ["changed", "extended", "with_prefix"]

Axes = tuple[str | None, ...]


def changed(leaf: Any, place: Place, config: AdaptConfig, adapter: bool, coded: bool) -> Any:
    """The form that replaces one weight.

    Args:
      leaf: an array or its shape, with its axes or without; so are the arrays of the result.
      place: of the weight.
      config: the settings.
      adapter: whether it gets factors.
      coded: whether it is quantised.
    """

    def make(weight: jax.Array) -> Weight:
        base = _coded(weight, place, config) if coded else weight
        return _adapter(base, place, config) if adapter else base

    form = _on_shapes(make, nn.unbox(leaf))
    return _boxed_form(form, place, leaf) if is_box(leaf) else form


def _on_shapes(make: Callable, leaf: Any) -> Any:
    """`make` of an array, or its shapes for the shape of one."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(make, leaf)
    return make(leaf)


def _coded(weight: jax.Array, place: Place, config: AdaptConfig) -> Weight:
    if config.base_form == "nf4":
        return NF4.of(weight, place.inputs, place.leading, config.double)
    return Int8.of(weight, range(place.leading, place.leading + place.inputs))


def _adapter(base: Weight, place: Place, config: AdaptConfig) -> Adapter:
    """An adapter that changes nothing yet: `b` is zero.

    `a` is uniform within 1 / sqrt(fan-in), in float32.
    """
    shape, last = tuple(base.shape), place.leading + place.inputs
    bound = math.prod(shape[place.leading : last]) ** -0.5
    key = _key(place.path, config)
    a = jax.random.uniform(key, (*shape[:last], config.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[: place.leading], config.rank, *shape[last:]), jnp.float32)
    return (DoRA.of if config.name == "dora" else LoRA)(base, a, b, scale=config.scale)


def _key(path: str, config: AdaptConfig) -> jax.Array:
    """A key of its own for each path, whatever else is adapted."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(path.encode()))


def extended(table: Any, config: AdaptConfig) -> Extended:
    """An embedding table with trained rows, at first random rows of it (arXiv 2104.08691, 3.3)."""

    def rows(array: jax.Array) -> jax.Array:
        ids = jax.random.randint(_key("rows", config), (config.tokens,), 0, array.shape[0])
        return array[ids].astype(jnp.float32)

    made = _on_shapes(rows, nn.unbox(table))
    return Extended(table, _boxed(made, (None, "embed"), table))


def with_prefix(params: Mapping[str, Any], config: AdaptConfig) -> dict[str, Any]:
    """Parameters with keys and values in front of every layer of the decoder (arXiv 2101.00190).

    They are parameters themselves, without the MLP that the paper trains them through, and have no
    positions: other tokens keep theirs.
    """

    def walk(tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        more = {name: walk(value, f"{path}/{name}") for name, value in tree.items()}
        if path.endswith("/attention"):
            for name in PREFIX:
                more[name] = _prefix(tree["key"]["kernel"], f"{path}/{name}", config)
        return more

    return {**params, "language": walk(params["language"], "language")}


def _prefix(kernel: Any, path: str, config: AdaptConfig) -> Any:
    """[*leading, n, Hkv, Dh] beside a kernel [*leading, D, Hkv, Dh]."""

    def make(array: jax.Array) -> jax.Array:
        shape = (*array.shape[:-3], config.tokens, *array.shape[-2:])
        return 0.02 * jax.random.normal(_key(path, config), shape, jnp.float32)

    made = _on_shapes(make, nn.unbox(kernel))
    leading = ("layers",) * (len(made.shape) - 3)
    return _boxed(made, (*leading, None, "kv_heads", "head_dim"), kernel)


# --- logical axes --------------------------------------------------------------------------------


def _boxed(value: Any, axes: Axes, like: Any) -> Any:
    """An array with the names of its axes, if `like` has some."""
    return like.replace(value=value, names=axes) if is_box(like) else value


def _boxed_form(form: Weight, place: Place, like: Any) -> Any:
    box = functools.partial(_boxed, like=like)
    leading = place.axes[: place.leading]
    inputs, outputs = place.input_axes[place.leading :], place.output_axes
    if isinstance(form, Adapter):
        fields = dict(
            base=_boxed_form(form.base, place, like),
            a=box(form.a, (*leading, *inputs, None)),
            b=box(form.b, (*leading, None, *outputs)),
        )
        if isinstance(form, DoRA):
            fields["magnitude"] = box(form.magnitude, (*leading, *outputs))
        return form.replace(**fields)
    if isinstance(form, Int8):
        scale = box(form.scale, (*leading, *(None,) * len(inputs), *outputs))
        return form.replace(codes=box(form.codes, place.axes), scale=scale)
    if isinstance(form, NF4):
        # Of several axes in one, the first decides where an array is cut.
        codes = box(form.codes, (*leading, inputs[0], outputs[0]))
        return form.replace(codes=codes, constants=_boxed_constants(form, leading, outputs, box))
    return box(form, place.axes)


def _boxed_constants(form: NF4, leading: Axes, outputs: Axes, box: Callable) -> Any:
    constants = form.constants
    if not isinstance(constants, Doubled):
        return box(constants, (*leading, None, outputs[0]))
    return Doubled(
        codes=box(constants.codes, (*leading, None, None)),
        scale=box(constants.scale, (*leading, None)),
        mean=box(constants.mean, leading),
    )
