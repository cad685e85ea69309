"""Low-rank adapters as forms of weights: LoRA, rsLoRA and DoRA, on plain and quantised bases."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from efficient_vlm.adapt.quantised import Quantised
from efficient_vlm.errors import UserError
from efficient_vlm.nn.linear import (
    Weight,
    WeightForm,
    batched,
    grouped,
    product,
    specs_of,
    take,
)
from efficient_vlm.shapes import Array

__all__ = ["Adapter", "DoRA", "LoRA", "plain"]


class Adapter(WeightForm):
    """Base of adapters: a frozen `base` and the trained factors `a` and `b`.

    Attributes:
      base: [*leading, *inputs, *outputs]: an array, or codes (`quantised`).
      a: [*leading, *inputs, r].
      b: [*leading, r, *outputs].
      scale: static factor of their product.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    @property
    def leading(self) -> int:
        """Number of axes of layers and experts: both factors have them."""
        return self.a.ndim + self.b.ndim - 2 - len(self.base.shape)

    def merged(self) -> jax.Array:
        """The weight as one array, in float32."""
        raise NotImplementedError

    def _sum(self) -> jax.Array:
        """base + scale * a @ b in float32, in the shape of the base."""
        shape, leading, rank = self.shape, self.leading, self.b.shape[self.leading]
        a = self.a.astype(jnp.float32).reshape(*shape[:leading], -1, rank)
        b = self.b.astype(jnp.float32).reshape(*shape[:leading], rank, -1)
        update = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return plain(self.base) + self.scale * update.reshape(shape)

    def _dot(self, x, contracted, dtype):
        low = self.scale * product(x, self.a, dtype, contracted)
        return product(x, self.base, dtype, contracted) + product(low, self.b, dtype)

    def _grouped(self, x, sizes, room):
        base, a, b = (_cast(weight, x.dtype) for weight in (self.base, self.a, self.b))
        low = self.scale * grouped(x, a, sizes, room)
        return grouped(x, base, sizes, room) + grouped(low, b, sizes, room)

    def _batched(self, x):
        base, a, b = (_cast(weight, x.dtype) for weight in (self.base, self.a, self.b))
        return batched(x, base) + batched(self.scale * batched(x, a), b)

    def _specs(self, spec):
        expert, inputs, outputs = spec
        return dict(
            base=specs_of(self.base, spec),
            a=PartitionSpec(expert, inputs, None),
            b=PartitionSpec(expert, None, outputs),
        )


@struct.dataclass
class LoRA(Adapter):
    """y = x W + scale (x A) B (arXiv 2106.09685, section 4.1).

    scale is alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). See `Adapter` for the fields.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)

    def merged(self) -> jax.Array:
        """W + scale A B in float32."""
        return self._sum()

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: DTypeLike
    ) -> Float[Array, "*rows_outputs"]:
        """See `WeightForm.dot`."""
        return self._dot(x, contracted, dtype)

    def take(self, rows: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """Rows of a table [V, D], whose factors are [V, r] and [r, D]."""
        low = self.scale * take(self.a, rows, dtype)
        return take(self.base, rows, dtype) + product(low, self.b, dtype)

    def transposed(self, rows: int | None) -> "LoRA":
        """(W + scale A B)^T of the first rows: the factors change places."""
        form = isinstance(self.base, WeightForm)
        base = self.base.transposed(rows) if form else self.base[:rows].T
        return LoRA(base, self.b.T, self.a[:rows].T, self.scale)

    def grouped(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], room: int
    ) -> Float[Array, "M F"]:
        """See `WeightForm.grouped`; each expert has its own factors."""
        return self._grouped(x, sizes, room)

    def batched(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C F"]:
        """See `WeightForm.batched`."""
        return self._batched(x)

    def specs(self, spec: PartitionSpec) -> "LoRA":
        """See `WeightForm.specs`; the rank is never sharded."""
        return self.replace(**self._specs(spec))


@struct.dataclass
class DoRA(Adapter):
    """y = x V m / ||V|| with V = W + scale A B (arXiv 2402.09353, equation 5).

    The norm of each output column is a constant for the gradient (section 4.3 of the paper). See
    `Adapter` for the other fields.

    Attributes:
      magnitude: m, [*leading, *outputs], at first the norms of W, with which nothing changes.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scale: float = struct.field(pytree_node=False)

    @classmethod
    def of(cls, base: Weight, a: jax.Array, b: jax.Array, scale: float) -> "DoRA":
        """An adapter whose magnitudes are the norms of the base, in float32."""
        leading = a.ndim + b.ndim - 2 - len(base.shape)
        return cls(base, a, b, _norms(plain(base), leading, a.ndim - leading - 1), scale)

    def merged(self) -> jax.Array:
        """V m / ||V|| in float32."""
        outputs = self.b.ndim - self.leading - 1
        ones = (1,) * (len(self.shape) - self.leading - outputs)
        factors = self.factors()
        lead, rest = factors.shape[: self.leading], factors.shape[self.leading :]
        return self._sum() * factors.reshape(*lead, *ones, *rest)

    def factors(self) -> jax.Array:
        """m / ||V|| in float32, [*leading, *outputs]."""
        inputs = self.a.ndim - self.leading - 1
        norms = lax.stop_gradient(_norms(self._sum(), self.leading, inputs))
        # A column of zeros has magnitude zero.
        return self.magnitude.astype(jnp.float32) / jnp.maximum(norms, 1e-30)

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: DTypeLike
    ) -> Float[Array, "*rows_outputs"]:
        """See `WeightForm.dot`."""
        return self._dot(x, contracted, dtype) * self.factors().astype(dtype)

    def grouped(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], room: int
    ) -> Float[Array, "M F"]:
        """See `WeightForm.grouped`."""
        expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
        return self._grouped(x, sizes, room) * self.factors().astype(x.dtype)[expert]

    def batched(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C F"]:
        """See `WeightForm.batched`."""
        return self._batched(x) * self.factors().astype(x.dtype)[:, None]

    def specs(self, spec: PartitionSpec) -> "DoRA":
        """See `WeightForm.specs`.

        Raises:
          UserError: inputs sharded over "tensor", of which a device would see a part of each norm.
        """
        expert, inputs, outputs = spec
        if inputs == "tensor":
            raise UserError(
                "adapt.name: dora on experts, on a mesh with tensor > 1",
                allowed="meshes of data, fsdp and expert",
                fix="use lora or rslora, or train.mesh.tensor=1",
            )
        return self.replace(**self._specs(spec), magnitude=PartitionSpec(expert, outputs))


def _norms(weight: jax.Array, leading: int, inputs: int) -> jax.Array:
    """[*leading, *outputs], the norm of each output column."""
    axes = tuple(range(leading, leading + inputs))
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=axes))


def _cast(weight: Weight, dtype: DTypeLike) -> Any:
    return weight if isinstance(weight, WeightForm) else weight.astype(dtype)


def plain(weight: Weight) -> jax.Array:
    """A weight in any of these forms as one array in float32.

    Raises:
      TypeError: a form that is none of these.
    """
    if isinstance(weight, Adapter):
        return weight.merged()
    if isinstance(weight, Quantised):
        return weight.dequantised(jnp.float32)
    if isinstance(weight, WeightForm):
        raise TypeError(f"{type(weight).__name__}: has no plain array")
    return jnp.asarray(weight).astype(jnp.float32)
