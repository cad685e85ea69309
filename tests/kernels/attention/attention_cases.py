"""Inputs of attention with every feature, and the oracle: loops in float64."""

import numpy as np

from efficient_vlm.kernels.attention import make_mask

# batch, heads, key heads, queries, keys, head dim, value dim
SMALL = (2, 4, 2, 21, 27, 8, 8)


def _lengths(rng, batch, queries, keys):
    return dict(q_lengths=rng.integers(1, queries + 1, batch), kv_lengths=[keys // 2, 0][:batch])


def _segments(rng, batch, queries, keys):
    def draw(count):  # From -1: padding.
        return np.sort(rng.integers(-1, 3, (batch, count)), axis=1)

    return dict(q_segments=draw(queries), kv_segments=draw(keys))


def _positions(rng, batch, queries, keys):
    """Kept tokens keep their positions; merged ones stand between two."""

    def draw(count):
        return np.sort(rng.choice(4 * count, (batch, count)), axis=1) / 2

    return dict(q_positions=draw(queries), kv_positions=draw(keys))


# name -> (rng, batch, queries, keys) -> arguments of `attention`
FEATURES = {
    "plain": lambda *_: {},
    "causal": lambda *_: dict(causal=True),
    "softcap": lambda *_: dict(softcap=1.5),
    "bias": lambda rng, b, n, m: dict(key_bias=np.log(rng.integers(1, 9, (b, m)))),
    "window": lambda rng, b, n, m: dict(window=5),
    "two-sided window": lambda rng, b, n, m: dict(window=(6, 3)),
    "prefix": lambda rng, b, n, m: dict(causal=True, prefix_length=rng.integers(0, m, b)),
    "segments": _segments,
    "lengths": _lengths,
    "positions": _positions,
    "importance": lambda rng, b, n, m: dict(
        importance_weights=rng.random((b, n)) * (rng.random((b, n)) < 0.5)
    ),
}


def mask_of_models(queries, keys, seed=0):
    """What no argument of `attention` says: shared keys, blocks that see each other, dead keys."""
    rng = np.random.default_rng(seed)

    def runs(count, most):  # Segments and blocks are runs of tokens.
        return np.sort(rng.integers(0, most, (2, count)), axis=1)

    kv_segments = runs(keys, 3)
    kv_segments[:, : keys // 8] = 7
    return make_mask(
        queries,
        keys,
        causal=True,
        window=keys // 8,
        q_segments=runs(queries, 3),
        kv_segments=kv_segments,
        shared_segment=7,
        q_blocks=runs(queries, 5),
        kv_blocks=runs(keys, 5),
        window_spares_blocks=True,
        kv_live=rng.random((2, keys)) < 0.8,
    )


def arrays(shape, seed=0, dtype=np.float32):
    """q, k, v."""
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    rng = np.random.default_rng(seed)
    sizes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim)
    sizes += ((batch, kv_heads, keys, value_dim),)
    return tuple(rng.normal(size=size).astype(dtype) for size in sizes)


def options(features, shape, seed=0, dtype=np.float32):
    """Arguments of `attention` for some of FEATURES together."""
    batch, _, _, queries, keys, _, _ = shape
    rng, found = np.random.default_rng(seed), {}
    for name in features:
        found |= FEATURES[name](rng, batch, queries, keys)
    for name in ("key_bias", "importance_weights"):
        if name in found:
            found[name] = found[name].astype(dtype)
    return found


def sees(b, i, j, shape, *, causal=False, window=None, prefix_length=None, **given) -> bool:
    """Whether query i of row b sees key j, word by word from `make_mask`."""
    _, _, _, queries, keys, _, _ = shape
    at_q = given.get("q_positions", np.tile(np.arange(queries), (b + 1, 1)))[b][i]
    at_k = given.get("kv_positions", np.tile(np.arange(keys), (b + 1, 1)))[b][j]
    prefix = prefix_length or 0 if np.ndim(prefix_length) == 0 else prefix_length[b]
    if "q_lengths" in given and i >= given["q_lengths"][b]:
        return False
    if "kv_lengths" in given and j >= given["kv_lengths"][b]:
        return False
    if "q_segments" in given:
        one, two = given["q_segments"][b][i], given["kv_segments"][b][j]
        if one != two or one < 0 or two < 0:
            return False
    in_prefix = at_q < prefix and at_k < prefix
    if causal and at_k > at_q and not in_prefix:
        return False
    if isinstance(window, int):
        return at_k > at_q - window or at_k < prefix
    if window is not None:
        left, right = window
        if left is not None and at_k < at_q - left and not at_k < prefix:
            return False
        if right is not None and at_k > at_q + right and not in_prefix:
            return False
    return True


def by_hand(q, k, v, *, scale=None, softcap=None, key_bias=None, importance_weights=None, **given):
    """(out, lse, importance) in float64, query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    groups, keys = heads // k.shape[1], k.shape[2]
    shape = (batch, heads, k.shape[1], queries, keys, dim, v.shape[-1])
    scale = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, heads, queries, v.shape[-1])), np.full(q.shape[:3], np.inf)
    importance = np.zeros((batch, keys))
    for b in range(batch):
        seen = np.array(
            [[sees(b, i, j, shape, **given) for j in range(keys)] for i in range(queries)]
        )
        for h, i in np.ndindex(heads, queries):
            if not seen[i].any():
                continue
            s = scale * k[b, h // groups] @ q[b, h, i]
            s = s if softcap is None else softcap * np.tanh(s / softcap)
            s = s if key_bias is None else s + key_bias[b]
            s = np.where(seen[i], s, -np.inf)
            weights = np.exp(s - s.max())
            out[b, h, i] = weights / weights.sum() @ v[b, h // groups]
            lse[b, h, i] = s.max() + np.log(weights.sum())
            if importance_weights is not None:
                importance[b] += importance_weights[b, i] * weights / weights.sum() / heads
    return out, lse, None if importance_weights is None else importance
