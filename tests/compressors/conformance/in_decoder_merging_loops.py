"""SparseVLM, DART and FitPrune for one batch row, as plain float64 loops over the whole map."""

import math

import numpy as np
from decoder_states import best, full_map


def rounded(scores):
    """Scores of equal tokens differ in the last bits; they are ties."""
    return [round(float(s), 9) for s in scores]


def raters(state, row):
    """Words of the prompt with more than the mean relevance, all of it if there are none."""
    asked = [w for w in range(state.prompt.shape[1]) if state.prompt[row, w]]
    relevance, visual = dict.fromkeys(asked, 0.0), 0
    for n in range(state.first_live.shape[1]):
        if state.first_live[row, n]:
            visual += 1
            v = np.float64(state.first_visual[row, n])
            products = {w: math.fsum(v * np.float64(state.first_text[row, w])) for w in asked}
            top = max(products.values())
            total = math.fsum(math.exp(p - top) for p in products.values())
            for w in asked:
                relevance[w] += math.exp(products[w] - top) / total
    mean = math.fsum(relevance.values()) / len(asked)
    return [w for w in asked if relevance[w] > mean * (1 + 1e-5)] or asked


def rotary_bias(state, row, i, j, floor):
    """<rotate_i(1), rotate_j(1)> / Dh from the turns that the heads show, channel pair by pair."""
    width = state.query.shape[-1]
    pairs, total = width // 2, 0.0

    def turn(place, pair):
        number = 0j
        for plain, full in ((state.plain_query, state.query), (state.plain_key, state.key)):
            for head in range(plain.shape[2]):
                a, b = plain[row, place, head], full[row, place, head]
                before = complex(a[pair], a[pair + pairs])
                number += complex(b[pair], b[pair + pairs]) * before.conjugate()
        return number / abs(number) if number else 1 + 0j

    for pair in range(pairs):
        one = complex(1, 1)  # A vector of ones, turned at both places.
        a, b = turn(i, pair) * one, turn(j, pair) * one
        total += a.real * b.real + a.imag * b.imag
    return max(total / width, floor)


def sparse_scores(state, row, count, version, num_heads, floor=0.05):
    attention, words = full_map(state, row), raters(state, row)
    heads = range(attention.shape[0])
    table = np.zeros((attention.shape[0], count))
    for t in range(count):
        for w in words:
            divide = version == "2.0" and state.live[row, t]
            bias = rotary_bias(state, row, count + w, t, floor) if divide else 1.0
            for head in heads:
                table[head, t] += attention[head, count + w, t] / bias / len(words)
    if version == "1.5":
        return rounded(table.mean(axis=0))
    paid = rounded(math.fsum(table[head]) for head in heads)
    chosen = sorted(heads, key=lambda h: (-paid[h], h))[:num_heads]
    return rounded(sum(table[h] for h in chosen) / len(chosen))


def clusters(x, number):
    """Density peaks of the tokens x (float64 [M, D]): {centre: members}."""
    count, width = x.shape
    away = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            away[i, j] = math.sqrt(math.fsum((x[i] - x[j]) ** 2) / width)
    density = []
    for i in range(count):
        nearest = sorted(away[i])[:number]
        density.append(math.exp(-math.fsum(d * d for d in nearest) / len(nearest)))
    density = [round(d, 12) for d in density]
    gap = []
    for i in range(count):
        denser = [
            away[i, j] for j in range(count) if (-density[j], j) < (-density[i], i) and i != j
        ]
        gap.append(min(denser) if denser else away.max())
    peak = rounded(density[i] * gap[i] for i in range(count))
    centres = sorted(sorted(range(count), key=lambda i: (-peak[i], i))[:number])
    groups = {c: [c] for c in centres}
    for i in range(count):
        if i not in groups:
            groups[min(centres, key=lambda c: (round(away[i, c], 9), c))].append(i)
    return groups


def sparsevlm(
    tokens, state, row, *, kept, places, version="1.5", recycle=0.3, num_heads=14, scores=None
):
    """{token where it stands: tokens it is made of}."""
    mask = tokens.mask[row]
    if not mask.any():
        return {}
    scores = scores or sparse_scores(state, row, len(mask), version, num_heads)
    winners = best(scores, mask, kept)
    groups = {t: [t] for t in winners}
    losers = [t for t in best(scores, mask, len(mask)) if t not in groups]
    if places and losers:
        some = min(math.floor(recycle * len(losers) + 1e-9) + 1, len(losers))
        pool = sorted(losers[: max(some, min(places, len(losers)))])
        x = np.float64(np.asarray(tokens.embed, np.float32)[row, pool])
        for centre, members in clusters(x, places).items():
            groups[pool[centre]] = [pool[m] for m in members]
    return groups


def dart(state, mask, row, budget, visual_pivots=4, text_pivots=4):
    """Tokens that are kept."""
    count = len(mask)

    def norm(place):
        return round(math.fsum(np.abs(np.float64(state.key[row, place])).ravel()), 6)

    def cosine(i, j):
        a, b = np.float64(state.after[row, i]), np.float64(state.after[row, j])
        size = math.sqrt(math.fsum(a * a)) * math.sqrt(math.fsum(b * b))
        return round(math.fsum(a * b) / size, 6) if size else 0.0

    seen = [t for t in range(count) if mask[t]]
    words = [count + w for w in range(state.prompt.shape[1]) if state.prompt[row, w]]
    visual = sorted(seen, key=lambda t: (-norm(t), t))[: min(visual_pivots, budget)]
    text = sorted(words, key=lambda t: (-norm(t), t))[:text_pivots]
    kept, pivots = set(visual), [*visual, *text]
    left = min(budget, len(seen)) - len(kept)
    for turn, pivot in enumerate(pivots):
        share = left // len(pivots) + (1 if turn < left % len(pivots) else 0)
        free = [t for t in seen if t not in kept]
        kept.update(sorted(free, key=lambda t: (cosine(pivot, t), t))[:share])
    return kept


def fitprune(state, mask, row):
    """Scores of the visual tokens."""
    attention, count = full_map(state, row), len(mask)
    most = attention.max(axis=0)
    scores = np.zeros(count)
    for t in range(count):
        own = math.fsum(most[i, t] for i in range(count) if mask[i])
        words = [w for w in range(state.prompt.shape[1]) if state.prompt[row, w]]
        scores[t] = own * math.fsum(most[count + w, t] for w in words)
    return rounded(scores)
