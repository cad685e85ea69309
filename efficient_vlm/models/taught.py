"""What a teacher says of the next token, as batches carry it and files keep it."""

from typing import NamedTuple

import jax
from jaxtyping import Bool, Float32, Int

from efficient_vlm.shapes import Array

__all__ = ["TopTokens"]


class TopTokens(NamedTuple):
    """The most likely tokens of a teacher, as they are stored for offline distillation.

    Attributes:
      log_probs: float32 [..., K], of the whole distribution, at the temperature of the loss.
      tokens: int32 [..., K]; in a batch -1 where the teacher says nothing.
      rest: float32 [...], log-probability of all other tokens together.
    """

    log_probs: Float32[Array, "*rows K"]
    tokens: Int[Array, "*rows K"]
    rest: Float32[Array, "*rows"]

    @property
    def live(self) -> Bool[jax.Array, "*rows"]:
        """bool [...], where the teacher says something."""
        return self.tokens[..., 0] >= 0
