"""The vision encoder on pictures of several sizes in one batch."""

import jax
import numpy as np
from flax import linen as nn

from efficient_vlm.models.encoder import ViT

PATCH = 4
FIELDS = dict(image_size=24, patch_size=PATCH, width=32, depth=2, num_heads=4, mlp_dim=32)


def test_padding_has_no_part_in_what_compressors_are_told():
    """A picture of 3 x 5 patches beside one of 6 x 6, and alone."""
    vit = ViT(**FIELDS, position="none", rope_theta=100.0)
    rng = np.random.default_rng(0)
    pictures = rng.random((2, 24, 24, 3), np.float32)
    small = pictures[:1, : 3 * PATCH, : 5 * PATCH]
    params = nn.unbox(vit.init(jax.random.key(0), pictures))
    asked = [f"{name}/{layer}" for name in ("mean_query_row", "column_mean") for layer in (0, 1)]
    apply = jax.jit(lambda *x: vit.apply(params, x[0], intermediates=asked, valid=x[1]))
    features, found = apply(pictures, np.array([[3, 5], [6, 6]]))
    alone_features, alone = apply(small, np.array([[3, 5]]))

    def real(x):
        return np.asarray(x)[0].reshape(6, 6, -1)[:3, :5].reshape(15, -1)

    np.testing.assert_allclose(real(features), alone_features[0], atol=1e-5)
    for name in asked:
        np.testing.assert_allclose(real(found[name])[:, 0], alone[name][0], atol=1e-6)
        np.testing.assert_allclose(np.asarray(found[name]).sum(axis=1), 1, atol=1e-5)
