"""Random decoder states, and the full attention map in float64 loops, for tests."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.compressors.signals import DecoderState
from efficient_vlm.compressors.tokens import VisualTokens

HEADS, KV_HEADS, DEPTH, WIDTH = 4, 2, 4, 8


def random_case(
    seed,
    *,
    grid=(3, 4),
    text=5,
    visual=None,
    bidirectional=False,
    ties=False,
    poison=True,
    dtype=np.float32,
):
    """(VisualTokens, DecoderState) of NumPy arrays; the batch has a row per number in `visual`.

    Args:
      seed: of the draw.
      grid: patches; T = h*w tokens.
      text: L, text places.
      visual: real tokens of each row, in random places; None for all, most, one and none of T.
      bidirectional: see DecoderState.
      ties: all numbers are drawn from {0, 1}, and tokens are often equal.
      poison: NaN in every array wherever there is no token.
      dtype: of the arrays of the model.
    """
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    visual = (tokens, (3 * tokens + 3) // 4, 1, 0) if visual is None else visual
    batch, places = len(visual), tokens + text

    def draw(*shape):
        if ties:
            # Few distinct tokens: equal ones have equal queries, keys and states.
            kinds = rng.integers(0, 2, (3, *shape[2:])).astype(np.float32)
            return kinds[rng.integers(0, 3, shape[:2])]
        return rng.normal(size=shape).astype(np.float32)

    mask = np.zeros((batch, tokens), bool)
    prompt = np.zeros((batch, text), bool)
    live_text = np.zeros((batch, text), bool)
    for b, real in enumerate(visual):
        mask[b, rng.permutation(tokens)[:real]] = True
        asked = rng.integers(1, text + 1)  # tokens of the prompt, then of the answer, then padding
        prompt[b, :asked] = True
        live_text[b, : rng.integers(asked, text + 1)] = True
    live = np.concatenate([mask, live_text], axis=1)

    def clean(array, where):
        fill = np.nan if poison else 0.0
        hole = ~where.reshape(where.shape + (1,) * (array.ndim - 2))
        return np.where(hole, fill, array).astype(dtype)

    after = clean(draw(batch, places, WIDTH), live)
    first_live = mask.copy()
    state = DecoderState(
        query=clean(draw(batch, places, HEADS, DEPTH), live),
        key=clean(draw(batch, places, KV_HEADS, DEPTH), live),
        plain_query=clean(draw(batch, places, HEADS, DEPTH), live),
        plain_key=clean(draw(batch, places, KV_HEADS, DEPTH), live),
        live=live,
        prompt=prompt,
        last=(tokens + prompt.sum(axis=1) - 1).astype(np.int32),
        bias=np.where(live, 0.0 if ties else 0.3 * draw(batch, places), 0.0).astype(np.float32),
        before=clean(draw(batch, places, WIDTH), live),
        after=after,
        first_visual=clean(draw(batch, tokens, WIDTH), first_live),
        first_text=clean(draw(batch, text, WIDTH), live_text),
        first_live=first_live,
        scale=DEPTH**-0.5,
        bidirectional=bidirectional,
    )
    visual_tokens = VisualTokens.from_grid(
        jnp.asarray(after[:, :tokens]), grid, mask=jnp.asarray(mask)
    )
    return jax.tree.map(np.asarray, visual_tokens), state


def full_map(state, row, *, rotary=True):
    """The whole attention map of one batch row in float64: [H, S, S], by loops."""
    query = np.float64(state.query if rotary else state.plain_query)[row]
    key = np.float64(state.key if rotary else state.plain_key)[row]
    places, heads, _ = query.shape
    count = places - state.prompt.shape[1]
    group = heads // key.shape[1]
    attention = np.zeros((heads, places, places))
    for head in range(heads):
        for i in range(places):
            if not state.live[row, i]:
                continue
            logits = {}
            for j in range(places):
                both_visual = i < count and j < count
                if state.live[row, j] and (j <= i or (state.bidirectional and both_visual)):
                    product = math.fsum(query[i, head] * key[j, head // group])
                    logits[j] = state.scale * product + float(state.bias[row, j])
            highest = max(logits.values())
            total = math.fsum(math.exp(v - highest) for v in logits.values())
            for j, v in logits.items():
                attention[head, i, j] = math.exp(v - highest) / total
    return attention


def check_kept(out, tokens, row, chosen, budget):
    """That `out` holds just the tokens `chosen` of a row, in source order, as they were."""
    chosen = sorted(int(c) for c in chosen)
    source = np.full(tokens.source.shape[1], -1)
    for slot, token in enumerate(chosen):
        source[np.asarray(tokens.source[row]) == token] = slot
    np.testing.assert_array_equal(out.source[row], source, err_msg=f"source, row {row}")
    np.testing.assert_array_equal(out.mask[row], np.arange(budget) < len(chosen))
    for field in ("embed", "position", "size"):
        value, before = getattr(out, field)[row], getattr(tokens, field)[row]
        np.testing.assert_array_equal(value[: len(chosen)], before[chosen], err_msg=field)
        np.testing.assert_array_equal(value[len(chosen) :], 0, err_msg=f"padding of {field}")


def best(scores, mask, k):
    """The k highest real tokens, the lowest index first among equals."""
    real = [t for t in range(len(mask)) if mask[t]]
    return sorted(real, key=lambda t: (-scores[t], t))[:k]
