"""Estimates of work that the text of a compiled program does not show, as names of scopes.

How often a loop over blocks turns, and how much of an array sized for the worst case is used,
depends on the data; the work of a kernel is hidden in its code. `audit aot` counts the work of a
program from its text and reads these names there (`costs/compiled/hlo.py`): every compiler passes
them on to the instructions.
"""

import re

import jax

__all__ = ["about_flops", "about_turns", "flops_of", "room_for", "room_of", "turns_of"]

_TURNS = re.compile(r'about_([\d.]+)_turns\)*/while"')
_FLOPS = re.compile(r"about_(\d+)_flops")
_ROOM = re.compile(r"room_for_(\d+)_times")


def about_turns(turns: float):
    """A scope around one loop of dynamic length: its number of turns with typical data."""
    return jax.named_scope(f"about_{turns:.9g}_turns")


def about_flops(flops: int):
    """A scope around one kernel whose work is not visible: its FLOPs."""
    return jax.named_scope(f"about_{flops}_flops")


def room_for(times: int):
    """A scope around a grouped product, or the exchange of its rows: arrays have room for `times`
    the usual number of rows."""
    return jax.named_scope(f"room_for_{times}_times")


def turns_of(attributes: str) -> float | None:
    """The turns that `about_turns` gave a `while`, from the text after its operands, or None."""
    match = _TURNS.search(attributes)
    return match and float(match[1])


def flops_of(attributes: str) -> int:
    """The FLOPs that `about_flops` gave a kernel; 0 without it."""
    match = _FLOPS.search(attributes)
    return int(match[1]) if match else 0


def room_of(attributes: str) -> int:
    """The room that `room_for` gave an instruction; 1 without it."""
    match = _ROOM.search(attributes)
    return int(match[1]) if match else 1
