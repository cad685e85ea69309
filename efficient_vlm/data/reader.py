"""Batches for training, from workers that are started again when one of them fails."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from efficient_vlm.data.pipeline import Pipeline
from efficient_vlm.errors import UserError, first_line

__all__ = ["Reader"]


class Reader:
    """An iterator over the batches of a pipeline, with `get_state` and `set_state`.

    An unexpected failure while a batch is read (a file system that goes away, no memory, a thread
    that dies) starts the workers again at that batch, once; the batches are those that they would
    have been. A second failure at the same batch ends the run.

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
          UserError: what the data say, or two failures at one batch.
        """
        place = copy.deepcopy(self._batches.get_state())
        try:
            return next(self._batches)
        except (UserError, StopIteration):
            raise
        except Exception as error:
            self._warn(f"reading a batch failed ({_name(error)}); starting again there")
        self._batches = iter(self._pipeline)
        self._batches.set_state(place)
        try:
            return next(self._batches)
        except (UserError, StopIteration):
            raise
        except Exception as error:
            raise UserError(
                f"data: a batch could not be read twice: {_name(error)}",
                fix="mend that and run again; everything up to the newest checkpoint is safe",
            ) from error

    def get_state(self) -> Any:
        """The place of the next batch."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to a place that `get_state` gave."""
        self._batches.set_state(state)


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
