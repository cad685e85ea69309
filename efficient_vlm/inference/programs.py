"""Compiled programs of many models in one process: bounded, and given back to the system.

A program of a model for a CPU holds some 170 memory maps, and Linux allows a process 65530.
`jax.jit` keeps the programs of thousands of static arguments for ever, models among them, so that
a process that goes through some sixty models and methods ends in LLVM's "cannot allocate memory".
Here each set of static arguments has a `jax.jit` of its own; the least recently used are dropped,
and their programs with them.
"""

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["MOST_PROGRAMS", "BoundedJit", "bounded_jit"]

# Of all functions together: some 20,000 memory maps. One model has three programs for each shape.
MOST_PROGRAMS = 128

# (function, static arguments) -> [its `jax.jit`, how many programs that holds], the newest last.
_kept: collections.OrderedDict[tuple, list] = collections.OrderedDict()
_lock = threading.RLock()


class BoundedJit:
    """A function like `jax.jit(function, static_argnums=range(static))`; see `bounded_jit`."""

    def __init__(self, function: Callable, static: int, donate: tuple[int, ...], names: Any):
        functools.update_wrapper(self, function)
        self._static = static
        self._options = {
            "donate_argnums": tuple(place - static for place in donate),
            "static_argnames": names,
        }

    def __call__(self, *args: Any, **options: Any) -> Any:
        kept = self._find(args[: self._static])
        result = kept[0](*args[self._static :], **options)
        if kept[0]._cache_size() != kept[1]:
            _counted(kept)
        return result

    def lower(self, *args: Any, **options: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self._find(args[: self._static])[0].lower(*args[self._static :], **options)

    def clear_cache(self) -> None:
        """Drops all programs of this function."""
        with _lock:
            for key in [key for key in _kept if key[0] is self]:
                del _kept[key]

    def _cache_size(self) -> int:
        """Programs that are held, as of a function of `jax.jit`."""
        with _lock:
            return sum(kept[0]._cache_size() for key, kept in _kept.items() if key[0] is self)

    def _find(self, static: tuple) -> list:
        key = (self, *static)
        with _lock:
            if key not in _kept:

                @functools.wraps(self.__wrapped__)
                def run(*args, **options):
                    return self.__wrapped__(*static, *args, **options)

                # Its signature is not that of the wrapped function, which has more arguments.
                del run.__wrapped__
                _kept[key] = [jax.jit(run, **self._options), 0]
            _kept.move_to_end(key)
            return _kept[key]


def bounded_jit(
    static: int, *, donate: tuple[int, ...] = (), static_argnames: Any = ()
) -> Callable[[Callable], BoundedJit]:
    """A decorator: compiles for the first `static` arguments, which are hashable and positional.

    The programs of all functions so decorated are at most `MOST_PROGRAMS`: those of the static
    arguments that were used least recently are dropped, and compiled again when they come back.

    Args:
      static: how many of the arguments are static.
      donate: places of donated arguments, counted with the static ones.
      static_argnames: static arguments given by name.
    """
    return lambda function: BoundedJit(function, static, donate, static_argnames)


def live_programs() -> int:
    """Programs that the functions of `bounded_jit` hold together."""
    with _lock:
        return sum(kept[0]._cache_size() for kept in _kept.values())


def _counted(newest: list) -> None:
    """Counts the programs of `newest`, and drops the oldest of others, or its own, if need be."""
    with _lock:
        newest[1] = newest[0]._cache_size()
        total = sum(kept[1] for kept in _kept.values())
        for key in list(_kept):
            if total <= MOST_PROGRAMS or _kept[key] is newest:
                break
            total -= _kept.pop(key)[1]
        if total > MOST_PROGRAMS:
            newest[0].clear_cache()  # One model that met so many shapes.
            newest[1] = 0
