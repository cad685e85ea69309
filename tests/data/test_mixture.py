"""Mixtures: exact shares, one order for any number of processes, and exact resume."""

import collections
import json
import pickle
from fractions import Fraction

import layout_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_samples import config, indices

from efficient_vlm.data import make_eval, make_train
from efficient_vlm.data.mixture import Schedule, Shares, order_of
from efficient_vlm.data.pipeline import check_fingerprint
from efficient_vlm.data.sources import open_source
from efficient_vlm.errors import UserError

WEIGHTS = st.lists(st.integers(1, 40) | st.sampled_from([0.7, 0.3, 0.05]), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
def test_shares_are_exact(weights, start):
    """After a period every source has exactly its share; on the way none is far from it."""
    shares, exact = Shares(weights), [Fraction(repr(weight)) for weight in weights]
    period = int(sum(exact) * 1000)  # A whole number of each source's weight.
    assert shares.counts(period) == [int(weight * 1000) for weight in exact]
    counts = shares.counts(start)
    for k in range(start, start + 60):
        source, before = shares.at(k)
        assert counts[source] == before
        counts[source] += 1
        assert counts == shares.counts(k + 1) and sum(counts) == k + 1
    ideal = [weight * (start + 60) / sum(exact) for weight in exact]
    assert all(abs(c - i) < len(weights) for c, i in zip(counts, ideal, strict=True))


@pytest.mark.parametrize("length", [1, 3, 127, 128])
def test_each_epoch_is_another_order_of_all_records(length):
    """Of few records, which are ordered here, and of more, which Grain orders."""
    order = order_of(range(length), 7)
    far = (len(order) // length - 1) * length  # The last epoch.
    epochs = [
        [int(order[start + k]) for k in range(length)] for start in (0, length, 2 * length, far)
    ]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert epochs[0] == [int(n) for n in pickle.loads(pickle.dumps(order))[:length]]
    if length > 3:
        others = [int(order_of(range(length), 1000)[k]) for k in range(length)]
        assert len({tuple(epoch) for epoch in [*epochs, others]}) == 5


def slow_schedule(weights, limits, number):
    """The same by counting: shares of the live sources, from where a source was used up."""
    given, live, since, base = [0] * len(weights), None, 0, 0
    for _ in range(number):
        if all(limit is not None for limit in limits) and sum(given) - base == sum(limits):
            base, live = sum(given), None
        epoch = base // max(1, sum(limit or 0 for limit in limits))
        left = [
            i for i, limit in enumerate(limits)
            if limit is None or given[i] - epoch * limit < limit
        ]  # fmt: skip
        if left != live:
            live, since = left, sum(given)
        source = live[Shares([weights[i] for i in live]).at(sum(given) - since)[0]]
        yield source, given[source]
        given[source] += 1


@pytest.mark.parametrize(
    ("weights", "limits"),
    [
        ([0.7, 0.3], [None, None]),
        ([0.7, 0.3], [4, None]),
        ([0.7, 0.3], [4, 9]),
        ([1, 1, 1], [5, 1, 3]),
        ([5, 1, 2], [None, 2, 7]),
        ([6, 3], [6, 3]),
    ],
)
def test_limits_against_counting(weights, limits):
    schedule = Schedule(weights, limits)
    wanted = list(slow_schedule(weights, limits, 80))
    assert [schedule[k] for k in range(80)] == wanted
    for k in (0, 1, 17, 80):
        counts = collections.Counter(source for source, _ in wanted[:k])
        assert schedule.counts(k) == [counts[i] for i in range(len(weights))]


@pytest.fixture
def mixed(tmp_path):
    """Three layouts: 10 rows of JSON, 7 of Parquet, 5 of a tar file."""
    paths = []
    for name, number in (("messages", 10), ("shards", 7), ("tar", 5)):
        folder = tmp_path / name
        folder.mkdir()
        write = getattr(samples, f"write_{name}")
        paths.append(str(write(folder, samples.rows(number))))

    def make(*changes, **fields):
        changes = changes or ({},) * 3
        parts = [{"path": path, **change} for path, change in zip(paths, changes, strict=True)]
        return config(mixture=parts, **fields)

    return make


def sources_of(pipeline, numbers):
    starts = np.cumsum([0, 10, 7, 5])
    return collections.Counter(int(i) for i in np.searchsorted(starts, numbers, "right") - 1)


def test_weights_and_epochs_of_whole_pipelines(mixed):
    pipeline = make_train(mixed({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}, batch_size=10))
    numbers = indices(iter(pipeline), 7)
    assert sources_of(pipeline, numbers) == {0: 35, 1: 21, 2: 14}
    # Each source is read whole before any of its records comes again.
    own = [[n for n in numbers if low <= n < high] for low, high in ((0, 10), (10, 17), (17, 22))]
    for drawn, size in zip(own, (10, 7, 5), strict=True):
        for start in range(0, len(drawn) - size + 1, size):
            assert len(set(drawn[start : start + size])) == size
    assert own[0][:10] != own[0][10:20]
    # Without weights: twice, once and half a time, then all of it again.
    pipeline = make_train(mixed({"epochs": 2}, {}, {"epochs": 0.4}, batch_size=2))
    assert sources_of(pipeline, indices(iter(pipeline), 29)) == {0: 20, 1: 36, 2: 2}
    pipeline = make_train(mixed({"epochs": 2}, {"epochs": 1}, {"epochs": 0.4}, batch_size=29))
    batches = iter(pipeline)
    for _ in range(2):
        assert sources_of(pipeline, indices(batches, 1)) == {0: 20, 1: 7, 2: 2}
    summary = pipeline.by_source(2)
    assert [(s["drawn"], s["epochs"], s["samples"]) for s in summary] == [
        (40, 4.0, 10), (14, 2.0, 7), (4, 0.8, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("threads", [0, 2])
def test_killed_and_resumed(mixed, threads, tmp_path):
    made = mixed({"weight": 5, "epochs": 1}, {"weight": 3}, {"weight": 2}, num_threads=threads)
    batches = iter(make_train(made, workdir=tmp_path))
    states, wanted = [], []
    for _ in range(7):
        states.append(json.loads(json.dumps(batches.get_state())))
        wanted.append(next(batches))
    for stop in (0, 1, 4, 6):
        again = iter(make_train(made, workdir=tmp_path))
        again.set_state(states[stop])
        for batch in wanted[stop:]:
            other = next(again)
            for name, array in batch.items():
                np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_two_processes_see_one_order(mixed):
    made = mixed({"weight": 5}, {"weight": 3}, {"weight": 2})
    whole = indices(iter(make_train(made)), 6)
    halves = [iter(make_train(made, rows=rows)) for rows in ([0, 3], [1, 2])]
    for step in range(6):
        first, second = (next(half)["index"].tolist() for half in halves)
        assert [first[0], *second, first[1]] == whole[4 * step : 4 * step + 4]


def test_the_fingerprint_holds_every_part(mixed):
    stored = json.loads(
        json.dumps(make_train(mixed({"weight": 1}, {"weight": 1}, {"weight": 1})).fingerprint)
    )
    check_fingerprint(
        stored, make_train(mixed({"weight": 1}, {"weight": 1}, {"weight": 1})).fingerprint
    )
    assert stored["source"] == "mixture" and len(stored["parts"]) == 3
    for changed in (
        mixed({"weight": 1}, {"weight": 2}, {"weight": 1}),
        mixed({"weight": 1, "epochs": 1}, {"weight": 1}, {"weight": 1}),
        mixed({"weight": 1, "separate_turns": True}, {"weight": 1}, {"weight": 1}),
    ):
        with pytest.raises(UserError, match="parts was"):
            check_fingerprint(stored, make_train(changed).fingerprint)


def test_a_bad_record_is_replaced_in_its_own_source(mixed, tmp_path):
    wanted = indices(iter(make_train(mixed())), 11)
    path = tmp_path / "messages" / "rows.jsonl"
    lines = path.read_text().splitlines()
    lines[9] = json.dumps({"images": ["nowhere.png"], "messages": samples.messages("Q", "A")})
    path.write_text("\n".join(lines))
    pipeline = make_train(mixed(max_skip_fraction=0.1))
    assert indices(iter(pipeline), 11) == [0 if i == 9 else i for i in wanted]
    assert pipeline.skipped == {"missing": 1}
    assert [part["skipped"] for part in pipeline.by_source(11)] == [1, 0, 0]


def test_generated_and_own_data_together(mixed, data_root):
    """A part that is generated brings its tasks and its words."""
    bench = {"source": "token_bench", "train_images": 40, "test_images": 12, "name": "bench"}
    own = mixed().mixture[0]
    made = config(mixture=[own, {**bench, "tasks": ["needle"]}], dir=str(data_root), image_size=64)
    pipeline = make_train(made)
    assert pipeline.tasks == ("conversation", "needle") and len(pipeline.source) == 50
    batch = next(iter(pipeline))
    assert batch["images"].shape == (4, 2, 64, 64, 3) and batch["tokens"].shape[1] == 1
    assert pipeline.source[10].id.startswith("bench/train-")
    tests = open_source(made, "test")
    assert len(tests) == 10 + 12


def test_evaluation_of_a_mixture(mixed, tmp_path):
    """Held-out pictures of every source; or one path for all of them."""
    data = make_eval(mixed(test_fraction=0.2))
    assert {record.id.split("/")[-1][0] for record in map(data.source.__getitem__, range(4))} == {
        "r"
    }
    assert len(data.source) == 2 + 1 + 1
    other = samples.write_csv(tmp_path, samples.rows(3))
    apart = mixed(eval_path=str(other), test_fraction=0.2)
    assert len(open_source(apart, "train")) == 22 and len(make_eval(apart).source) == 3


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{"path": "a.csv", "wieght": 1}], "weight"),
        ([{"path": "a.csv", "weight": 0}], "data.mixture.weight"),
        ([{"path": "a.csv", "weight": True}], "data.mixture.weight"),
        ([{"path": "a.csv", "epochs": -1}], "data.mixture.epochs"),
        ([{"path": "a.csv", "weight": 1}, {"path": "b.csv"}], "some sources have a weight"),
        ([{"weight": 1}], "data.path: empty"),
        ([{"path": "a.csv", "source": "cvs"}], "csv"),
        ([{"path": "a.csv", "batch_size": 3}], "data.mixture"),
        ([{"path": 3}], "data.path"),
        (["a.csv"], "data.mixture"),
        ("a.csv", "data.mixture"),
    ],
)
def test_mixtures_that_make_no_sense(parts, words):
    with pytest.raises(UserError, match=words) as caught:
        config(mixture=parts)
    assert len(str(caught.value).splitlines()) <= 3
