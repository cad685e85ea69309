"""Batches of conversations, before and after anything is decoded."""

from typing import NamedTuple

import numpy as np

from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.processing.gather import Room

__all__ = ["Batch", "Plan", "Plans"]


class Batch(NamedTuple):
    """Rows of one shape.

    Attributes:
      inputs: NumPy, with labels.
      index: int64 [samples], the samples of this process in it.
      conversations: for each row of samples the conversations in it, in order: the number of the
        sample, and that of the conversation in the sample.
    """

    inputs: ModelInputs
    index: np.ndarray
    conversations: tuple[tuple[tuple[int, int], ...], ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, for a dump."""
        import jax

        leaves = jax.tree_util.tree_leaves_with_path(self.inputs)
        named = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}
        return {**named, "index": self.index}


class Plan(NamedTuple):
    """One batch before anything is decoded: the room of its rows, the samples of each."""

    room: Room
    rows: tuple[tuple[int, ...], ...]


class Plans:
    """Grain's transformation of a window's plan into batches."""

    max_fan_out = 2**16

    def flat_map(self, plans: list[Plan]) -> list[Plan]:
        """One after the other."""
        return plans
