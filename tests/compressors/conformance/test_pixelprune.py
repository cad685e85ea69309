"""pixelprune beside a loop over blocks, and in an encoder."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from efficient_vlm.compressors import Signals, VisualTokens, build
from efficient_vlm.errors import UserError
from efficient_vlm.models.init import init_params
from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.gather import fitted


def kept_by_loop(x, tau):
    """Which blocks of x [rows, columns, pixels] stay (arXiv 2604.00886)."""
    known, stays = np.float64(x), np.zeros(x.shape[:2], bool)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            left, above, corner = (
                known[row, column - 1],
                known[row - 1, column],
                known[row - 1, column - 1],
            )
            like_left = np.abs(corner - left).max() <= tau
            like_above = np.abs(corner - above).max() <= tau
            guess = above if like_left and not like_above else left
            if row == 0 or column == 0:
                guess = left if row == 0 else above
            first = row == column == 0
            stays[row, column] = first or np.abs(known[row, column] - guess).max() > tau
            if not stays[row, column]:
                known[row, column] = guess
    return stays


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("tau", [0.0, 0.25])
def test_agrees_with_the_loop(side, tau):
    rows, columns = 3 * side, 5 * side
    step = build("pixelprune", tau=tau).stages(
        2, rows * columns, patches=(rows, columns), side=side
    )
    (stage,) = step
    assert (stage.layer, stage.inside, stage.module.budget) == (0, False, rows * columns)
    rng, seen = np.random.default_rng(side), 0
    cut = jax.jit(lambda pixels, tokens: stage.module.apply({}, tokens, Signals(pixels=pixels)))
    for _ in range(10):
        blocks = rng.integers(0, 3, (4, 3, 5, 2)) * (1.0 if tau == 0 else 0.2)
        pixels = np.kron(blocks, np.ones((1, side, side, 1))).reshape(4, rows * columns, 2)
        tokens = VisualTokens.from_grid(
            np.ones((4, rows * columns, 3), np.float32), (rows, columns)
        )
        found = cut(pixels.astype(np.float32), tokens)
        for row in range(4):
            stays = np.kron(kept_by_loop(blocks[row], tau), np.ones((side, side))).reshape(-1)
            np.testing.assert_array_equal(np.asarray(found.source[row]) >= 0, stays > 0)
            seen += 0 < stays.sum() < stays.size
    assert seen > 20


# --- in an encoder --------------------------------------------------------------------------------


def model_of(**options):
    return VisionLanguageModel(
        vocab_size=20,
        encoder=dict(image_size=24, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=16),
        decoder=dict(width=16, num_heads=2, segments=[dict(layers=1)], mlp_dim=16),
        projector=dict(name="patch_merger", side=2),
        connector=dict(identity=True),
        compressor=dict(name="pixelprune", **options),
    )


def half_blank():
    """One picture of 9 blocks whose lower two rows are white, and one of noise but for a pair."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1, 24, 24, 3)).astype(np.uint8)
    pixels[0, 0, 8:] = 255
    pixels[1, 0, :8, 8:16] = pixels[1, 0, :8, :8]
    return Pictures(pixels, np.ones((2, 1), bool))


def test_room_is_that_of_the_pictures():
    """4 and 8 of 9 blocks stay: the white ones are one block and its repetitions."""
    pictures = half_blank()
    first = jax.tree.map(lambda x: x[:1], pictures)
    model = model_of()
    assert fitted(model, first).compressor["budget"] == 4  # ceil(7 / 16 * 9)
    assert fitted(model, pictures).compressor["budget"] == 8  # ceil(14 / 16 * 9)
    assert fitted(model_of(rooms=(0.5,)), pictures).compressor["budget"] == 9
    assert fitted(model_of(rooms=(0.5,)), first).compressor["budget"] == 5
    with pytest.raises(UserError) as caught:
        fitted(model_of(budget=4), pictures)
    message = str(caught.value)
    assert "room for 4 units, but a picture keeps 8" in message
    assert len(message.splitlines()) == 3
    assert fitted(model_of(budget=8), pictures).compressor["budget"] == 8  # The advice.


def test_what_stays_is_the_same_in_any_room():
    pictures = half_blank()
    model = model_of()
    params = nn.unbox(init_params(model, jax.random.key(0)))

    def encode(model, pictures):
        return model.apply({"params": params}, pictures, method="encode")[0]

    wide = encode(model, pictures)  # Nobody has counted: room for all.
    assert np.asarray(wide.mask).sum(axis=1).tolist() == [4, 8]
    assert np.asarray(wide.source)[0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1]
    assert np.asarray(wide.source)[1].tolist() == [0, -1, 1, 2, 3, 4, 5, 6, 7]
    first = jax.tree.map(lambda x: x[:1], pictures)
    narrow = encode(fitted(model_of(rooms=(0.5,)), first), first)
    assert narrow.embed.shape[1] == 5
    np.testing.assert_allclose(narrow.embed[0, :4], wide.embed[0, :4], atol=1e-5)
    np.testing.assert_array_equal(narrow.source[0], wide.source[0])


def test_without_repetitions_nothing_changes():
    pixels = np.random.default_rng(1).integers(0, 255, (1, 1, 24, 24, 3)).astype(np.uint8)
    pictures = Pictures(pixels, np.ones((1, 1), bool))
    model = model_of()
    params = nn.unbox(init_params(model, jax.random.key(0)))
    text = ModelInputs.of_rows(np.arange(2, 6)[None], [4], pictures=pictures)
    logits, plain = (
        one.apply({"params": params}, text).logits
        for one in (model, model.with_compressor("none", 9))
    )
    np.testing.assert_allclose(logits, plain, atol=1e-5)
