"""Conversations of published families in one batch: each is read, and trained on, as if alone.

The batch has two pictures of unlike sizes in one row, with two conversations about them, and one
small picture in the other; what is packed, padded and shared differs from family to family.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_matrix import GOLDEN, golden_models

import efficient_vlm as evlm
from efficient_vlm.errors import UserError
from efficient_vlm.processing.batch import question_inputs, training_inputs
from efficient_vlm.processing.concatenate import concatenate
from efficient_vlm.processing.gather import fitted
from efficient_vlm.processing.pictures.molmo import Molmo
from efficient_vlm.processing.pictures.molmo2 import Molmo2
from efficient_vlm.processing.request import Example
from efficient_vlm.train import step as steps

SMALL = {name: dict(min_pixels=64, max_pixels=4000) for name in ("qwen2_vl", "qwen2_5_vl")}
SMALL["qwen3_vl"] = dict(min_pixels=64, max_pixels=20_000)
# In these, pictures see the question: each conversation gets a row of its own.
PREFIX = ("paligemma", "paligemma2")
QUESTIONS, ANSWERS = ([7, 8, 9], [10, 11]), ([12, 13], [14, 15, 16])


def opened(name):
    vlm = evlm.from_pretrained(GOLDEN / name, **SMALL.get(name, {}))
    # Crops of the tiny encoders, which no preprocessor_config.json beside them asks for.
    if name.startswith("molmo2"):
        vlm.processor.__dict__["pictures"] = Molmo2(crop=12, patch=4, max_crops=3, margins=(1, 1))
    elif name.startswith("molmo"):
        vlm.processor.__dict__["pictures"] = Molmo(crop=48, patch=8, max_crops=3, margins=(2, 2))
    return vlm


def conversation(vlm, pictured, question, answer):
    """(ids, targets): text, pictures with text between, a question and its answer."""
    rules = vlm.family.rules(vlm.config)
    around = [[], []] if not rules["block_ids"] else [[i] for i in sorted(rules["block_ids"])[:2]]
    ids = [2, 3]
    for picture in pictured:
        count = int(picture.grids.prod(axis=1).sum())
        for part in (picture.slots, picture.pool_index):
            count = count if part is None else len(part)
        ids += [*around[0], *[rules["image_token"]] * count, *around[1], 4]
    ids += question
    return ids + answer, [False] * len(ids) + [True] * len(answer)


def examples(vlm):
    rng = np.random.default_rng(0)
    sizes = [[(40, 60), (24, 20)], [(18, 30)]]
    for row in sizes:
        pictured = [vlm.pictures(rng.integers(0, 255, (*s, 3)).astype(np.uint8)) for s in row]
        pairs = zip(QUESTIONS, ANSWERS, strict=True)
        talks = [conversation(vlm, pictured, *pair) for pair in pairs]
        talks = talks if len(row) == 2 else talks[:1]
        yield Example([ids for ids, _ in talks], pictured, [targets for _, targets in talks])


def apart(example):
    """Each conversation alone."""
    for ids, targets in zip(example.ids, example.targets, strict=True):
        yield dataclasses.replace(example, ids=[ids], targets=[targets])


def texts(example, token):
    """For each conversation its text without slots, and which of it is to be predicted."""
    for ids, targets in zip(example.ids, example.targets, strict=True):
        keep = np.array(ids) != token
        yield np.array(ids)[keep], np.array(targets)[keep]


def rows_of(inputs, example_rows):
    """For each conversation its row and its places in it, by the segments alone."""
    rows, each = len(inputs.text), max(example_rows)
    for number, count in enumerate(example_rows):
        for question in range(count):
            row = number * (rows // len(example_rows))
            row += question if rows > len(example_rows) else 0
            segments = inputs.segments[row]
            own = (segments == 0) | (segments == question + 1)
            yield row, np.flatnonzero(own)
    assert inputs.questions in (1, each)


def cross_entropy(logits, text, targets):
    """Sum in nats, in float64, by its definition."""
    logits = np.asarray(logits, np.float64)
    places = np.flatnonzero(targets) - 1
    chosen = logits[places, text[places + 1]]
    return (np.log(np.exp(logits[places]).sum(axis=-1)) - chosen).sum()


@pytest.mark.parametrize("name", golden_models())
def test_packed_mixed_and_trained_as_alone(name):
    vlm = opened(name)
    batch, token = list(examples(vlm)), vlm.family.image_token(vlm.config)
    request = vlm.batch(batch)
    assert request.inputs.questions == (1 if name in PREFIX else 2)
    together = np.asarray(vlm.logits(request))
    places = rows_of(request.inputs, [2, 1])
    total = count = 0
    for example in batch:
        for one, (text, targets) in zip(apart(example), texts(example, token), strict=True):
            alone = np.asarray(vlm.logits(vlm.batch([one])))[0, : len(text)]
            row, at = next(places)
            np.testing.assert_array_equal(request.inputs.text[row, at], text)
            scale = np.abs(alone).max()
            np.testing.assert_allclose(together[row, at], alone, atol=3e-5 * scale)
            total, count = total + cross_entropy(alone, text, targets), count + sum(targets)
    check_step(vlm, request, total / count)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_text_is_packed_and_trained_as_alone(name):
    vlm = opened(name)
    ids, targets = zip(
        *(
            ([2, 3, *q, *a], [False] * (2 + len(q)) + [True] * len(a))
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ),
        strict=True,
    )
    batch = [Example(ids, (), targets), Example(ids[:1], (), targets[:1])]
    request = vlm.batch(batch)
    assert request.inputs.questions == 2 and request.inputs.pictures is None
    total = count = 0
    for example in batch:
        for one, (text, target) in zip(apart(example), texts(example, None), strict=True):
            alone = vlm.logits(vlm.batch([one]))[0]
            total, count = total + cross_entropy(alone, text, target), count + sum(target)
    check_step(vlm, request, total / count)


METHODS = {
    "divprune": dict(budget=3),
    "stride": dict(budget=3, position_policy="reindex"),
    "fastv": dict(layer=1, keep=4),  # Each conversation keeps tokens of its own.
    "vtw": dict(layer=1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_packed_as_alone_with_methods(name, method):
    vlm = opened(name).with_compressor(method, **METHODS[method])
    example = list(examples(vlm))[0]
    request = vlm.batch([example])
    assert request.inputs.questions == 2
    assert request.model.selects_by_text is (method == "fastv")
    together = np.asarray(vlm.logits(request))
    places = rows_of(request.inputs, [2])
    for number, one in enumerate(apart(example)):
        (text, _), *_ = texts(one, vlm.family.image_token(vlm.config))
        alone = np.asarray(vlm.logits(vlm.batch([one])))[0, : len(text)]
        row, at = next(places)
        # Shared text sees what the first conversation has chosen.
        own = (request.inputs.segments[row, at] > 0) | (method != "fastv") | (number == 0)
        assert own.sum() >= len(QUESTIONS[number]) + len(ANSWERS[number])
        atol = 3e-5 * np.abs(alone).max()
        np.testing.assert_allclose(together[row, at[own]], alone[own], atol=atol)


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl", "paligemma", "molmo_olmo", "molmo2"])
def test_batches_below_each_other(name):
    """Of unlike pictures, tiles and texts, and of no picture: each row is read as before."""
    vlm = opened(name)
    few, *_ = examples(vlm)
    one = dataclasses.replace(few, ids=few.ids[:1], targets=None)
    *_, small = examples(vlm)
    none = Example([[2, 3, 4, 5]])
    requests = [vlm.batch([example]) for example in (one, small, none)]
    inputs = concatenate(vlm.model, [request.inputs for request in requests])
    model = fitted(requests[0].model, inputs.pictures, vlm.family.variable)
    inputs.check(model.layout(inputs.pictures))
    assert (inputs.labels >= 0).sum() == len(ANSWERS[0])  # Those of `small` alone.
    together = np.asarray(vlm.logits(dataclasses.replace(requests[0], model=model, inputs=inputs)))
    for row, request in enumerate(requests):
        alone = np.asarray(vlm.logits(request))[0, : request.inputs.lengths[0]]
        scale = np.abs(alone).max()
        np.testing.assert_allclose(together[row, : len(alone)], alone, atol=3e-5 * scale)


def test_batches_that_cannot_be_joined(make_model, make_batch):
    qwen, model = opened("qwen2_vl"), make_model()
    placed = qwen.place([[2, 3]], [()]).inputs
    packed = training_inputs(make_batch(2, 2))
    questions = question_inputs(make_batch(2, 2))
    larger = question_inputs(make_batch(2, 2, side=40))
    for parts, words in (
        ([placed, placed.replace(placement=None)], "placement: 1 of 2"),
        ([packed, questions], r"\[1, 2\] rows of text"),
        ([questions, larger], "unlike pictures"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            concatenate(model, parts)
        assert len(str(caught.value).splitlines()) <= 3
    joined = concatenate(model, [packed, packed])
    joined.check()
    assert (joined.questions, joined.longest) == (packed.questions, packed.longest)
    np.testing.assert_array_equal(joined.text, np.concatenate([packed.text] * 2))


def check_step(vlm, request, expected):
    """One step of training: its loss, and parameters that have moved and are finite."""
    tx = optax.sgd(1e-2)
    step = steps.make_train_step(request.model, tx)
    state = steps.init_state(jax.tree.map(jnp.copy, vlm.params), tx)
    state, metrics = step(state, request.inputs)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=2e-5)
    assert bool(metrics["ok"]) and float(metrics["grad_norm"]) > 0
