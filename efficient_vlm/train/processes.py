"""Several processes that train one model: how they find each other, and what they agree on.

Each has its own devices and rows. The first one prints, and writes all files but checkpoints, which
all of them write.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from efficient_vlm.data.records import REASONS
from efficient_vlm.data.skips import SkipCounter
from efficient_vlm.errors import UserError, first_line

__all__ = [
    "agreed",
    "first_then_all",
    "is_first",
    "largest",
    "skipped_by_any",
    "start",
    "whole",
]

_ALLOWED = "auto (Slurm, TPU pods, MPI), or ADDRESS:PORT,PROCESSES,NUMBER"


def start(text: str | None) -> None:
    """Joins the other processes of a job. Must run before anything asks JAX for devices.

    Args:
      text: None for one process; "auto" where the cluster tells JAX about the job (Slurm, Cloud
        TPU, Open MPI, GKE); else "ADDRESS:PORT,PROCESSES,NUMBER": address of the first process,
        number of processes, number of this one, such as "10.0.0.2:8476,4,0".

    Raises:
      UserError: another text, or the other processes cannot be reached.
    """
    if text is None:
        return
    words = [] if text == "auto" else text.split(",")
    if words:
        address, _, port = words[0].rpartition(":")
        numbers = [port, *words[1:]]
        if len(words) != 3 or not address or not all(word.isdecimal() for word in numbers):
            raise UserError(f"--distributed={text}", allowed=_ALLOWED)
        if int(port) < 1 or int(words[1]) < 1:
            raise UserError(f"--distributed={text}", allowed=_ALLOWED)
        if not int(words[2]) < int(words[1]):
            raise UserError(
                f"--distributed={text}: process {words[2]} of {words[1]}",
                allowed=f"numbers 0 to {int(words[1]) - 1}",
            )
    try:
        if words:
            jax.distributed.initialize(words[0], int(words[1]), int(words[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={text}: {first_line(error)}", allowed=_ALLOWED) from error


def is_first() -> bool:
    """Whether this process prints and writes the files that only one process writes."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest value of all processes; a collective call, which all must make."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.array(value))))


def skipped_by_any(skips: SkipCounter) -> dict[str, int]:
    """Records that any process found unusable, by reason; a collective call."""
    if jax.process_count() == 1:
        return skips.counts
    from jax.experimental import multihost_utils

    # Each reads rows of its own, and the rows of one epoch are another's in the next.
    found = multihost_utils.process_allgather(skips.codes()).max(axis=0)
    named = zip(sorted(REASONS), np.bincount(found, minlength=len(REASONS) + 1)[1:], strict=True)
    return {reason: int(count) for reason, count in named if count}


def first_then_all(action: Callable[[], Any]) -> Any:
    """The result of `action` in each process; the first goes ahead, the others use its files."""
    result = agreed(action)
    return result if is_first() else action()


def whole(x: jax.Array) -> np.ndarray:
    """A whole array whose parts may be in several processes; a collective call."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def agreed(action: Callable[[], Any]) -> Any:
    """The result of `action` in the first process; None in the others, which do not call it.

    Raises:
      Exception: in the first process, what `action` raised.
      UserError: in the others, if the first has failed.
    """
    if jax.process_count() == 1:
        return action()
    result, problem = None, None
    if is_first():
        try:
            result = action()
        except Exception as error:
            problem = error
    if largest(int(problem is not None)):
        raise problem or UserError("the first process has ended with an error; see its output")
    return result
