"""What the text of a compiled program cannot say of itself, said in names of scopes.

How often a loop over blocks turns, and how many rows of an array with room for the worst case are
there, is in the data; how much work a kernel is, in its code. `audit aot` counts the work of a
program from its text: it reads these names (`costs/compiled/hlo.py`), which every compiler hands
through to the instructions.
"""

import re

import jax

__all__ = ["about_flops", "about_turns", "flops_of", "room_for", "room_of", "turns_of"]

_TURNS = re.compile(r'about_([\d.]+)_turns\)*/while"')
_FLOPS = re.compile(r"about_(\d+)_flops")
_ROOM = re.compile(r"room_for_(\d+)_times")


def about_turns(turns: float):
    """A scope around one loop of unknown length: how often it turns with usual data, or less."""
    return jax.named_scope(f"about_{turns:.9g}_turns")


def about_flops(flops: int):
    """A scope around one kernel that cannot say of itself how much work it is."""
    return jax.named_scope(f"about_{flops}_flops")


def room_for(times: int):
    """A scope around a grouped product, or what sends its rows: there is room for `times` as many
    rows as there usually are."""
    return jax.named_scope(f"room_for_{times}_times")


def turns_of(attributes: str) -> float | None:
    """What `about_turns` said of a `while`, from the text behind its operands."""
    found = _TURNS.search(attributes)
    return found and float(found[1])


def flops_of(attributes: str) -> int:
    """What `about_flops` said of a kernel; 0 where nothing did."""
    found = _FLOPS.search(attributes)
    return int(found[1]) if found else 0


def room_of(attributes: str) -> int:
    """What `room_for` said of an instruction; 1 where nothing did."""
    found = _ROOM.search(attributes)
    return int(found[1]) if found else 1
