"""The one product of activations with weights, and the forms that weights can have.

Every product of every module comes through here: `Linear` (a module), `product` (a function of a
weight), `head_product` (with an embedding table), `grouped` (of experts). A weight is a `jax.Array`
or a `WeightForm`, a pytree that lies in the place of the array among the parameters: a model whose
weights are joined, adapted or quantised needs no other module.
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

from efficient_vlm.kernels.grouped_matmul import grouped_matmul

Dtype = jnp.dtype | str


def logical(init, *axes: str | None):
    """`init` with logical axis names attached, for rules to map onto a mesh."""
    return nn.with_logical_partitioning(init, axes)


# --- forms of weights ----------------------------------------------------------------------------


class WeightForm:
    """What lies in the place of a weight array.

    A form is a `flax.struct.dataclass` with this as a base. `dot` is the one method that it must
    have; the others serve embedding tables (`take`, `transposed`) and experts (`grouped`,
    `batched`, `beside`).
    """

    def dot(self, x: jax.Array, contracted: int, dtype: Dtype) -> jax.Array:
        """x [..., *inputs] times the weight [*inputs, *outputs], `contracted` axes being inputs:
        [..., *outputs] in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__}: no product")

    def take(self, rows: jax.Array, dtype: Dtype) -> jax.Array:
        """Rows of a table [V, D]: int [...] -> [..., D] in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__}: not for embedding tables")

    def transposed(self, rows: int | None) -> "WeightForm":
        """A table [V, D], its first `rows`, as the weight [D, rows] of the head."""
        raise NotImplementedError(f"{type(self).__name__}: not for embedding tables")

    def grouped(self, x: jax.Array, sizes: jax.Array, room: int) -> jax.Array:
        """Rows [M, D] sorted by expert, each times the weight of its expert: [M, F]."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")

    def batched(self, x: jax.Array) -> jax.Array:
        """Places [B, E, C, D] of each expert times its weight: [B, E, C, F]."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")

    def beside(self, other: Any) -> "WeightForm":
        """This weight and another one of the same form side by side in the last axis."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")


Weight = jax.Array | WeightForm


@struct.dataclass
class Joined(WeightForm):
    """Weights that multiply one input, side by side; `nn.fuse` makes them, for inference.

    It lies in the place of the first of them; the others have none. One product is fewer and larger
    reads of weights: a fifth faster on a CPU for a few tokens.

    Attributes:
      matrix: [inputs, all outputs].
      outputs: shape of each part's outputs.
    """

    matrix: Weight
    outputs: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)

    def dot(self, x: jax.Array, contracted: int, dtype: Dtype) -> jax.Array:
        """[..., *inputs] -> [..., all outputs]."""
        x = x.reshape(*x.shape[: x.ndim - contracted], -1)
        return product(x, self.matrix, dtype)

    def split(self, y: jax.Array) -> list[jax.Array]:
        """[..., all outputs] -> [..., *outputs] of each part."""
        ends = [sum(map(math.prod, self.outputs[: i + 1])) for i in range(len(self.outputs))]
        parts = jnp.split(y, ends[:-1], axis=-1)
        return [
            part.reshape(*y.shape[:-1], *shape)
            for part, shape in zip(parts, self.outputs, strict=True)
        ]


# --- products ------------------------------------------------------------------------------------

# What JAX came with: libraries that quantise (qwix) put other code into this very function.
_PLAIN_DOT = lax.dot_general.__code__


def intercepted() -> bool:
    """Whether somebody looks at, or replaces, what modules do (`nn.intercept_methods`, qwix).

    Each product is then computed for itself, in the shape in which its weight is stored.
    """
    stack = linen_module._global_interceptor_stack
    return bool(stack) or lax.dot_general.__code__ is not _PLAIN_DOT


def product(x: jax.Array, weight: Weight, dtype: Dtype, contracted: int = 1) -> jax.Array:
    """x [..., *inputs] times weight [*inputs, *outputs], computed in `dtype`: [..., *outputs].

    Where the weight is stored in bfloat16, which no parameter in training is, a CPU is asked for
    float32 and rounds: XLA's products with a result in bfloat16 are several times slower there.

    Args:
      x: activations.
      weight: an array, or a form of one.
      dtype: of the product.
      contracted: how many axes are inputs.
    """
    if isinstance(weight, WeightForm):
        return weight.dot(x, contracted, dtype)
    x, outer = x.astype(dtype), x.ndim - contracted
    if intercepted():
        # What qwix makes of a weight has the weight's own shape, and takes no other dtype.
        weight = weight.astype(dtype) if isinstance(weight, jax.Array) else weight
        axes = tuple(range(outer, x.ndim)), tuple(range(contracted))
        return lax.dot_general(x, weight, (axes, ((), ())))
    # As one product of two matrices: the CPU backend's gradients of a product over a stack of
    # matrices cost twice as much.
    shape = (*x.shape[:outer], *weight.shape[contracted:])
    size = math.prod(weight.shape[:contracted])
    rows, matrix = x.reshape(-1, size), weight.astype(dtype).reshape(size, -1)
    if weight.dtype == matrix.dtype == jnp.bfloat16:
        y = lax.platform_dependent(rows, matrix, cpu=_product_on_cpu, default=_dot)
    else:
        y = _dot(rows, matrix)
    return y.reshape(shape)


def _dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return lax.dot_general(x, matrix, (((1,), (0,)), ((), ())))


# XLA's CPU takes the slow way for one row even so; eight take as long as two.
_LEAST_ROWS = 8


def _product_on_cpu(x: jax.Array, matrix: jax.Array) -> jax.Array:
    count = len(x)
    if count == 1:
        x = jnp.pad(x, ((0, _LEAST_ROWS - 1), (0, 0)))
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)[:count].astype(x.dtype)


def take(table: Weight, rows: jax.Array, dtype: Dtype) -> jax.Array:
    """Rows of an embedding table [V, D]: int [...] -> [..., D]."""
    if isinstance(table, WeightForm):
        return table.take(rows, dtype)
    return jnp.take(table, rows, axis=0).astype(dtype)


def head_product(x: jax.Array, table: Weight, dtype: Dtype, rows: int | None = None) -> jax.Array:
    """x [..., D] times the first `rows` of an embedding table [V, D]: [..., rows]."""
    if isinstance(table, WeightForm):
        return product(x, table.transposed(rows), dtype)
    return product(x, table[:rows].T, dtype)


def grouped(x: jax.Array, weight: Weight, sizes: jax.Array, room: int = 1) -> jax.Array:
    """Rows [M, D] sorted by expert times weights [E, D, F], each row by that of its expert: [M, F].

    Args: see `kernels.grouped_matmul.grouped_matmul`.
    """
    if isinstance(weight, WeightForm):
        return weight.grouped(x, sizes, room)
    return grouped_matmul(x, weight, sizes, room)


def batched(x: jax.Array, weight: Weight) -> jax.Array:
    """Places [B, E, C, D] of each expert times weights [E, D, F]: [B, E, C, F]."""
    if isinstance(weight, WeightForm):
        return weight.batched(x)
    return jnp.einsum("becd,edf->becf", x, weight)


def beside(first: Weight, second: Weight) -> Weight:
    """Two weights of one form side by side in the last axis."""
    if isinstance(first, WeightForm):
        return first.beside(second)
    return jnp.concatenate([first, second], axis=-1)


def weight_of(
    module: nn.Module, name: str, init: Any, shape: Sequence[int], axes: Sequence, dtype: Dtype
) -> Weight:
    """The parameter `name` of a module that is no `Linear`, with logical axes: an array in `dtype`,
    or the form that lies in its place."""
    stored = module.get_variable("params", name)
    if isinstance(stored, WeightForm):
        return stored
    return module.param(name, logical(init, *axes), tuple(shape), jnp.float32).astype(dtype)


# --- the module ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """A product over the last `len(inputs)` axes of x, and a bias if asked for.

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
    def __call__(self, x: jax.Array) -> jax.Array:
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
        """The weights of this and of other products, where they lie here (`nn.fuse`)."""
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


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """Products of one input, x [..., *inputs] -> [..., *features] of each.

    They are one product where their weights are joined.
    """
    joined = linears[0].joined
    if joined is None:
        return [linear(x) for linear in linears]
    return joined.split(linears[0](x))
