"""The encoder-attention methods as plain float64 loops, from their definitions.

Each takes one image and returns the list of new tokens: dicts with `centre` (index of the token it
stands at, None for the extra token of PruMerge), `embed` and `members` (tokens it holds).
"""

import math

import numpy as np


def real_tokens(mask):
    return [i for i in range(len(mask)) if mask[i]]


def best(scores, among, count):
    """The `count` tokens of highest score, lowest index first among equals."""
    among, chosen = list(among), []
    while among and len(chosen) < count:
        top = among[0]
        for i in among:
            if scores[i] > scores[top]:
                top = i
        chosen.append(top)
        among.remove(top)
    return chosen


def cosine(x, y):
    x, y = np.float64(x), np.float64(y)
    lengths = math.sqrt(x @ x) * math.sqrt(y @ y)
    # Rounded, so that what is equal on paper is equal here.
    return round(float(x @ y) / lengths, 12) if lengths else 0.0


def alone(embed, chosen):
    return [{"centre": i, "embed": np.float64(embed[i]), "members": [i]} for i in sorted(chosen)]


def fastervlm(case, budget):
    return alone(case["embed"], best(case["row"], real_tokens(case["mask"]), budget))


def visionzip(case, budget, contextual, merge="published"):
    embed, sizes = np.float64(case["embed"]), case["size"]
    real = real_tokens(case["mask"])
    dominant = best(case["row"], real, budget - contextual)
    rest = [i for i in real if i not in dominant]
    targets = []
    if contextual and rest:
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
    joined = {t: [] for t in targets}
    metric = np.float64(case["keys"]).mean(axis=1)
    for i in rest:
        if i in targets or not targets:
            continue
        nearest = targets[0]
        for t in targets:
            if cosine(metric[i], metric[t]) > cosine(metric[i], metric[nearest]):
                nearest = t
        joined[nearest].append(i)
    tokens = alone(embed, dominant)
    for t, others in joined.items():
        if merge == "mean":
            group = [t, *others]
            value = sum(sizes[i] * embed[i] for i in group) / sum(sizes[i] for i in group)
        else:
            value = embed[t].copy()
            if others:
                value += sum(embed[i] for i in others) / len(others)
        tokens.append({"centre": t, "embed": value, "members": [t, *others]})
    return sorted(tokens, key=lambda token: token["centre"])


def vispruner(case, budget, important=0.5, round_size=8):
    ranked = best(case["row"], real_tokens(case["mask"]), len(case["mask"]))
    first = int(budget * important)
    kept, listed = ranked[:first], ranked[first:]
    diverse = budget - first
    if diverse == 0:
        listed = []
    while len(listed) > diverse:
        even, odd = listed[0::2], listed[1::2]
        scores = []
        for i in even:
            scores.append(max(cosine(case["embed"][i], case["embed"][j]) for j in odd))
        order = sorted(range(len(even)), key=lambda n: -scores[n])  # stable
        remove = min(round_size, len(listed) - diverse, len(even))
        listed = [even[n] for n in order[remove:]] + odd
    return alone(case["embed"], kept + listed)


def percentile(values, quarter):
    """Linear interpolation between the order statistics."""
    values = sorted(values)
    place = (len(values) - 1) * quarter / 4
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def outliers(row, real):
    values = [float(row[i]) for i in real]
    if not values:
        return []
    first, third = percentile(values, 1), percentile(values, 3)
    found = [i for i in real if row[i] > third + 1.5 * (third - first)]
    return found or best(row, real, 1)


def prumerge_kept(case, count, adaptive):
    real = real_tokens(case["mask"])
    return best(case["row"], outliers(case["row"], real) if adaptive else real, count)


def prumerge_plus_kept(case, count, adaptive, share):
    row, real = case["row"], real_tokens(case["mask"])
    if not adaptive:
        guided = min(count, max(1, math.floor(share * count + 0.5)))
        chosen = best(row, real, guided)
        rest, wanted = [i for i in real if i not in chosen], count - guided
        if len(rest) <= wanted:
            return chosen + rest
        return chosen + [rest[math.floor((j + 0.5) * len(rest) / wanted)] for j in range(wanted)]
    found = outliers(row, real)
    chosen = best(row, found, count)
    if found:
        step = max(1, int(int(len(real) / len(found)) / 3))
        for rank in range(0, len(real) - 1, step):
            if real[rank] not in chosen and len(chosen) < count:
                chosen.append(real[rank])
    return chosen


def prumerge(
    case, budget, plus=False, adaptive=False, extra=False, weights="published", near=32, share=0.25
):
    embed, row, real = np.float64(case["embed"]), np.float64(case["row"]), real_tokens(case["mask"])
    keys = case["keys"].reshape(len(case["mask"]), -1)
    if not adaptive and len(real) <= budget:
        return alone(embed, real)  # Nothing is dropped, so nothing merges.
    extra = extra and budget > 1
    count = budget - extra
    if plus:
        kept = prumerge_plus_kept(case, count, adaptive, share)
    else:
        kept = prumerge_kept(case, count, adaptive)

    def weighted_sum(members):
        total, mass = np.zeros(embed.shape[1]), 0.0
        for j in members:
            total += row[j] * embed[j]
            mass += row[j]
        return total / mass if weights == "normalised" and mass else total

    tokens = alone(embed, kept)
    for token in tokens:
        i = token["centre"]
        similar = {j: cosine(keys[i], keys[j]) for j in real if j != i}
        token["embed"] = token["embed"] + weighted_sum(best(similar, similar, near))
    rest = [i for i in real if i not in kept]
    if extra and rest:
        tokens.append({"centre": None, "embed": weighted_sum(rest), "members": rest})
    return tokens


def hiprune(case, budget, grid, alpha=0.1, border="wrap"):
    real = real_tokens(case["mask"])
    rows, columns = grid
    anchors = best(case["middle"], real, round(budget * alpha / 5))
    buffers = []
    for a in anchors:
        places = []
        if border == "wrap":
            for step in (-1, 1, -columns, columns):
                places.append(min(max(a + step, 0), rows * columns - 1))
        else:
            r, c = divmod(a, columns)
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if 0 <= y < rows and 0 <= x < columns:
                    places.append(y * columns + x)
        for place in places:
            if case["mask"][place] and place not in anchors + buffers:
                buffers.append(place)
    buffers = best(case["middle"], sorted(buffers), budget - len(anchors))
    kept = anchors + buffers
    rest = [i for i in real if i not in kept]
    return alone(case["embed"], kept + best(case["row"], rest, budget - len(kept)))
