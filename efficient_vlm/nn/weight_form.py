"""The base of the forms that weights can take."""

from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from efficient_vlm.shapes import Array

__all__ = ["WeightForm"]


class WeightForm:
    """Base of pytrees that replace a weight array.

    A form is a `flax.struct.dataclass` derived from this class. Only `dot` is required; the other
    methods serve embedding tables (`take`, `transposed`) and experts (`shape`, `grouped`,
    `batched`, `specs`).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this form replaces."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")

    def dot(
        self, x: Float[Array, "*rows_inputs"], contracted: int, dtype: DTypeLike
    ) -> Float[Array, "*rows_outputs"]:
        """x [..., *inputs] times the weight [*inputs, *outputs], `contracted` axes being inputs:
        [..., *outputs] in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__}: no product")

    def take(self, rows: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """Rows of a table [V, D]: int [...] -> [..., D] in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__}: not for embedding tables")

    def transposed(self, rows: int | None) -> "WeightForm":
        """A table [V, D], its first `rows`, as the weight [D, rows] of the head."""
        raise NotImplementedError(f"{type(self).__name__}: not for embedding tables")

    def grouped(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], room: int
    ) -> Float[Array, "M F"]:
        """Rows [M, D] sorted by expert, each times the weight of its expert: [M, F]."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")

    def batched(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C F"]:
        """Slots [B, E, C, D] of each expert times its weight: [B, E, C, F]."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts")

    def specs(self, spec: PartitionSpec) -> "WeightForm":
        """The form with the sharding of each array in its place, for a weight sharded by `spec`."""
        raise NotImplementedError(f"{type(self).__name__}: not for experts on a mesh")
