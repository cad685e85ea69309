"""Programs of many models in one process are dropped, and their memory maps with them."""

import collections
import functools
import gc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.inference import programs
from efficient_vlm.inference.programs import bounded_jit, live_programs

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Without programs of other tests."""
    monkeypatch.setattr(programs, "_kept", collections.OrderedDict())


def made():
    traced = []

    @bounded_jit(1, static_argnames="shift")
    def scaled(factor, x, shift=0):
        traced.append(factor)
        return jnp.sort(jnp.tanh(x @ x.T) * factor + shift)

    return scaled, traced


def maps():
    gc.collect()
    return len(MAPS.read_text().splitlines())


@pytest.mark.skipif(not MAPS.exists(), reason="Linux counts maps there")
def test_many_models_in_turn(monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 4)
    scaled, _ = made()
    x = np.ones((4, 3), np.float32)
    for factor in range(6):
        scaled(factor, x)
    before = maps()
    for factor in range(6, 30):
        np.testing.assert_allclose(scaled(factor, x), np.tanh(3.0) * factor, rtol=1e-6)
    assert live_programs() == 4
    # Each program is nine maps and more.
    assert maps() - before < 24


def test_the_one_used_last_stays(monkeypatch):
    scaled, traced = made()
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
    x = np.ones((4, 3), np.float32)
    for factor in (1, 2, 1, 3, 1, 2):
        scaled(factor, x)
    assert traced == [1, 2, 3, 2]
    # One model with more shapes than there is room for.
    for rows in range(1, 9):
        scaled(1, np.ones((rows, 3), np.float32))
    assert live_programs() <= 2


def test_as_jit():
    scaled, traced = made()
    x = np.ones((4, 3), np.float32)
    scaled.lower(2, x, shift=1).compile()
    again = functools.partial(scaled, 2)
    np.testing.assert_allclose(again(x, shift=1), np.tanh(3.0) * 2 + 1, rtol=1e-6)
    assert traced == [2] and scaled._cache_size() == 1 and scaled.__name__ == "scaled"
    scaled.clear_cache()
    assert scaled._cache_size() == 0
