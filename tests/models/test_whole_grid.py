"""`ipcv` and `encoder_exit`: the whole grid leaves the encoder; beside loops in float64."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from loop_encoder import FIELDS, GRID, embedded, layer, norm

from efficient_vlm.compressors import build
from efficient_vlm.errors import UserError
from efficient_vlm.models.encoder import ViT
from efficient_vlm.models.init import init_params
from efficient_vlm.models.inputs import Pictures
from efficient_vlm.models.vlm import VisionLanguageModel

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)


def restored(picture, params, at, kept, stabilised, nearest):
    """Features [36, D] by the words of arXiv 2512.18747."""
    x = embedded(picture, params)
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(FIELDS["depth"])]
    for index in range(at):
        before = x
        x = layer(x, layers[index])[0]
    change = np.linalg.norm(x - before, axis=-1)
    stay = sorted(np.argsort(-change, kind="stable")[:kept])
    away, stored = [i for i in range(36) if i not in stay], x
    near = {
        i: sorted(stay, key=lambda j: ((stored[i] - stored[j]) ** 2).sum())[:nearest] for i in away
    }

    def whole(x):
        every = np.zeros_like(stored)
        every[stay] = x
        for i in away:
            every[i] = stored[i] + np.mean([every[j] - stored[j] for j in near[i]], axis=0)
        return every

    x = x[stay]
    for index in range(at, FIELDS["depth"]):
        context = whole(x) if index < at + stabilised else None
        x = layer(x, layers[index], context)[0]
    return norm(whole(x), params["norm"])


@pytest.fixture(scope="module")
def vit():
    """(encoder, parameters that are no ones and zeros)."""
    module = ViT(**FIELDS)
    params = nn.unbox(module.init(jax.random.key(0), PICTURES))["params"]
    rng = np.random.default_rng(1)
    return module, jax.tree.map(
        lambda p: (p + 0.2 * rng.standard_normal(p.shape)).astype(np.float32), params
    )


@pytest.mark.parametrize(("stabilised", "nearest"), [(0, 1), (1, 3), (2, 10)])
def test_ipcv_agrees_with_loops_in_float64(vit, stabilised, nearest):
    module, params = vit
    options = dict(layer=2, keep=None, budget=12, stabilised=stabilised, nearest=nearest)
    stages = build("ipcv", **options).stages(FIELDS["depth"], 36, patches=GRID, side=2)
    found, seen = jax.jit(lambda p: module.apply({"params": p}, PICTURES, stages=stages))(params)
    assert "tokens" not in seen
    exact = jax.tree.map(np.float64, params)
    for row, picture in enumerate(PICTURES):
        features = restored(picture, exact, 2, 12, stabilised, nearest)
        np.testing.assert_allclose(found[row], features, atol=2e-5)


def test_exit_is_the_encoder_with_fewer_layers(vit):
    module, params = vit
    stages = build("encoder_exit", layer=3).stages(FIELDS["depth"], 36)
    found, _ = module.apply({"params": params}, PICTURES, stages=stages)
    short = {**params, "layers": jax.tree.map(lambda p: p[:3], params["layers"])}
    expected, _ = module.clone(depth=3).apply({"params": short}, PICTURES)
    np.testing.assert_array_equal(found, expected)


def test_features_of_several_layers(vit):
    """Those in front of a cut are as without it; behind an exit, those of the last that runs."""
    module, params = vit
    module = module.clone(feature_layers=(0, 2, -1), final_norm=False)
    plain = np.split(module.apply({"params": params}, PICTURES)[0], 3, axis=-1)
    stages = build("encoder_exit", layer=3).stages(FIELDS["depth"], 36)
    ends = np.split(module.apply({"params": params}, PICTURES, stages=stages)[0], 3, axis=-1)
    for found, expected in zip(ends, (plain[0], plain[1], plain[1]), strict=True):
        np.testing.assert_array_equal(found, expected)
    stages = build("ipcv", layer=2, stabilised=1).stages(FIELDS["depth"], 36, patches=GRID)
    cut = np.split(module.apply({"params": params}, PICTURES, stages=stages)[0], 3, axis=-1)
    np.testing.assert_allclose(cut[0], plain[0], atol=1e-5)
    # In the layer behind the cut, keys and values are those of all: who stays sees no difference.
    same = np.isclose(cut[1], plain[1], atol=1e-5).all(axis=-1).sum(axis=1)
    assert same.tolist() == [13, 13]  # ceil(.35 * 36)


def model_of(projector, method, **encoder):
    fields = dict(image_size=24, patch_size=4, width=16, depth=4, num_heads=2, mlp_dim=16)
    return VisionLanguageModel(
        vocab_size=20,
        encoder={**fields, **encoder},
        decoder=dict(width=16, num_heads=2, segments=[dict(layers=1)], mlp_dim=16),
        projector=projector,
        connector=dict(identity=True),
        compressor=method,
    )


@pytest.mark.parametrize("name", ["ipcv", "encoder_exit"])
def test_a_row_is_as_alone(name):
    """A small picture padded beside a larger one, in windows, with rotary positions."""
    options = dict(keep=0.4, layer=1, stabilised=2, nearest=3) if name == "ipcv" else {}
    where = dict(position="none", rope_theta=100.0, window=4, full_layers=(2,))
    model = model_of(dict(name="patch_merger", side=2), dict(name=name, **options), **where)
    params = nn.unbox(init_params(model, jax.random.key(0)))
    valid = np.array([[[4, 6]], [[6, 6]]], np.int32)
    both = Pictures(PICTURES[:, None], np.ones((2, 1), bool), valid)
    small = Pictures(PICTURES[:1, None, :16], np.ones((1, 1), bool), valid[:1])

    def encode(pictures):
        return model.apply({"params": params}, pictures, method="encode")[0]

    beside, alone = encode(both), encode(small)
    assert np.asarray(beside.mask).sum(axis=1).tolist() == [6, 9]  # All units.
    np.testing.assert_allclose(beside.embed[0, :6], alone.embed[0], atol=1e-5)
    assert float(np.abs(beside.embed[1, :6] - alone.embed[0]).max()) > 1e-2


def test_all_patches_are_no_cut_and_gradients_reach_all(vit):
    module, params = vit
    stages = build("ipcv", budget=36, keep=None).stages(4, 36, patches=GRID)
    assert stages == ()
    stages = build("ipcv", layer=2, nearest=3).stages(4, 36, patches=GRID)

    def loss(params):
        return (module.apply({"params": params}, PICTURES, stages=stages)[0] ** 2).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ipcv", dict(layer=4), ("compressor.layer", "4 layers", "1 to 3")),
        ("ipcv", dict(layer=0), ("compressor.layer",)),
        ("ipcv", dict(keep=1.2), ("compressor.keep", "1.2")),
        ("ipcv", dict(keep="half"), ("compressor.keep", "half")),
        ("ipcv", dict(budget=3, keep=0.5), ("one of the two",)),
        ("ipcv", dict(budget=40, keep=None), ("1 to 36",)),
        ("ipcv", dict(nearest=0), ("compressor.nearest",)),
        ("encoder_exit", dict(layer=4), ("4 layers", "1 to 3")),
        ("encoder_exit", dict(layer=0), ("compressor.layer",)),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(UserError) as caught:
        build(name, **options).stages(4, 36, patches=GRID)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert all(word in message for word in words), message
