"""What a teacher said, by conversation: found again in batches that are laid out otherwise."""

import numpy as np
import pytest

from efficient_vlm.data.taught import Taught, records_of, turns_of
from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.taught import TopTokens

K, SAME = 2, np.arange(20) != 9  # Token 9 is another one to the student.
ABOUT = {"teacher": {"a": "1"}, "top_k": K}


def inputs_of(*rows):
    """Rows of conversations: each as labels, 0 for none, behind each other."""
    size = max(sum(map(len, row)) for row in rows)
    labels, segments = np.full((2, len(rows), size), -1, np.int32)
    for number, row in enumerate(rows):
        flat = np.concatenate(row)
        labels[number, : len(flat)] = np.where(flat == 0, -1, flat)
        segments[number, : len(flat)] = np.repeat(1 + np.arange(len(row)), list(map(len, row)))
    return ModelInputs(np.zeros_like(labels), segments, labels=labels)


def said_of(inputs, seed=0):
    """Any numbers, all unlike."""
    rng = np.random.default_rng(seed)
    shape = inputs.labels.shape
    values = rng.normal(size=(*shape, K)).astype(np.float32)
    return TopTokens(values, rng.integers(0, 20, (*shape, K), np.int32), values[..., 0] - 3)


# Three conversations of the teacher, in two rows.
TEACHER = inputs_of([[0, 5, 6, 7, 0, 0, 8, 9, 0], [0, 0, 3, 4]], [[0, 1, 2, 0]])
KEYS = [[(7, 0), (7, 1)], [(2, 0)]]


@pytest.fixture(scope="module")
def found():
    return list(records_of(TEACHER, KEYS, said_of(TEACHER), SAME))


def assert_says(taught, row, place, said):
    """At a place of the student what the teacher said at a place of its own; None for nothing."""
    if said is None:
        assert not taught.live[row, place]
        assert not taught.log_probs[row, place].any() and not taught.rest[row, place]
        return
    for ours, theirs in zip(taught, said_of(TEACHER), strict=True):
        np.testing.assert_array_equal(ours[row, place], theirs[said])


def test_targets_are_found_by_turn(found):
    """With another order, other headers, another end of a turn and other rows."""
    student = inputs_of([[0, 0, 1, 0], [0, 5, 6, 1, 0, 8, 9]], [[0, 3, 4, 4], [0, 1]])
    taught = Taught.of(found, K).attach(student, [[(2, 0), (7, 0)], [(7, 1), (4, 0)]]).taught
    wanted = {(0, 2): (1, 1), (0, 5): (0, 1), (0, 6): (0, 2), (0, 9): (0, 6)}
    wanted |= {(1, 1): (0, 11), (1, 2): (0, 12)}
    for row, place in np.ndindex(student.labels.shape):
        assert_says(taught, row, place, wanted.get((row, place)))


def test_turns_that_are_not_the_same_number(found):
    """Nothing is guessed of them."""
    student = inputs_of([[0, 5, 6, 7, 8]])
    assert not Taught.of(found, K).attach(student, [[(7, 0)]]).taught.live.any()


def test_no_turns():
    assert turns_of(np.full(3, -1)) == []
    empty = Taught.of([], K)
    assert len(empty) == empty.conversations == 0
    assert not empty.attach(TEACHER, KEYS).taught.live.any()


def test_files(found, tmp_path):
    """What was written is read; half of it, something else or a changed byte is not."""
    assert Taught.read(tmp_path, ABOUT, K) is None

    def broken():
        yield found[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Taught.write(tmp_path, broken(), ABOUT)
    assert Taught.read(tmp_path, ABOUT, K) is None
    Taught.write(tmp_path, iter(found), ABOUT)
    read, kept = Taught.read(tmp_path, ABOUT, K), Taught.of(found, K)
    assert (len(read), read.conversations) == (len(kept), 3) == (9, 3)
    for ours, theirs in zip(*(t.attach(TEACHER, KEYS).taught for t in (read, kept)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, value in (("teacher", {"a": "2"}), ("top_k", 3), ("temperature", 2.0)):
        with pytest.raises(UserError, match=f"another {name}: ") as error:
            Taught.read(tmp_path, {**ABOUT, name: value}, K)
        assert len(str(error.value).splitlines()) <= 3
    (tmp_path / "index.npy").write_bytes(b"1")
    with pytest.raises(UserError, match=r"index.npy: damaged"):
        Taught.read(tmp_path, ABOUT, K)
    (tmp_path / "teacher.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher.json: cannot be read"):
        Taught.read(tmp_path, ABOUT, K)


def test_nothing_left_for_others_stays_finite():
    said = said_of(TEACHER)._replace(rest=np.full(TEACHER.labels.shape, -np.inf, np.float32))
    records = [part for _, part in records_of(TEACHER, KEYS, said, SAME)]
    assert np.isfinite(np.concatenate(records)["rest"]).all()
