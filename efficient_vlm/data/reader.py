"""Batches for training, from workers that are restarted when one of them fails."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.errors import UserError, first_line

__all__ = ["Reader"]


class Reader:
    """An iterator over the batches of a pipeline, with `get_state` and `set_state`.

    After an unexpected failure while a batch is read (a lost file system, no memory, a dead thread)
    the workers are restarted once at that batch; the batches stay the same. A second failure at the
    same batch ends the run.

    Args:
      pipeline: what to read.
      warn: receives a line for each restart.
    """

    def __init__(self, pipeline: Pipeline, warn: Callable[[str], None]):
        self._pipeline, self._warn = pipeline, warn
        self._batches = iter(pipeline)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: an error in the data, or two failures at one batch.
        """
        position = copy.deepcopy(self._batches.get_state())
        try:
            return next(self._batches)
        except (UserError, StopIteration):
            raise
        except Exception as error:
            self._warn(f"reading a batch failed ({_name(error)}); restarting at that batch")
        self._batches = iter(self._pipeline)
        self._batches.set_state(position)
        try:
            return next(self._batches)
        except (UserError, StopIteration):
            raise
        except Exception as error:
            raise UserError(
                f"data: a batch could not be read twice: {_name(error)}",
                fix="solve that and run again; everything up to the newest checkpoint is safe",
            ) from error

    def get_state(self) -> Any:
        """The position of the next batch."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned."""
        self._batches.set_state(state)


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
