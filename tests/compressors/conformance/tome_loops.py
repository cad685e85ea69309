"""A plain float64 loop for one step of token merging (arXiv 2210.09461, section 3)."""

import math

import numpy as np

STEP = 2.0**-16  # the documented rounding of cosines


def cosine(x, y):
    lengths = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def pairs_to_merge(keys, real, merges, class_token, noise):
    """[(token of A, its partner in B)] of one image.

    Args:
      keys: [N, H, Dh].
      real: indices of the real tokens.
      merges: how many pairs.
      class_token: whether CLS, at place 0, begins the alternation.
      noise: of this amplitude is added to the cosines, by a generator or 0.
    """
    metric = {
        i: [sum(k[c] for k in keys[i]) / len(keys[i]) for c in range(len(keys[i][0]))] for i in real
    }
    set_a, set_b = [], []
    for place, token in enumerate(real, start=int(class_token)):
        (set_b if place % 2 else set_a).append(token)
    edges = []
    for a in set_a:
        best, partner = -math.inf, None
        for b in set_b:
            similarity = cosine(metric[a], metric[b])
            if noise is not None:
                similarity += noise.uniform(-3e-7, 3e-7)
            similarity = round(similarity / STEP)
            if similarity > best:
                best, partner = similarity, b
        if partner is not None:
            edges.append((a, partner, best))
    edges.sort(key=lambda edge: -edge[2])  # stable: the lowest index first
    return [(a, b) for a, b, _ in edges[:merges]]


def merge(embed, position, size, real, pairs, budget):
    """Fields of the row behind the merges, and for each token the slot that holds it."""
    target = dict(pairs)
    slots = [i for i in real if i not in target]
    members = [[i] + [a for a, b in pairs if b == i] for i in slots]
    width = embed.shape[1]
    row = {
        "embed": np.zeros((budget, width)),
        "position": np.zeros((budget, 2)),
        "size": np.zeros(budget),
        "mask": np.zeros(budget, bool),
    }
    holder = np.full(len(embed), -1)
    for slot, group in enumerate(members):
        total = sum(size[i] for i in group)
        row["mask"][slot], row["size"][slot] = True, total
        for i in group:
            row["embed"][slot] += np.float64(embed[i]) * size[i] / total
            row["position"][slot] += np.float64(position[i]) * size[i] / total
            holder[i] = slot
    return row, holder
