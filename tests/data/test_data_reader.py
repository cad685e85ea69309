"""A worker that fails is started again once, at its batch."""

import numpy as np
import pytest

from efficient_vlm.data import make_train
from efficient_vlm.data.reader import Reader
from efficient_vlm.errors import UserError


def fail(pipeline, monkeypatch, times, error):
    """Makes the third batch fail so many times, in whatever thread it is read."""
    load, left = type(pipeline)._load, [times]

    def broken(self, number, records):
        if number == 2 and left[0] > 0:
            left[0] -= 1
            raise error
        return load(self, number, records)

    monkeypatch.setattr(type(pipeline), "_load", broken)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("error", [OSError("stale file handle"), MemoryError("no memory")])
def test_restarts_once_from_its_state(small, monkeypatch, threads, error):
    config = small.__class__(**{**small.__dict__, "num_threads": threads, "prefetch": 1})
    expected = iter(make_train(config))
    expected = [next(expected) for _ in range(6)]
    pipeline, lines = make_train(config), []
    fail(pipeline, monkeypatch, 1, error)
    reader = Reader(pipeline, lines.append)
    for batch in expected:
        found = next(reader)
        assert all(np.array_equal(found[name], batch[name]) for name in batch)
    assert len(lines) == 1 and str(error) in lines[0] and "restarting" in lines[0]
    assert reader.get_state() is not None


def test_a_second_failure_ends_it(small, monkeypatch):
    pipeline, lines = make_train(small), []
    fail(pipeline, monkeypatch, 2, OSError("gone"))
    reader = Reader(pipeline, lines.append)
    next(reader), next(reader)
    with pytest.raises(UserError, match="twice: OSError: gone") as caught:
        next(reader)
    assert len(str(caught.value).splitlines()) <= 3 and len(lines) == 1


def test_what_the_data_say_is_not_tried_again(small, monkeypatch):
    pipeline, lines = make_train(small), []
    fail(pipeline, monkeypatch, 1, UserError("data: too many bad samples"))
    reader = Reader(pipeline, lines.append)
    next(reader), next(reader)
    with pytest.raises(UserError, match="too many bad"):
        next(reader)
    assert not lines
