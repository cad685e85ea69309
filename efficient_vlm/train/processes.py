"""Several processes that train one model: how they find each other, and what they agree on.

Each has devices and rows of its own; the first one talks, and writes what is no checkpoint.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from efficient_vlm.errors import UserError, first_line

__all__ = ["agreed", "first_then_all", "is_first", "largest", "start", "whole"]

_ALLOWED = "auto (Slurm, TPU pods, MPI), or ADDRESS:PORT,PROCESSES,NUMBER"


def start(text: str | None) -> None:
    """Joins the other processes of a job; before anything else asks JAX for devices.

    Args:
      text: None for one process; "auto" where the cluster says who is who (Slurm, Cloud TPU, Open
        MPI, GKE); else "ADDRESS:PORT,PROCESSES,NUMBER" of the first process, such as
        "10.0.0.2:8476,4,0".

    Raises:
      UserError: another text, or they cannot be reached.
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
    """Whether this process writes files and talks."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest that any process says; all must ask at the same place."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.array(value))))


def first_then_all(action: Callable[[], Any]) -> Any:
    """What each process gets of `action`; the first goes ahead, and the others find its files."""
    found = agreed(action)
    return found if is_first() else action()


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, of which each process may have a part; all must ask at the same place."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def agreed(action: Callable[[], Any]) -> Any:
    """What the first process gets of `action`, and None in the others, which do not call it.

    Raises:
      UserError: it failed in the first, of which it is the own error.
    """
    if jax.process_count() == 1:
        return action()
    found, problem = None, None
    if is_first():
        try:
            found = action()
        except Exception as error:
            problem = error
    if largest(int(problem is not None)):
        raise problem or UserError("the first process has ended with an error; see its output")
    return found
