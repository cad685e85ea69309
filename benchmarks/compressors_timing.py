"""Compiled programs and their times, for `compressors.py`."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Program:
    """A compiled stage. `prepare` makes what a call consumes, outside the clock."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple
    steps: int = 1
    compile_s: float = 0.0
    temporaries: int = 0

    def seconds(self, calls: int) -> float:
        given = [jax.block_until_ready(self.prepare()) for _ in range(calls)]
        start = time.perf_counter()
        for arguments in given:
            jax.block_until_ready(self.run(*arguments))
        return (time.perf_counter() - start) / calls / self.steps


def compiled(function: Callable, static: tuple, *arguments: Any) -> tuple[Program, Callable]:
    """Compiles a jitted function whose first arguments are static; also the raw executable."""
    start = time.perf_counter()
    executable = function.lower(*static, *arguments).compile()
    took = time.perf_counter() - start
    temporaries = executable.memory_analysis().temp_size_in_bytes
    run = functools.partial(executable, *arguments)
    return Program(run, compile_s=took, temporaries=temporaries), executable


@dataclasses.dataclass
class Timing:
    """Medians over the rounds: ms of a call, and how many times faster than the reference."""

    ms: float
    speedup: float
    spread: float  # Interquartile range of the speed-ups over their median.


def interleave(programs: dict[Any, Program], reference: Any, rounds: int) -> dict[Any, Timing]:
    """Times all programs in rounds, with the reference in front of every third and at the end."""
    calls = {}
    for key, program in programs.items():
        took = program.seconds(1)  # Warm-up.
        took = program.seconds(1) if took < 0.1 else took
        calls[key] = max(1, min(20, math.ceil(0.02 / max(took, 1e-6))))
    others = [key for key in programs if key != reference]
    seconds, ratios = {key: [] for key in programs}, {key: [] for key in others}
    for turn in range(rounds):
        order = others if turn % 2 == 0 else others[::-1]
        before = programs[reference].seconds(calls[reference])
        seconds[reference].append(before)
        for start in range(0, len(order), 3):
            chunk = order[start : start + 3]
            found = {key: programs[key].seconds(calls[key]) for key in chunk}
            after = programs[reference].seconds(calls[reference])
            seconds[reference].append(after)
            for key, value in found.items():
                seconds[key].append(value)
                ratios[key].append((before + after) / 2 / value)
            before = after
    result = {reference: Timing(1e3 * statistics.median(seconds[reference]), 1.0, 0.0)}
    for key in others:
        middle = statistics.median(ratios[key])
        low, high = np.percentile(ratios[key], (25, 75))
        ms = 1e3 * statistics.median(seconds[key])
        result[key] = Timing(ms, middle, float((high - low) / middle))
    return result
