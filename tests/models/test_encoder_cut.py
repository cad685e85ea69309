"""`encoder_cut` inside an encoder, beside loops in float64, and through a projector."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from loop_encoder import FIELDS, GRID, embedded, layer, norm

from efficient_vlm.compressors import build
from efficient_vlm.compressors.in_encoder.unit_scores import CHOICES, SCORES
from efficient_vlm.errors import UserError
from efficient_vlm.models.encoder import ViT
from efficient_vlm.models.init import init_params
from efficient_vlm.models.inputs import Pictures
from efficient_vlm.models.vlm import VisionLanguageModel

SIDE, UNITS = 2, 9
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)


# --- the encoder in float64, patch by patch -------------------------------------------------------


def patches_of(unit):
    """Numbers of the patches of one unit, in raster order."""
    row, column = divmod(unit, GRID[1] // SIDE)
    return [
        (SIDE * row + i) * GRID[1] + SIDE * column + j for i in range(SIDE) for j in range(SIDE)
    ]


def scores_of(name, units, before, after, received, mean_row):
    """A number for each of the units that are left; arrays by patch, in the order of units."""

    def mean(row):
        return np.asarray(row).reshape(len(units), -1).mean(axis=1)

    if name == "norm":
        return mean(np.linalg.norm(after, axis=1))
    if name == "change":
        return mean(np.linalg.norm(after - before, axis=1))
    if name in ("attention", "mean_query"):
        return mean(received if name == "attention" else mean_row)
    centre = after.reshape(len(units), SIDE**2, -1).mean(axis=1)
    centre = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    at = [divmod(unit, GRID[1] // SIDE) for unit in units]
    found = []
    for i, (row, column) in enumerate(at):
        near = [
            centre[i] @ centre[j]
            for j, (r, c) in enumerate(at)
            if j != i and max(abs(r - row), abs(c - column)) == 1
        ]
        found.append(1 - np.mean(near) if near else 1.0)
    return np.array(found)


def encoded(params, picture, name, cuts):
    """The features of the units that are left, [K, SIDE**2, D], and the units' numbers.

    Args:
      params: of the encoder, float64.
      picture: uint8 [24, 24, 3].
      name: of a score.
      cuts: layer -> units to keep behind it.
    """
    x = embedded(picture, params)
    units = list(range(UNITS))
    x = x[[patch for unit in units for patch in patches_of(unit)]]  # Attention has no order.
    for index in range(FIELDS["depth"]):
        before = x
        x, received, mean_row = layer(x, jax.tree.map(lambda p: p[index], params["layers"]))  # noqa: B023
        if index + 1 in cuts:
            value = scores_of(name, units, before, x, received, mean_row)
            chosen = sorted(np.argsort(-value, kind="stable")[: cuts[index + 1]])
            x = x.reshape(len(units), SIDE**2, -1)[chosen].reshape(-1, x.shape[-1])
            units = [units[i] for i in chosen]
    return norm(x, params["norm"]).reshape(len(units), SIDE**2, -1), units


@pytest.fixture(scope="module")
def vit():
    """(encoder, parameters that are no ones and zeros)."""
    module = ViT(**FIELDS)
    params = nn.unbox(module.init(jax.random.key(0), PICTURES))["params"]
    rng = np.random.default_rng(1)
    return module, jax.tree.map(
        lambda p: (p + 0.2 * rng.standard_normal(p.shape)).astype(np.float32), params
    )


@pytest.mark.parametrize("cuts", [{2: 4}, {1: 6, 3: 2}])
@pytest.mark.parametrize("name", ["attention", "mean_query", "change", "norm", "neighbours"])
def test_agrees_with_loops_in_float64(vit, name, cuts):
    module, params = vit
    method = build("encoder_cut", layers=tuple(cuts), keep=tuple(cuts.values()), score=name)
    stages = method.stages(FIELDS["depth"], 36, patches=GRID, side=SIDE)
    found, seen = jax.jit(lambda p: module.apply({"params": p}, PICTURES, stages=stages))(params)
    exact = jax.tree.map(np.float64, params)
    for row, picture in enumerate(PICTURES):
        features, units = encoded(exact, picture, name, cuts)
        source = np.full(36, -1)
        for slot, unit in enumerate(units):
            source[patches_of(unit)] = slot * SIDE**2 + np.arange(SIDE**2)
        np.testing.assert_array_equal(seen["tokens"].source[row], source)
        np.testing.assert_allclose(found[row], features.reshape(found[row].shape), atol=2e-5)


# --- through a projector --------------------------------------------------------------------------


def model_of(projector, **encoder):
    """A model for pictures of 24 x 24 pixels, 6 x 6 patches."""
    fields = dict(image_size=24, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=16)
    decoder = dict(width=16, num_heads=2, segments=[dict(layers=1)], mlp_dim=16)
    decoder["deepstack"] = projector.get("deepstack", 0)
    return VisionLanguageModel(
        vocab_size=20,
        encoder={**fields, **encoder},
        decoder=decoder,
        projector=projector,
        connector=dict(identity=projector["name"] != "average_pool"),
        compressor=dict(name="none", budget=9),
    )


PROJECTORS = {
    "merger": dict(name="patch_merger", side=2),
    "deepstack": dict(name="patch_merger", side=2, deepstack=1),
    "mean": dict(name="average_pool", side=2),
    "attention": dict(name="attention_pool", side=2, hidden_dim=8, num_heads=2, head_dim=8),
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_cut_behind_the_last_attention_is_a_choice_of_tokens(kind):
    """Where no patch looks at another any more, tokens are those of the whole picture."""
    deep = dict(feature_layers=(0, -1), final_norm=False) if kind == "deepstack" else {}
    odd = dict(image_size=20) if kind == "attention" else {}  # 5 x 5 patches: units of 1, 2 and 4.
    model = model_of(PROJECTORS[kind], **deep, **odd)
    params = nn.unbox(init_params(model, jax.random.key(0)))
    # The last layer adds nothing: its attention has no say, nor has what it would see.
    for name in ("out", "down"):
        last = params["vit"]["layers"]
        last = last["attention"] if name == "out" else last
        last[name] = jax.tree.map(lambda p: p.at[-1].set(0), last[name])
    side = model.make_encoder().image_size
    pictures = Pictures(PICTURES[:, None, :side, :side], np.ones((2, 1), bool))

    def encode(model):
        return model.apply({"params": params}, pictures, method="encode")[0]

    whole = encode(model)
    cut = encode(model.with_compressor("encoder_cut", 4, layers=(2,), score="norm"))
    assert cut.embed.shape[1] == 4
    for row in range(2):
        kept = np.flatnonzero(cut.source[row] >= 0)
        np.testing.assert_array_equal(cut.source[row][kept], np.arange(4))
        np.testing.assert_allclose(cut.embed[row], whole.embed[row, kept], atol=1e-5)
        np.testing.assert_allclose(cut.position[row], whole.position[row, kept])
    assert np.asarray(cut.mask).all()
    assert (np.asarray(cut.size) == 1).all()


@pytest.mark.parametrize("score", [*(name for name in SCORES if name != "cls"), *CHOICES])
def test_a_row_keeps_what_it_keeps_alone(score):
    """A small picture padded beside a larger one: the same share of its own units."""
    model = model_of(PROJECTORS["merger"], position="none", rope_theta=100.0)
    params = nn.unbox(init_params(model, jax.random.key(0)))
    model = model.with_compressor("encoder_cut", score=score, layers=(1, 2), keep=(0.7, 0.4))
    valid = np.array([[[4, 6]], [[6, 6]]], np.int32)
    both = Pictures(PICTURES[:, None], np.ones((2, 1), bool), valid)
    small = Pictures(PICTURES[:1, None, :16], np.ones((1, 1), bool), valid[:1])

    def encode(pictures):
        return model.apply({"params": params}, pictures, method="encode")[0]

    beside, alone = encode(both), encode(small)
    # 6 units: ceil(.7 * 6) = 5, then ceil(4/7 * 5) = 3; of 9: 7 and 4.
    assert np.asarray(beside.mask).sum(axis=1).tolist() == [3, 4]
    assert np.asarray(alone.mask).sum() == 3
    if score == "random":  # Drawn for a number of places.
        return
    np.testing.assert_allclose(beside.embed[0, :3], alone.embed[0], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(beside.source)[0, :6], alone.source[0])


def test_gradients_reach_what_stays(vit):
    module, params = vit
    stages = build("encoder_cut", budget=3, score="norm").stages(4, 36, patches=GRID, side=SIDE)

    def loss(params):
        return (module.apply({"params": params}, PICTURES, stages=stages)[0] ** 2).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(budget=3, layers=(4,)), ("compressor.layers", "4 layers", "0 to 3")),
        (dict(budget=3, layers=(3, 1)), ("rising",)),
        (dict(budget=3, layers=(0,)), ("score=norm",)),
        (dict(keep=(0.5, 0.7), layers=(1, 2)), ("grows",)),
        (dict(keep=(0.5,), layers=(1, 2)), ("1 values for 2 layers",)),
        (dict(keep=(0.5, 3), layers=(1, 2)), ("not both",)),
        (dict(keep=(1.5,)), ("between 0 and 1",)),
        (dict(), ("one of the two",)),
        (dict(budget=3, keep=(0.5,)), ("one of the two",)),
        (dict(budget=10), ("1 to 9",)),
        (dict(budget=3, score="cls"), ("no CLS token", "attention")),
        (dict(budget=3, score="atention"), ("attention",)),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError) as caught:
        build("encoder_cut", **options).stages(4, 36, patches=GRID, side=SIDE)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert all(word in message for word in words), message
