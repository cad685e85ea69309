"""Saving the state of a run: which failures end it, and which it survives."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from efficient_vlm.checkpoints.run import Checkpoints, NonFiniteState, SaveFailed
from efficient_vlm.errors import UserError

__all__ = ["save_state"]


def save_state(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    batches: Iterator,
    metadata: Mapping[str, Any],
    *,
    limit: int,
    wait: bool,
    warn: Callable[[str], None],
) -> None:
    """Saves a step; a failure is a warning unless it is one too many.

    Args:
      checkpoints: of the run.
      step, state, batches, metadata: see `Checkpoints.save`.
      limit: failures in a row after which the run ends.
      wait: whether the run ends with this save, so that it must not fail.
      warn: receives a line for a failure that the run survives.

    Raises:
      UserError: checkpoints cannot be written, or the state is not finite.
    """
    try:
        checkpoints.wait()
    except SaveFailed as error:  # of the save in the background, reported when it failed
        if checkpoints.failures >= limit and not wait:
            _give_up(checkpoints, error)
    try:
        checkpoints.save(step, state, batches, metadata, wait=wait)
    except SaveFailed as error:
        if wait or checkpoints.failures >= limit:
            _give_up(checkpoints, error)
        warn(f"{error}; training goes on, the next checkpoint tries again")
    except NonFiniteState as error:
        raise UserError(
            f"step {step}: {error.path} is not finite, so no checkpoint was written",
            fix="a new --workdir with train.init_from and a lower learning rate",
        ) from None


def _give_up(checkpoints: Checkpoints, error: SaveFailed) -> NoReturn:
    last = max(checkpoints.committed(), default=None)
    safe = "" if last is None else f"; step {last} is safe"
    raise UserError(
        f"checkpoints cannot be written: {error}",
        fix=f"free some space and run again{safe}",
    ) from None
