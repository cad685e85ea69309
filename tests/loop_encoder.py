"""A vision encoder in float64 NumPy, layer by layer, for one picture."""

import numpy as np

PATCH, HEADS = 4, 2
# Of `models.encoder.ViT`.
FIELDS = dict(
    image_size=24,
    patch_size=PATCH,
    width=16,
    depth=4,
    num_heads=HEADS,
    mlp_dim=24,
    norm="layernorm",
    bias=True,
)
GRID = (6, 6)


def embedded(picture, params):
    """uint8 [24, 24, 3] -> the states of 36 patches in raster order, [36, D]."""
    x = (picture / 255 - 0.5) / 0.5
    x = x.reshape(6, PATCH, 6, PATCH, 3).swapaxes(1, 2).reshape(36, -1) @ params["embed"]["kernel"]
    place = params["row_position"][:, None] + params["column_position"][None]
    return x + place.reshape(36, -1)


def norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layer(x, params, context=None):
    """[N, D] -> the new states, attention that each patch receives, and that of the mean query.

    Args:
      context: [M, D], states that give keys and values; None for x.
    """
    heads = params["attention"]
    q, k, v = (
        np.einsum("nd,dhc->hnc", norm(y, params["attention_norm"]), heads[name]["kernel"])
        + heads[name]["bias"][:, None]
        for name, y in zip(
            ("query", "key", "value"), (x, *[x if context is None else context] * 2), strict=True
        )
    )
    maps = softmax(np.einsum("hnc,hmc->hnm", q, k) / np.sqrt(q.shape[-1]))
    y = np.einsum("hnm,hmc->nhc", maps, v)
    x = x + np.einsum("nhc,hcd->nd", y, heads["out"]["kernel"]) + heads["out"]["bias"]
    y = norm(x, params["mlp_norm"]) @ params["up"]["kernel"] + params["up"]["bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    queries = q.mean(axis=1)
    mean_row = softmax(np.einsum("hc,hmc->hm", queries, k) / np.sqrt(q.shape[-1])).mean(axis=0)
    x = x + y @ params["down"]["kernel"] + params["down"]["bias"]
    return x, maps.mean(axis=(0, 1)), mean_row
