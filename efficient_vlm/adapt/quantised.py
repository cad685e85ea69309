"""Weights as codes of 8 or 4 bits, which products turn into numbers again.

They are frozen bases of adapters: gradients pass through them to their inputs, and there are none
of the codes. A backward pass makes the numbers again instead of keeping them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from efficient_vlm.errors import UserError
from efficient_vlm.nn.linear import WeightForm, batched, grouped, product
from efficient_vlm.shapes import Array

__all__ = ["BLOCK", "NF4", "NF4_CODE", "Doubled", "Int8", "Quantised", "over_leading"]

# QLoRA (arXiv 2305.14314), appendix E: the values of the data type, for blocks with a largest
# absolute value of one.
NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # Weights that share a constant, and constants that share one of the second kind.
_SECOND_BLOCK = 256


class Quantised(WeightForm):
    """Base of the forms whose numbers come from codes; a form has `dequantised` and `shape`."""

    def dequantised(self, dtype: DTypeLike) -> jax.Array:
        """The numbers, in the shape of the weight."""
        raise NotImplementedError

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: DTypeLike
    ) -> Float[Array, "*rows_outputs"]:
        """See `WeightForm.dot`."""
        return _again(lambda x, form: product(x, form.dequantised(dtype), dtype, contracted))(
            x, self
        )

    def grouped(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], room: int
    ) -> Float[Array, "M F"]:
        """See `WeightForm.grouped`."""
        return _again(lambda x, form: grouped(x, form.dequantised(x.dtype), sizes, room))(x, self)

    def batched(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C F"]:
        """See `WeightForm.batched`."""
        return _again(lambda x, form: batched(x, form.dequantised(x.dtype)))(x, self)


def _again(function: Callable) -> Callable:
    """`function`, whose backward pass makes the numbers again: they are as large as the weight."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable)


# --- 8 bits --------------------------------------------------------------------------------------


@struct.dataclass
class Int8(Quantised):
    """codes * scale: symmetric, one scale for each output channel (for each row of a table).

    Attributes:
      codes: int8, in the shape of the weight, -127 to 127.
      scale: float32, of size one along the axes that share a scale.
    """

    codes: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, weight: jax.Array, axes: Sequence[int]) -> "Int8":
        """Quantises a weight.

        Args:
          weight: float.
          axes: those that share a scale: the inputs of a product.
        """
        weight = weight.astype(jnp.float32)
        largest = jnp.max(jnp.abs(weight), axis=tuple(axes), keepdims=True)
        scale = largest / 127
        codes = jnp.round(weight / jnp.where(scale > 0, scale, 1))
        return cls(codes.astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    def dequantised(self, dtype: DTypeLike) -> jax.Array:
        """codes * scale, multiplied in float32."""
        return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: DTypeLike
    ) -> Float[Array, "*rows_outputs"]:
        """The product with the codes, which are exact in any dtype; then the scale."""

        def multiply(x, form):
            scale = form.scale.reshape(form.scale.shape[contracted:])
            return product(x, form.codes.astype(dtype), dtype, contracted) * scale.astype(dtype)

        return _again(multiply)(x, self)

    def take(self, rows: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """Rows of a table that has a scale for each row."""
        return Int8(self.codes[rows], self.scale[rows]).dequantised(dtype)

    def transposed(self, rows: int | None) -> "Int8":
        """The first rows as columns."""
        return Int8(self.codes[:rows].T, self.scale[:rows].T)

    def specs(self, spec: PartitionSpec) -> "Int8":
        """Codes like the weight; the scale has nothing along the inputs of experts [E, D, F]."""
        expert, _, outputs = spec
        return Int8(spec, PartitionSpec(expert, None, outputs))


# --- 4 bits --------------------------------------------------------------------------------------


@struct.dataclass
class Doubled:
    """Constants of blocks, quantised in turn (QLoRA, section 3, "Double Quantization").

    The mean is taken off, and 256 values share a constant; the codes are floats of 8 bits, with 3
    of mantissa.

    Attributes:
      codes: float8_e4m3fn [..., n, 256], the last block padded with zeros.
      scale: float32 [..., n].
      mean: float32 [...].
    """

    codes: jax.Array
    scale: jax.Array
    mean: jax.Array

    @classmethod
    def of(cls, constants: jax.Array) -> "Doubled":
        """Quantises float32 constants of any shape."""
        mean = constants.mean()
        flat = (constants - mean).reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % _SECOND_BLOCK)).reshape(-1, _SECOND_BLOCK)
        scale = jnp.max(jnp.abs(blocks), axis=-1) / float(jnp.finfo(jnp.float8_e4m3fn).max)
        codes = blocks / jnp.where(scale > 0, scale, 1)[:, None]
        return cls(codes.astype(jnp.float8_e4m3fn), scale, mean)

    def constants(self, shape: Sequence[int]) -> jax.Array:
        """float32 constants again, in their shape."""
        flat = (self.codes.astype(jnp.float32) * self.scale[:, None]).reshape(-1)
        return flat[: math.prod(shape)].reshape(shape) + self.mean


@struct.dataclass
class NF4(Quantised):
    """NormalFloat of 4 bits in blocks of 64 (QLoRA, arXiv 2305.14314, section 3 and appendix E).

    The weight is a matrix [K, F] of all inputs and all outputs. A block is 64 inputs of one output:
    where 64 divides K, these are the blocks of the flat [F, K] of the paper. Two neighbouring
    inputs share a byte, the first in its low half.

    Attributes:
      codes: uint8 [..., 32 * blocks, F].
      constants: float32 [..., blocks, F], the largest absolute value of each block, or `Doubled`.
      matrix: shape of the weight, without leading axes of layers and experts.
      contracted: how many axes of it are inputs.
    """

    codes: jax.Array
    constants: Any
    matrix: tuple[int, ...] = struct.field(pytree_node=False)
    contracted: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, weight: jax.Array, contracted: int, leading: int = 0, double: bool = True) -> "NF4":
        """Quantises a weight.

        Args:
          weight: float [*leading, *inputs, *outputs].
          contracted: number of axes of inputs.
          leading: number of axes of layers and experts.
          double: whether the constants are quantised as well.
        """
        shape = weight.shape[leading:]
        codes, constants = over_leading(lambda w: _encode(w, contracted, double), weight, leading)
        return cls(codes, constants, shape, contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        """[*leading, *inputs, *outputs]."""
        return (*self.codes.shape[:-2], *self.matrix)

    def dequantised(self, dtype: DTypeLike) -> jax.Array:
        """The numbers in the shape of the weight."""
        leading = self.codes.ndim - 2
        parts = (self.codes, self.constants)
        return over_leading(lambda part: self._decode(*part, dtype), parts, leading)

    def _decode(self, codes, constants, dtype):
        blocks, outputs = codes.shape[0] * 2 // BLOCK, codes.shape[1]
        if isinstance(constants, Doubled):
            constants = constants.constants((blocks, outputs))
        both = jnp.stack([codes & 15, codes >> 4], axis=1)  # [32 * blocks, 2, F]
        values = jnp.asarray(NF4_CODE, jnp.float32)[both].reshape(blocks, BLOCK, outputs)
        inputs = math.prod(self.matrix[: self.contracted])
        values = (values * constants[:, None]).reshape(-1, outputs)[:inputs]
        return values.reshape(self.matrix).astype(dtype)

    def specs(self, spec: PartitionSpec) -> "NF4":
        """See `WeightForm.specs`: each device has all codes of its experts.

        Raises:
          UserError: a mesh that shards inputs or outputs over "tensor", which cuts blocks.
        """
        if "tensor" in tuple(spec):
            raise UserError(
                "adapt.base: nf4 of experts, on a mesh with tensor > 1",
                allowed="meshes of data, fsdp and expert",
                fix="use base=int8, or train.mesh.tensor=1",
            )
        return jax.tree.map(lambda _: PartitionSpec(spec[0]), self)


def _encode(weight: jax.Array, contracted: int, double: bool) -> tuple[jax.Array, Any]:
    """Codes and constants of one matrix."""
    inputs = math.prod(weight.shape[:contracted])
    matrix = weight.astype(jnp.float32).reshape(inputs, -1)
    blocks = jnp.pad(matrix, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, matrix.shape[1])
    constants = jnp.max(jnp.abs(blocks), axis=1)
    unit = blocks / jnp.where(constants > 0, constants, 1)[:, None]
    middles = [(low + high) / 2 for low, high in zip(NF4_CODE, NF4_CODE[1:], strict=False)]
    codes = sum((unit > middle).astype(jnp.uint8) for middle in middles)
    low, high = (codes.reshape(-1, 2, matrix.shape[1])[:, i] for i in (0, 1))
    return low | (high << 4), Doubled.of(constants) if double else constants


def over_leading(function: Callable, tree: Any, leading: int) -> Any:
    """`function` of each slice of arrays along their first axes, one after another.

    Args:
      function: of a tree of arrays without these axes.
      tree: arrays that share these axes.
      leading: their number.
    """
    for _ in range(leading):
        function = _mapped(function)
    return function(tree)


def _mapped(function: Callable) -> Callable:
    return lambda tree: lax.map(function, tree)
