"""Plain float64 loops for divprune, cdpruner and scope, from their definitions; and hard batches.

Each loop takes the cosines of one image's tokens, so that a test can also run it on slightly wrong
ones: a case whose answer then changes hangs on rounding and proves nothing.
"""

import math

import numpy as np

TIE = 1e-5  # the documented tolerance


def cosine(x, y):
    lengths = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def cosines(x):
    x = np.float64(x)
    return np.array([[cosine(a, b) for b in x] for a in x]).reshape(len(x), len(x))


def noisy(matrix, seed):
    noise = np.random.default_rng(seed).uniform(-3e-7, 3e-7, matrix.shape)
    return matrix + noise + noise.T


def first_tied(scores, absolute=0.0, relative=0.0):
    """Lowest index among the scores that are as good as the best."""
    best = max(scores.values())
    return min(j for j, s in scores.items() if s >= best - absolute - relative * abs(best))


def divprune(cos, budget):
    """Indices in the order of their choice (arXiv 2503.02175, Algorithm 1)."""
    distance = 1 - cos
    n, chosen = len(cos), []
    while len(chosen) < min(budget, n):
        scores = {}
        for j in range(n):
            if j not in chosen:
                others = chosen or [i for i in range(n) if i != j]
                scores[j] = min([distance[i, j] for i in others], default=3.0)
        chosen.append(first_tied(scores, absolute=TIE))
    return chosen


def min_max(values):
    low, high = min(values, default=0), max(values, default=0)
    return [(v - low) / (high - low) if high - low > 1e-6 else 1.0 for v in values]


def cdpruner(cos, quality, budget):
    """Greedy growth of det L, each determinant computed anew (arXiv 2506.10967, 1709.05135)."""
    n, chosen, basis = len(cos), [], []
    while len(chosen) < min(budget, n):
        scores, left = {}, {}
        for j in range(n):
            if j not in chosen:
                grown = basis + [j]
                volume = np.linalg.det(cos[np.ix_(basis, basis)]) if basis else 1.0
                left[j] = np.linalg.det(cos[np.ix_(grown, grown)]) / volume
                left[j] = 0.0 if left[j] < TIE else left[j]
                scores[j] = quality[j] ** 2 * left[j]
        best = first_tied(scores, TIE**2, TIE)
        chosen.append(best)
        if left[best] > 0:
            basis.append(best)
    return chosen


def scope(cos, saliency, alpha, budget):
    """Coverage gain times saliency to the power alpha (arXiv 2510.24214)."""
    n, chosen = len(cos), []
    while len(chosen) < min(budget, n):
        covered = [max([0.0] + [cos[i, s] for s in chosen]) for i in range(n)]
        scores = {}
        for j in range(n):
            if j not in chosen:
                rises = [cos[i, j] - covered[i] for i in range(n)]
                scores[j] = saliency[j] ** alpha * sum(r for r in rises if r > TIE)
        chosen.append(first_tied(scores, relative=TIE))
    return chosen


def hard_batch(num_tokens, width, seed):
    """(embed [B, N, D], text [B, D], attention [B, N], mask), float32: random and odd rows."""
    rng = np.random.default_rng(seed)

    def normal():
        return rng.normal(size=(num_tokens, width))

    some = [normal() for _ in range(6)]
    equal = np.repeat(normal()[:1], num_tokens, axis=0)
    twins = np.repeat(normal()[: -(-num_tokens // 2)], 2, axis=0)[:num_tokens]
    twins = twins[rng.permutation(num_tokens)]
    three = normal()[:3][rng.integers(0, 3, num_tokens)]
    signs = rng.choice([-1.0, 1.0], size=(num_tokens, width))
    axes = np.eye(width)[rng.integers(0, width, num_tokens)] * rng.uniform(1, 3, (num_tokens, 1))
    zeros = np.where(rng.random((num_tokens, 1)) < 0.3, 0.0, normal())
    embed = np.float32([*some, equal, equal, twins, three, signs, axes, zeros, np.abs(normal())])
    batch = len(embed)
    mask = rng.random((batch, num_tokens)) < rng.choice([0.3, 0.8, 1.1], size=(batch, 1))
    mask[:2], mask[2] = True, False
    mask[3] = np.arange(num_tokens) == num_tokens - 2
    text = np.float32(rng.normal(size=(batch, width)))
    attention = np.float32(rng.dirichlet(np.ones(num_tokens), size=batch))
    attention[4] = 1 / num_tokens
    attention[5, ::2] = 0
    return embed, text, attention, mask
