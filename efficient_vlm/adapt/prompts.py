"""Prompt tuning: learned rows behind an embedding table, whose ids stand in front of a prompt."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from efficient_vlm.nn.linear import Weight, WeightForm, take
from efficient_vlm.shapes import Array

__all__ = ["Extended", "soft_ids"]


@struct.dataclass
class Extended(WeightForm):
    """An embedding table with trained rows behind it (prompt tuning, arXiv 2104.08691).

    The model reads the ids from V on (`soft_ids`) as these rows, and never answers with them. As
    the rows of the table, they are scaled by models that scale their embeddings.

    Attributes:
      base: the table [V, D].
      rows: float [n, D].
    """

    base: Weight
    rows: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    def take(self, rows: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """See `WeightForm.take`; ids from V on are trained rows."""
        vocab, count = self.base.shape[0], len(self.rows)
        soft = jnp.take(self.rows, jnp.clip(rows - vocab, 0, count - 1), axis=0).astype(dtype)
        hard = take(self.base, jnp.minimum(rows, vocab - 1), dtype)
        return jnp.where((rows >= vocab)[..., None], soft, hard)

    def transposed(self, rows: int | None) -> Any:
        """The head of the base."""
        if isinstance(self.base, WeightForm):
            return self.base.transposed(rows)
        return self.base[:rows].T


def soft_ids(params: Any) -> tuple[int, ...]:
    """The ids that stand for the trained rows, in order; () for parameters without any.

    A caller writes them in front of the tokens of each prompt, before pictures are placed.
    """
    table = params["language"]["embedding"]
    if not isinstance(table, Extended):
        return ()
    vocab = table.shape[0]
    return tuple(range(vocab, vocab + table.rows.shape[0]))
