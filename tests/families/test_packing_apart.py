"""Unrelated conversations in one row: each is read, and trained on, as if alone in it.

The first row has a conversation about two pictures of unlike sizes, one about a small picture and
one without pictures; the second is empty; the third holds one about another picture. There is more
room for text, pixels and (where images have unlike numbers of them) visual tokens than is needed.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from method_matrix import golden_models
from test_packing import conversation, cross_entropy, opened, texts

from efficient_vlm.errors import UserError
from efficient_vlm.processing.gather import Room
from efficient_vlm.processing.request import Example, pack_request, packs
from efficient_vlm.train.losses import token_cross_entropy
from efficient_vlm.train.step import loss_fn

SIZES = [[(40, 60), (24, 20)], [(18, 30)], [], [(18, 30)]]
TALKS = [([7, 8, 9], [10, 11]), ([12], [14, 15, 16]), ([5, 6], [13, 9]), ([8], [7, 12, 5])]
PACKS = [[0, 1, 2], [], [3]]
# Tokens that read patches of all pictures of a row cannot be chosen for each of them.
POOLED = ("molmo2", "molmo2_olmo")


def samples(vlm):
    rng = np.random.default_rng(1)
    for sizes, talk in zip(SIZES, TALKS, strict=True):
        pictured = [vlm.pictures(rng.integers(0, 255, (*s, 3)).astype(np.uint8)) for s in sizes]
        ids, targets = conversation(vlm, pictured, *talk)
        yield Example([ids], pictured, [targets])


def visual(sample, budget=None):
    """Visual tokens of a sample in the decoder."""
    for picture in sample.pictured:
        for part in (picture.pool_index, picture.slots):
            if part is not None:
                yield len(part)
                break
        else:
            yield from (min(int(n), budget or n) for n in picture.grids.prod(axis=1))


def room_of(vlm, packs, budget=None):
    """More than the largest of some rows needs."""
    variable, token = vlm.family.variable, vlm.family.image_token(vlm.config)
    pictured = [[p for sample in row for p in sample.pictured] for row in packs]
    every = [p for row in pictured for p in row]
    pooled = any(p.pool_index is not None for p in every)
    size = np.max([p.images.shape[1:3] for p in every], axis=0)
    if variable and not pooled:
        encoder, projector = vlm.model.encoder, vlm.model.make_projector()
        size = size + encoder["patch_size"] * projector.side
    most = max(sum(n for sample in row for n in visual(sample, budget)) for row in packs)
    return Room(
        text=3 + max(sum(int((np.array(s.ids[0]) != token).sum()) for s in row) for row in packs),
        images=1 + max(sum(len(p.images) for p in row) for row in pictured),
        size=tuple(map(int, size)),
        visual=1 + most if variable or pooled else 0,
        pooled=pooled,
    )


def packed(vlm, budget=None):
    """(the samples, the request of PACKS)."""
    chosen = list(samples(vlm))
    rows = [[chosen[number] for number in row] for row in PACKS]
    room = room_of(vlm, rows, budget)
    how = dict(variable=vlm.family.variable)
    model = vlm.processor.seeing(vlm.model)
    request = pack_request(model, rows, vlm.processor.rules, room, **how)
    return chosen, request


def places():
    """For each sample its row and its segment."""
    for row, members in enumerate(PACKS):
        for segment, number in enumerate(members, 1):
            yield number, row, segment


def check_as_alone(vlm, budget=None):
    chosen, request = packed(vlm, budget)
    together = np.asarray(vlm.logits(request))
    assert (request.inputs.segments[1] == -1).all() and np.isfinite(together).all()
    total = count = 0
    for number, row, segment in places():
        sample = chosen[number]
        ((text, targets),) = texts(sample, vlm.family.image_token(vlm.config))
        at = np.flatnonzero(request.inputs.segments[row] == segment)
        np.testing.assert_array_equal(request.inputs.text[row, at], text)
        alone = np.asarray(vlm.logits(vlm.batch([sample])))[0, : len(text)]
        np.testing.assert_allclose(together[row, at], alone, atol=3e-5 * np.abs(alone).max())
        total, count = total + cross_entropy(alone, text, targets), count + sum(targets)
    loss, number = token_cross_entropy(together, request.inputs.labels)["loss"]
    assert number == count and float(loss) == pytest.approx(float(total), rel=1e-5)
    return request


@pytest.mark.parametrize("name", golden_models())
def test_unrelated_rows_are_read_as_alone(name):
    vlm = opened(name)
    inputs = check_as_alone(vlm).inputs
    slots = inputs.placement.visual_index.shape[1]
    if vlm.family.variable and name not in POOLED:
        assert inputs.visual_room < slots  # Padding is left out in front of the decoder.


@pytest.mark.parametrize("policy", ["retain", "reindex"])
@pytest.mark.parametrize("name", golden_models())
def test_unrelated_rows_of_few_tokens_are_read_as_alone(name, policy):
    """As above, with pictures of which three tokens are kept."""
    vlm = opened(name).with_compressor("divprune", budget=3, position_policy=policy)
    pooled = name in POOLED
    assert packs(vlm.model, pooled) is not pooled
    if not pooled:
        check_as_alone(vlm, budget=3)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, inputs):
    """(sum of losses, its gradient)."""
    found, grads = jax.value_and_grad(
        lambda p: loss_fn(model, p, inputs, jax.random.key(0), {}), has_aux=True
    )(params)
    return found[0], grads


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma", "molmo2"])
def test_unrelated_rows_are_trained_on_as_alone(name):
    """Windows and M-RoPE, pictures that see the question, pooling across crops."""
    vlm = opened(name)
    chosen, request = packed(vlm)
    apart = vlm.batch(chosen)
    assert len(apart.inputs.text) == len(chosen) and len(request.inputs.text) == len(PACKS)
    (loss, ours), (wanted, theirs) = (
        gradient(r.model, vlm.params, r.inputs) for r in (request, apart)
    )
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    theirs = flatten_dict(theirs, sep="/")
    top = max(float(np.abs(leaf).max()) for leaf in theirs.values())
    for path, leaf in flatten_dict(ours, sep="/").items():
        # Biases of keys have no gradient but rounding: softmax does not see them.
        scale = max(float(np.abs(theirs[path]).max()), 1e-3 * top)
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-4 * scale, err_msg=path)


@pytest.mark.parametrize(
    "change", [dict(images=1), dict(size=(8, 8)), dict(text=8), dict(visual=9)]
)
def test_rows_that_a_room_does_not_hold(change):
    vlm = opened("qwen2_vl")
    rows = [list(samples(vlm))[:1]]
    room = dataclasses.replace(room_of(vlm, rows), **change)
    with pytest.raises(UserError) as caught:
        pack_request(vlm.model, rows, vlm.processor.rules, room, variable=True)
    assert len(str(caught.value).splitlines()) <= 3
