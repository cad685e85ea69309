"""The product of activations and weights, and the forms that weights can take.

Every product of every module is computed here: `Linear` (a module), `product` (a function of a
weight), `head_product` (with an embedding table), `grouped` (of experts). A weight is a `jax.Array`
or a `WeightForm`, a pytree that replaces the array among the parameters, so that models with
joined, adapted or quantised weights need no other modules.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen import module as linen_module
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from efficient_vlm.kernels.grouped_matmul import grouped_matmul
from efficient_vlm.nn.weight_form import WeightForm
from efficient_vlm.shapes import Array

Dtype = DTypeLike


def logical(init, *axes: str | None):
    """`init` with logical axis names attached, for rules to map onto a mesh."""
    return nn.with_logical_partitioning(init, axes)


# --- forms of weights ----------------------------------------------------------------------------


# Any: qwix replaces arrays by types of its own.
Weight = Array | WeightForm | Any


@struct.dataclass
class Joined(WeightForm):
    """Concatenated weights of one input, which `fuse.fuse` creates for inference.

    It replaces the first of them, and the others are absent. One product reads weights in fewer and
    larger pieces: a fifth faster on a CPU for a few tokens.

    Attributes:
      matrix: [inputs, all outputs].
      outputs: shape of each part's outputs.
    """

    matrix: Weight
    outputs: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: Dtype
    ) -> Float[Array, "*rows outputs"]:
        """[..., *inputs] -> [..., all outputs]."""
        x = x.reshape(*x.shape[: x.ndim - contracted], -1)
        return product(x, self.matrix, dtype)

    def split(self, y: Float[Array, "*rows outputs"]) -> list[Float[Array, "..."]]:
        """[..., all outputs] -> [..., *outputs] of each part."""
        ends = [sum(map(math.prod, self.outputs[: i + 1])) for i in range(len(self.outputs))]
        parts = jnp.split(y, ends[:-1], axis=-1)
        return [
            part.reshape(*y.shape[:-1], *shape)
            for part, shape in zip(parts, self.outputs, strict=True)
        ]


@struct.dataclass
class Pair(WeightForm):
    """Two weights of experts, in any forms, side by side: [E, D, F + G]. Each has its product.

    Attributes:
      first, second: [E, D, F] and [E, D, G].
    """

    first: Weight
    second: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, D, F + G]."""
        return (*self.first.shape[:-1], self.first.shape[-1] + self.second.shape[-1])

    def grouped(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], room: int
    ) -> Float[Array, "M FG"]:
        """[M, D] -> [M, F + G]."""
        parts = (grouped(x, weight, sizes, room) for weight in (self.first, self.second))
        return jnp.concatenate(list(parts), axis=-1)

    def batched(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C FG"]:
        """[B, E, C, D] -> [B, E, C, F + G]."""
        parts = (batched(x, weight) for weight in (self.first, self.second))
        return jnp.concatenate(list(parts), axis=-1)


# --- products ------------------------------------------------------------------------------------

# JAX's own code: libraries that quantise (qwix) replace the code of this function.
_PLAIN_DOT = lax.dot_general.__code__


def intercepted() -> bool:
    """Whether calls of modules or products are intercepted (`nn.intercept_methods`, qwix).

    Each product is then computed separately, in the shape of its stored weight.
    """
    stack = linen_module._global_interceptor_stack
    return bool(stack) or lax.dot_general.__code__ is not _PLAIN_DOT


def product(
    x: Float[Array, "*rows_inputs"], weight: Weight, dtype: Dtype, contracted: int = 1
) -> Float[Array, "*rows_outputs"]:
    """x [..., *inputs] times weight [*inputs, *outputs], computed in `dtype`: [..., *outputs].

    For weights stored in bfloat16 (never in training), CPUs compute in float32 and round: XLA's
    products with a bfloat16 result are several times slower on them.

    Args:
      x: activations.
      weight: an array or a form of one.
      dtype: of the product.
      contracted: number of input axes.
    """
    if isinstance(weight, WeightForm):
        return weight.dot(x, contracted, dtype)
    x, outer = x.astype(dtype), x.ndim - contracted
    if intercepted():
        # qwix's replacement of a weight has the weight's shape and keeps its dtype.
        weight = weight.astype(dtype) if isinstance(weight, jax.Array) else weight
        axes = tuple(range(outer, x.ndim)), tuple(range(contracted))
        return lax.dot_general(x, weight, (axes, ((), ())))
    # A product of two matrices: with a stack of matrices its gradients cost twice as much on CPUs.
    shape = (*x.shape[:outer], *weight.shape[contracted:])
    size = math.prod(weight.shape[:contracted])
    rows, matrix = x.reshape(-1, size), weight.astype(dtype).reshape(size, -1)
    if weight.dtype == matrix.dtype == jnp.bfloat16:
        y = lax.platform_dependent(rows, matrix, cpu=_product_on_cpu, default=_dot)
    else:
        y = _dot(rows, matrix)
    return y.reshape(shape)


def _dot(x: Float[Array, "M D"], matrix: Float[Array, "D F"]) -> Float[Array, "M F"]:
    return lax.dot_general(x, matrix, (((1,), (0,)), ((), ())))


# XLA's CPU backend is slow for a single row even so; eight rows take as long as two.
_LEAST_ROWS = 8


def _product_on_cpu(x: Float[Array, "M D"], matrix: Float[Array, "D F"]) -> Float[Array, "M F"]:
    count = len(x)
    if count == 1:
        x = jnp.pad(x, ((0, _LEAST_ROWS - 1), (0, 0)))
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)[:count].astype(x.dtype)


def take(table: Weight, rows: Int[Array, "*rows"], dtype: Dtype) -> Float[Array, "*rows D"]:
    """Rows of an embedding table [V, D]: int [...] -> [..., D]."""
    if isinstance(table, WeightForm):
        return table.take(rows, dtype)
    return jnp.take(table, rows, axis=0).astype(dtype)


def head_product(
    x: Float[Array, "*rows D"], table: Weight, dtype: Dtype, rows: int | None = None
) -> Float[Array, "*rows V"]:
    """x [..., D] times the first `rows` of an embedding table [V, D]: [..., rows]."""
    if isinstance(table, WeightForm):
        return product(x, table.transposed(rows), dtype)
    return product(x, table[:rows].T, dtype)


def grouped(
    x: Float[Array, "M D"], weight: Weight, sizes: Int[Array, " E"], room: int = 1
) -> Float[Array, "M F"]:
    """Rows [M, D] sorted by expert, each times its expert's weight of [E, D, F]: [M, F].

    Args: see `kernels.grouped_matmul.grouped_matmul`.
    """
    if isinstance(weight, WeightForm):
        return weight.grouped(x, sizes, room)
    return grouped_matmul(x, weight, sizes, room)


def batched(x: Float[Array, "B E C D"], weight: Weight) -> Float[Array, "B E C F"]:
    """Slots [B, E, C, D] of each expert times its weight of [E, D, F]: [B, E, C, F]."""
    if isinstance(weight, WeightForm):
        return weight.batched(x)
    return jnp.einsum("becd,edf->becf", x, weight)


def beside(first: Weight, second: Weight) -> Weight:
    """Concatenates two weights of experts on the last axis."""
    if isinstance(first, WeightForm) or isinstance(second, WeightForm):
        return Pair(first, second)
    return jnp.concatenate([first, second], axis=-1)


def specs_of(weight: Weight, spec: PartitionSpec) -> Any:
    """The sharding of a weight as a tree of its arrays, see `WeightForm.specs`."""
    return weight.specs(spec) if isinstance(weight, WeightForm) else spec


def weight_of(
    module: nn.Module, name: str, init: Any, shape: Sequence[int], axes: Sequence, dtype: Dtype
) -> Weight:
    """The parameter `name` of a module other than `Linear`, with logical axes: an array in `dtype`
    or the form that replaces it."""
    stored = module.get_variable("params", name)
    if isinstance(stored, WeightForm):
        return stored
    return module.param(name, logical(init, *axes), tuple(shape), jnp.float32).astype(dtype)


# --- the module ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """A product over the last `len(inputs)` axes of x, with an optional bias.

    Attributes:
      inputs: logical names of the contracted axes.
      features: sizes of the new axes.
      outputs: logical names of the new axes.
      scale: standard deviation of the initial kernel times sqrt(fan-in).
      bias: whether a bias, at first zero, is added.
    """

    inputs: Sequence[str | None]
    features: Sequence[int]
    outputs: Sequence[str | None]
    scale: float = 1.0
    dtype: Dtype = jnp.float32
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rows_inputs"]) -> Float[Array, "*rows_features"]:
        """[..., *inputs] -> [..., *features]; of joined weights [..., all features]."""
        y = product(x, self._kernel(x), self.dtype, len(self.inputs))
        if not self.bias:
            return y
        if self.joined is not None:
            bias = self.get_variable("params", "bias")
        else:
            init = logical(nn.initializers.zeros, *self.outputs)
            bias = self.param("bias", init, self.features, jnp.float32)
        return y + bias.astype(self.dtype)

    @property
    def joined(self) -> Joined | None:
        """The concatenated weights of this and other products (`fuse.fuse`), or None."""
        stored = self.get_variable("params", "kernel")
        return stored if isinstance(stored, Joined) else None

    def _kernel(self, x: jax.Array) -> Weight:
        stored = self.get_variable("params", "kernel")
        if isinstance(stored, WeightForm):
            return stored
        contracted = x.shape[-len(self.inputs) :]
        init = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "normal",
            in_axis=tuple(range(len(contracted))),
            out_axis=tuple(range(len(contracted), len(contracted) + len(self.features))),
        )
        init = logical(init, *self.inputs, *self.outputs)
        return self.param("kernel", init, (*contracted, *self.features), jnp.float32)


def together(x: Float[Array, "*rows_inputs"], *linears: Linear) -> list[Float[Array, "..."]]:
    """Several products of one input, x [..., *inputs] -> [..., *features] of each.

    Joined weights take a single product.
    """
    joined = linears[0].joined
    if joined is None:
        return [linear(x) for linear in linears]
    return joined.split(linears[0](x))
