"""Distillation of what is inside: what is watched, losses by hand, a student that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import golden_with_words, png, row, tuning_config, write_rows

import efficient_vlm as evlm
from efficient_vlm.compressors import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.models.watched import Watched, pieces
from efficient_vlm.processing.gather import fitted
from efficient_vlm.train.features import feature_losses, layers_of
from efficient_vlm.train.objective import DistilConfig
from efficient_vlm.train.prepare import prepare

LORA = dict(name="lora", rank=4, targets="decoder")
ALL = dict(hidden=1.0, attention=1.0, relations=1.0)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return evlm.from_pretrained(
        golden_with_words("qwen2_5_vl", tmp_path_factory.mktemp("features") / "qwen")
    )


# Of one shape, so that each step is one program.
ROWS = [row([png(n, 32, 32)], "<image> what is this ?", f"it is {n} .") for n in range(2)]


# --- what is watched ------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [False, True])
def test_watching_changes_nothing_and_sees_the_last_layer(
    make_model, make_batch, inputs, init, inner
):
    """The head of what the last layer leaves gives the logits; attention sums to 1."""
    model = make_model()
    if inner:  # A cut between the layers: the second has fewer tokens.
        model = model.with_compressor("fastv", 4, layer=1)
    given, params = inputs(make_batch(questions=1)), init(model)
    plain = model.apply({"params": params}, given)
    seen = model.apply({"params": params}, given, watch=(0, 1))
    np.testing.assert_allclose(seen.logits, plain.logits, atol=1e-5)
    assert plain.watched == {} and set(seen.watched) == {0, 1}
    last = seen.watched[1]
    head = model.apply({"params": params}, last.text, method=lambda m, x: m.language.logits(x))
    np.testing.assert_allclose(head, plain.logits, atol=1e-5)
    first = seen.watched[0]
    assert (first.visual.mask.shape[1] > last.visual.mask.shape[1]) == inner
    for each in (first, last):
        live = np.asarray(given.live)
        sums = np.asarray(each.attention.sum(-1))[live]
        np.testing.assert_allclose(sums, 1, atol=1e-5)
        assert not np.asarray(each.attention)[~np.asarray(each.visual.mask)[:, None].repeat(
            live.shape[1], 1)].any()  # fmt: skip


def test_watched_attention_is_that_of_a_probe(make_model, make_batch, inputs, init):
    model = make_model()
    given, params = inputs(make_batch(questions=1)), init(model)
    layout = model.layout(given.pictures)

    def attention(m, probe):
        visual = m.compress(*m.encode(given.pictures), given, layout)
        return m.read(visual, given, layout, probe=probe)[1]["visual_attention"]

    places = jnp.broadcast_to(jnp.arange(given.text.shape[1]), given.text.shape)
    expected = model.apply({"params": params}, places, method=attention)
    found = model.apply({"params": params}, given, watch=(0, 1)).watched
    for layer in (0, 1):
        np.testing.assert_allclose(found[layer].attention, expected[layer], atol=1e-6)


def test_pieces():
    assert pieces(0, 5, ()) == [(0, 5)]
    assert pieces(0, 5, (0, 4)) == [(0, 1), (1, 4), (4, 5)]
    assert pieces(2, 5, (1, 3)) == [(2, 3), (3, 4), (4, 5)]
    assert pieces(2, 2, (1,)) == []
    assert layers_of((-1, 0, 5), 6) == (0, 5)
    with pytest.raises(UserError, match="distil.layers: 6 of a decoder of 6 layers"):
        layers_of((6,), 6)


# --- losses by hand -------------------------------------------------------------------------------

DRAW = np.random.default_rng(3)
SLOTS = 6


def drawn(source, count, text=4, width=5):
    """A layer of one row whose tokens hold these slots."""
    held = np.array([[n in source for n in range(count)]])
    visual = VisualTokens(
        embed=jnp.asarray(DRAW.normal(size=(1, count, width)), jnp.float32),
        position=jnp.zeros((1, count, 2)),
        size=jnp.ones((1, count)),
        mask=jnp.asarray(held),
        source=jnp.asarray([source], jnp.int32),
    )
    looks = DRAW.random((1, text, count)) * held[:, None]
    looks = jnp.asarray(looks / looks.sum(-1, keepdims=True), jnp.float32)
    return Watched(visual, jnp.asarray(DRAW.normal(size=(1, text, width)), jnp.float32), looks)


@pytest.mark.parametrize("teacher", [[0, 1, 2, 3, 4, -1], [0, 0, 1, 1, 2, -1]])
@pytest.mark.parametrize("student", [[-1, 0, -1, 1, -1, -1], [0, 0, 1, 1, 1, -1]])
def test_losses_against_loops(student, teacher):
    """Float64 loops over slots: tokens that were dropped, merged, or padding."""
    ours, theirs = drawn(student, 2), drawn(teacher, 5)
    labels = np.array([[-1, 3, 5, -1]])
    found = feature_losses({7: ours}, {7: theirs}, labels, ALL)

    o, t = (jax.tree.map(lambda x: np.asarray(x, np.float64)[0], each) for each in (ours, theirs))
    places = [1, 2]
    squares = [np.mean((o.text[p] - t.text[p]) ** 2) for p in places]
    np.testing.assert_allclose(found["hidden"], (sum(squares), 2), rtol=1e-5)

    held = [[n for n in range(SLOTS) if student[n] == j and teacher[n] >= 0] for j in range(2)]
    share = {n: teacher.count(teacher[n]) for n in range(SLOTS)}
    divergence = 0.0
    for p in places:
        p_of = np.array([sum(t.attention[p][teacher[n]] / share[n] for n in own) for own in held])
        p_of, q_of = p_of / p_of.sum(), o.attention[p] / o.attention[p].sum()
        divergence += np.sum(p_of * np.log(p_of / q_of))
    np.testing.assert_allclose(found["attention"], (divergence, 2), rtol=1e-4)

    means = np.array([np.mean([t.visual.embed[teacher[n]] for n in own], axis=0) for own in held])

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (unit @ unit.T).ravel()

    a, b = cosines(o.visual.embed), cosines(means)
    angle = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found["relations"], (angle, 1), rtol=1e-4, atol=1e-6)


def test_other_grids_are_refused():
    given = {0: drawn([0] * 5, 2)}, {0: drawn([0] * 6, 2)}, np.ones((1, 4), np.int32)
    for name in ("attention", "relations"):
        with pytest.raises(UserError, match="visual tokens over 5 slots of the student, 6"):
            feature_losses(*given, [name])
    assert set(feature_losses(*given, ["hidden"])) == {"hidden"}  # As the error says.


# --- a student ------------------------------------------------------------------------------------


def test_all_tokens_have_nothing_to_learn(vlm):
    """A fresh adapter changes nothing, so with all tokens student and teacher are one."""
    seen = []
    vlm.finetune(
        ROWS,
        adapt=LORA,
        steps=1,
        distil=dict(kind="forward_kl", layers=(0, -1), **ALL),
        log=lambda step, metrics: seen.append(metrics),
    )
    for name in ("", "_hidden", "_attention", "_relations"):
        assert abs(seen[0][f"distillation{name}"]) < 1e-6, name


@pytest.mark.parametrize("method", [dict(name="divprune"), dict(name="fastv", layer=1)])
def test_fewer_tokens_learn_from_inside(vlm, method):
    """In front of the decoder and inside it."""
    seen = []
    vlm.finetune(
        ROWS,
        adapt=LORA,
        compressor=dict(method, budget=2),
        steps=8,
        learning_rate=1e-2,
        batch_size=2,
        distil=ALL,
        log=lambda step, metrics: seen.append(metrics),
    )
    assert "distillation" not in seen[0]
    first, last = seen[0], seen[-1]
    weighted = [sum(each[f"distillation_{name}"] for name in ALL) for each in (first, last)]
    assert weighted[1] < 0.7 * weighted[0]
    assert all(first[f"distillation_{name}"] > 0 for name in ALL)


def test_a_teacher_costs_no_second_copy(vlm, tmp_path):
    """Arguments of the compiled step: base, adapters and their moments, the batch; once."""
    rows = [{**each, "images": [f"{n}.png"]} for n, each in enumerate(ROWS)]
    for n, each in enumerate(ROWS):
        (tmp_path / f"{n}.png").write_bytes(each["images"][0])
    config = tuning_config(vlm.directory, write_rows(tmp_path / "rows.jsonl", rows), adapt=LORA)
    config.distil = dict(kind="forward_kl", **ALL)
    setup = prepare(config, tmp_path, lambda line: None)
    inputs = next(iter(setup.pipeline)).inputs
    shaped = setup.programs[0]
    step = shaped._make((fitted(shaped._models[0], inputs.pictures, True),))
    compiled = step.lower(setup.start.shapes, inputs).compile()
    given = (setup.start.shapes, step._frozen, inputs)
    once = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(given))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params))
    found = compiled.memory_analysis().argument_size_in_bytes
    assert weights < found <= once < 2 * weights


def test_settings():
    assert not DistilConfig().teaches and DistilConfig(relations=0.5).teaches
    with pytest.raises(UserError, match="hidden_kind"):
        DistilConfig(hidden_kind="l2")
    with pytest.raises(UserError, match="distil.layers"):
        DistilConfig(hidden=1.0, layers=())
    with pytest.raises(UserError, match="distil.hidden"):
        DistilConfig(hidden=-1.0)
    with pytest.raises(UserError, match="not its inside"):
        DistilConfig(kind="forward_kl", teacher="other", attention=1.0)
