"""Batches: exact resume, one global order, stable fingerprints."""

import dataclasses
import json
import subprocess
import sys

import grain
import numpy as np
import pytest

from efficient_vlm.data import DataConfig, check_fingerprint, make_eval, make_train
from efficient_vlm.data.config import validate
from efficient_vlm.data.pipeline import preview
from efficient_vlm.errors import UserError


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_batch_is_as_agreed(small):
    pipeline = make_train(small)
    batch = next(iter(pipeline))
    length = batch["tokens"].shape[-1]
    expected = {
        "images": ((8, 1, 64, 64, 3), np.uint8),
        "image_mask": ((8, 1), bool),
        "tokens": ((8, 8, length), np.int32),
        "lengths": ((8, 8), np.int32),
        "prompt_lengths": ((8, 8), np.int32),
        "loss_mask": ((8, 8, length), bool),
        "task": ((8, 8), np.int32),
        "index": ((8,), np.int64),
    }
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected
    assert batch["image_mask"].all() and (batch["task"] >= 0).all()
    assert not batch["loss_mask"][..., 0].any()
    # Each slot: question and answer of that record, and no question twice out of the pool.
    for b in range(8):
        record = pipeline.source[int(batch["index"][b])]
        pool = [(c.prompt, c.answer, c.task) for c in record.conversations]
        for q in range(8):
            tokens, split = batch["tokens"][b, q], batch["prompt_lengths"][b, q]
            asked = (
                pipeline.tokenizer.decode(tokens[:split]),
                pipeline.tokenizer.decode(tokens[split:]),
                pipeline.tasks[batch["task"][b, q]],
            )
            pool.remove(asked)
            positions = np.arange(length)
            target = (positions >= split) & (positions < batch["lengths"][b, q])
            np.testing.assert_array_equal(batch["loss_mask"][b, q], target)


def test_preview_is_what_the_pipeline_has(small):
    """Programs are compiled for it while the data are built."""
    spec, tokenizer = preview(small)
    pipeline = make_train(small)
    assert spec == pipeline.spec
    assert tokenizer.fingerprint == pipeline.tokenizer.fingerprint
    assert preview(DataConfig(source="llava_json", path="my.json")) is None


def test_every_image_once_an_epoch_with_other_questions(small):
    batches = take(iter(make_train(small)), 10)  # Two epochs of 40.
    first = {int(i): b["tokens"][k] for b in batches[:5] for k, i in enumerate(b["index"])}
    second = {int(i): b["tokens"][k] for b in batches[5:] for k, i in enumerate(b["index"])}
    assert first.keys() == second.keys() == set(range(40))
    assert list(first) != list(second)
    assert sum((first[i] != second[i]).any() for i in first) > 35


def test_resume_is_exact(small):
    dataset = iter(make_train(small))
    take(dataset, 3)
    state = json.loads(json.dumps(dataset.get_state()))
    expected = take(dataset, 4)
    fresh = iter(make_train(small))
    fresh.set_state(state)
    for one, other in zip(expected, take(fresh, 4), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("threads", [0, 2])
def test_every_checkpoint_resumes_exactly(small, threads):
    config = dataclasses.replace(small, num_threads=threads, batch_size=4)
    wanted = take(iter(make_train(config)), 6)
    for stop in range(5):
        iterator = iter(make_train(config))
        take(iterator, stop)
        state = iterator.get_state()
        iterator.close()
        again = iter(make_train(config))
        again.set_state(state)
        assert_same(next(again), wanted[stop])


def test_orbax_saves_the_iterator(small, tmp_path):
    from orbax.checkpoint import v1 as ocp

    iterator = iter(make_train(small))
    take(iterator, 2)
    with ocp.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save_checkpointables(2, {"data": iterator})
    expected = take(iterator, 2)
    fresh = iter(make_train(small))
    with ocp.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.load_checkpointables(2, {"data": fresh})
    for one, other in zip(expected, take(fresh, 2), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("rows", [(range(4), range(4, 8)), ([0, 1, 6], [2, 3], [4, 5, 6, 7])])
def test_order_does_not_depend_on_processes(small, rows):
    """Each has its rows of the same batches; they may be here and there, and shared."""
    whole = take(iter(make_train(small)), 6)
    for own in rows:
        part = take(iter(make_train(small, rows=own)), 6)
        for batch, mine in zip(whole, part, strict=True):
            assert_same({k: x[list(own)] for k, x in batch.items()}, mine)


def test_threads_and_memory_do_not_change_batches(small):
    wanted = take(iter(make_train(small)), 8)
    for changes in ({"num_threads": 0}, {"cache_mb": 0}, {"prefetch": 7, "num_threads": 4}):
        for one, other in zip(
            wanted, take(iter(make_train(dataclasses.replace(small, **changes))), 8), strict=True
        ):
            assert_same(one, other)


def test_grain_agrees_that_resume_is_exact(small):
    """Grain's own check, on the finite first part of the same dataset."""
    pipeline = make_train(small)
    order = grain.MapDataset.range(40).shuffle(seed=0).batch(8).map_with_index(pipeline._load)
    grain.experimental.assert_equal_output_after_checkpoint(order.to_iter_dataset())


def test_fingerprint_names_the_field(small):
    stored = json.loads(json.dumps(make_train(small).fingerprint))
    check_fingerprint(stored, make_train(small).fingerprint)
    changes = {
        "seed": {"seed": 1},
        "batch_size": {"batch_size": 4},
        "questions": {"questions_per_image": 4},
        "max_length": {"max_length": 12},
        "image_size": {"image_size": 32, "canvas": 64},
        "content": {"dataset_seed": 3, "train_images": 4, "test_images": 1},
    }
    for field, change in changes.items():
        current = make_train(dataclasses.replace(small, **change)).fingerprint
        with pytest.raises(UserError, match=rf"\b{field} was ") as caught:
            check_fingerprint(stored, current)
        assert len(str(caught.value).splitlines()) <= 3
        check_fingerprint(stored, current, allow=True)


def test_fingerprint_ignores_what_does_not_matter(small):
    other = dataclasses.replace(small, num_threads=0, prefetch=1, cache_mb=0)
    assert make_train(small).fingerprint == make_train(other).fingerprint
    split = make_train(small, rows=range(4, 8))
    assert split.fingerprint == make_train(small).fingerprint


def test_eval_is_finite_and_in_order(small):
    data = make_eval(dataclasses.replace(small, batch_size=8))
    assert len(data) == 2 and len(list(data)) == 2
    index = np.concatenate([b["index"] for b in data])
    assert index.tolist() == [*range(12), *[-1] * 4]
    assert [len(a) for a in data.answers] == [8] * 12 + [0] * 4
    last = data.batches[-1]
    assert not last["lengths"][4:].any() and not last["loss_mask"][4:].any()
    assert not last["image_mask"][4:].any() and (last["task"][4:] == -1).all()
    for k in range(12):
        batch, b = data.batches[k // 8], k % 8
        for q, answer in enumerate(data.answers[k]):
            tokens, split = batch["tokens"][b, q], batch["prompt_lengths"][b, q]
            assert data.tokenizer.decode(tokens[split:]) == answer
            assert data.tokenizer.decode(tokens[:split]) == data.prompts[k][q]
    np.testing.assert_array_equal(data.image(3), data.batches[0]["images"][3])
    assert data.record(3).meta["glyphs"].shape[1] == 7
    assert len(make_eval(small, limit=5).batches) == 1


def test_image_size_apart_from_canvas(small):
    config = dataclasses.replace(small, canvas=64, image_size=[32, 48])
    assert next(iter(make_train(config)))["images"].shape == (8, 1, 32, 48, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": "llava"}, "llava_json"),
        ({"source": "llava_json"}, "data.path"),
        ({"resize": "crop"}, "data.resize"),
        ({"image_size": "big"}, "data.image_size"),
        ({"image_size": [3, 4, 5]}, "data.image_size"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"batch_size": 2.5}, "data.batch_size"),
        ({"batch_size": True}, "data.batch_size"),
        ({"noise": "loud"}, "data.noise"),
        ({"tasks": [1]}, "data.tasks"),
        ({"max_skip_fraction": 2}, "data.max_skip_fraction"),
        ({"path": 3}, "data.path"),
        ({"tsks": []}, "tasks"),
    ],
)
def test_bad_config(change, named):
    with pytest.raises(UserError, match=named) as caught:
        DataConfig.from_mapping(change)
    assert len(str(caught.value).splitlines()) <= 3


def test_config_takes_lists_and_names():
    config = DataConfig.from_mapping(
        {"tasks": ["needle"], "dense_px": [6, 9], "image_size": [8, 9]}
    )
    assert config.tasks == ("needle",) and config.size == (8, 9)
    assert DataConfig(tasks="needle,count").tasks == ("needle", "count")
    validate(DataConfig(noise=0))
    hash(config)


def test_more_questions_than_the_pool(small):
    with pytest.raises(UserError, match="data.questions_per_image"):
        make_train(dataclasses.replace(small, questions_per_image=17))


def test_process_ends_after_an_error_in_a_thread(small):
    """Grain's threads must not keep a failed run alive."""
    code = (
        "import sys, json\n"
        "from efficient_vlm.data import DataConfig, make_train\n"
        "from efficient_vlm.errors import UserError\n"
        "try:\n"
        "    for batch in make_train(DataConfig(**json.loads(sys.argv[1]))): pass\n"
        "except UserError as error:\n"
        "    print(error); sys.exit(2)\n"
    )
    fields = dataclasses.asdict(dataclasses.replace(small, max_length=2))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(fields)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "too_long" in done.stdout and "raise data.max_length" in done.stdout
