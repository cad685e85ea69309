"""Sampling against float64 loops from the definitions, exact probabilities, its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efficient_vlm.errors import UserError
from efficient_vlm.inference import sampling as module
from efficient_vlm.inference.sampling import History, Sampling, SamplingOptions, draw, history

ROWS, VOCAB = 96, 9
INF = np.inf
draws = jax.jit(draw)


def f32(*values):
    return np.asarray(values, np.float32)


def softmax(row):
    weights = [0.0 if x == -INF else np.exp(float(x) - float(max(row))) for x in row]
    return [w / sum(weights) for w in weights]


def by_likelihood(row):
    """Ids of float64 logits, the most likely first, of equal ones the lowest first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def kept_of_top_k(row, k):
    return set(by_likelihood(row)[:k] if k else range(len(row)))


def kept_of_top_p(row, p):
    """(ids, how close p is to a sum): what float32 decides where it is close is not tested."""
    if p == 1:
        return set(range(len(row))), 1.0
    chances, kept, total, close = softmax(row), set(), 0.0, 1.0
    for i in by_likelihood(row):
        if total >= p:
            break
        kept.add(i)
        total += chances[i]
        close = min(close, abs(total - p))
    return kept, close


def kept_of_min_p(row, p):
    chances = softmax(row)
    return {i for i in range(len(row)) if chances[i] >= p * max(chances)}


def only(row, kept):
    return [x if i in kept else -INF for i, x in enumerate(row)]


@pytest.fixture(scope="module")
def rows():
    """Logits [ROWS, VOCAB]: random, with ties, all equal, peaked, and with -inf among them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (ROWS, VOCAB))
    logits[20:50] = rng.integers(-1, 2, (30, VOCAB))
    logits[50:55] = 0.5
    logits[55:65, 4] = 40
    gone = rng.random((ROWS, VOCAB)) < 0.4
    gone[:, 3] = False
    logits[40:] = np.where(gone[40:], -INF, logits[40:])
    return logits.astype(np.float32)


def settings(rng, of, *values):
    """One number for each row: fixed ones in every fourth, else at random."""
    return [rng.choice(values) if row % 4 == 0 else of() for row in range(ROWS)]


def test_top_k_against_loops(rows):
    rng = np.random.default_rng(1)
    ks = settings(rng, lambda: rng.integers(1, VOCAB + 1), 0, 1, VOCAB, VOCAB + 5)
    out = jax.jit(module.keep_top_k)(rows, np.asarray(ks, np.int32))
    for row, k, found in zip(rows, ks, out):
        np.testing.assert_array_equal(found, only(row, kept_of_top_k(row, k)))


def test_top_p_against_loops(rows):
    rng = np.random.default_rng(2)
    ps = np.asarray(settings(rng, lambda: rng.uniform(0, 1), 1.0, 1e-30, 1 - 2**-24), np.float32)
    out = jax.jit(module.keep_top_p)(rows, ps)
    compared = 0
    for row, p, found in zip(rows, ps, out):
        kept, close = kept_of_top_p(row.astype(np.float64), float(p))
        assert np.isfinite(found).any()
        if close > 1e-5:
            compared += 1
            np.testing.assert_array_equal(found, only(row, kept))
    assert compared > 0.7 * ROWS


def test_top_p_that_a_sum_reaches_exactly():
    row = np.log2([8, 4, 2, 1, 1]).astype(np.float32) * np.float32(np.log(2))
    for p, count in ((0.5, 1), (0.75, 2), (0.76, 3), (0.25, 1)):
        out = module.keep_top_p(row[None], f32(p))
        assert np.isfinite(out).sum() == count


def test_min_p_against_loops(rows):
    rng = np.random.default_rng(3)
    ps = np.asarray(settings(rng, lambda: rng.uniform(0, 1), 0.0, 1.0), np.float32)
    out = jax.jit(module.keep_min_p)(rows, ps)
    for row, p, found in zip(rows, ps, out):
        np.testing.assert_array_equal(found, only(row, kept_of_min_p(row, float(p))))


def test_top_p_is_of_what_top_k_leaves(rows):
    rng = np.random.default_rng(4)
    ks = settings(rng, lambda: rng.integers(1, VOCAB + 1), 0, 1, VOCAB)
    ps = np.asarray(settings(rng, lambda: rng.uniform(0.1, 1), 1.0), np.float32)
    both = jax.jit(module.keep_most_likely)
    out, compared = both(rows, np.asarray(ks, np.int32), ps), 0
    for row, k, p, found in zip(rows.astype(np.float64), ks, ps, out):
        first = only(row, kept_of_top_k(row, k))
        kept, close = kept_of_top_p(first, float(p))
        if close > 1e-5:
            compared += 1
            np.testing.assert_array_equal(found, only(first, kept))
    assert compared > 0.7 * ROWS
    program = str(jax.make_jaxpr(both)(rows, np.asarray(ks, np.int32), ps))
    assert program.count(" sort[") == 1


def test_temperature_divides(rows):
    temperatures = f32(*np.geomspace(0.05, 50, ROWS))
    out = jax.nn.softmax(jax.jit(module.tempered)(rows, temperatures), axis=-1)
    for row, t, found in zip(rows.astype(np.float64), temperatures, out):
        np.testing.assert_allclose(found, softmax(row / float(t)), rtol=2e-5, atol=1e-30)


def test_temperature_keeps_differences_of_large_logits():
    out = module.tempered(f32([50.0, 50.0001]), f32(1e-4))
    apart = (np.float64(np.float32(50.0001)) - 50.0) / 1e-4
    np.testing.assert_allclose(out[0, 1] - out[0, 0], apart, rtol=1e-5)
    assert np.isfinite(module.tempered(f32([3e38, -3e38, 1.0]), f32(1e-5))[0, 0])


def test_penalties_against_their_formulas(rows):
    rng = np.random.default_rng(5)
    prompts = rng.integers(-1, VOCAB, (ROWS, 3)).astype(np.int32)
    answers = rng.integers(0, VOCAB, (4, ROWS)).astype(np.int32)
    live = rng.random((4, ROWS)) < 0.7
    add = jax.jit(History.add)
    counts = history(prompts, VOCAB)
    for tokens, alive in zip(answers, live):
        counts = add(counts, tokens, alive)
    repetition, frequency, presence = (f32(*rng.uniform(0.5, 2, ROWS)) for _ in range(3))
    out = jax.jit(module.penalised)(rows, counts, repetition, frequency, presence)
    for b in range(ROWS):
        said = [t for t, alive in zip(answers[:, b], live[:, b]) if alive]
        for token in range(VOCAB):
            x = float(rows[b, token])
            if token in said or token in prompts[b]:
                x = x / float(repetition[b]) if x > 0 else x * float(repetition[b])
            x -= float(frequency[b]) * said.count(token)
            x -= float(presence[b]) * (token in said)
            np.testing.assert_allclose(out[b, token], x, rtol=1e-5, atol=1e-6)


def test_a_history_has_no_place_for_ids_outside_the_vocabulary():
    counts = history(np.asarray([[2, -1, 99], [0, -7, 0]]), 3)
    np.testing.assert_array_equal(counts.prompt, [[0, 0, 1], [1, 0, 0]])
    counts = counts.add(np.asarray([-1, 1]), np.asarray([True, True]))
    counts = counts.add(np.asarray([3, 1]), np.asarray([True, True]))
    np.testing.assert_array_equal(counts.generated, [[0, 0, 0], [0, 2, 0]])


def test_bias_is_added_where_it_belongs():
    ids, values = np.asarray([[2, -1], [0, 1]]), f32([5, 7], [-INF, 1.5])
    out = module.biased(jnp.zeros((2, 3)), ids, values)
    np.testing.assert_array_equal(out, [[0, 0, 5], [-INF, 1.5, 0]])
    options = [SamplingOptions(logit_bias={2: 1}), SamplingOptions(logit_bias={0: -INF, 1: -1})]
    found = draw(np.zeros((2, 3), np.float32), Sampling.of(options, 3))  # NumPy, and no jit.
    np.testing.assert_array_equal(found, [2, 2])


def test_without_settings_it_is_argmax(rows):
    np.testing.assert_array_equal(draws(rows, Sampling()), rows.argmax(axis=-1))
    program = str(jax.make_jaxpr(draw)(rows, Sampling()))
    assert "argmax" in program
    for word in ("sort", "random", "threefry", "exp", "cumsum", "scatter", "callback"):
        assert word not in program


def test_a_row_of_temperature_0_is_greedy_in_any_batch(rows):
    options = [SamplingOptions(temperature=t, top_k=3, seed=1) for t in (0, 5.0) * (ROWS // 2)]
    sampling = Sampling.of(options, VOCAB)
    out = np.stack([draws(rows, sampling, None, np.full(ROWS, step)) for step in range(8)])
    assert (out[:, ::2] == rows.argmax(axis=-1)[::2]).all()
    assert (out[:, 1::2] != rows.argmax(axis=-1)[1::2]).any()


CHANCES = np.array([0.5, 0.25, 0.12, 0.06, 0.03, 0.02, 0.0195, 0.0005])


@pytest.mark.parametrize(
    ("temperature", "k", "p", "m"),
    [(1.0, 0, 1.0, 0.0), (2.0, 6, 0.9, 0.2), (0.5, 0, 0.97, 0.0)],
    ids=["plain", "filtered", "cold"],
)
def test_draws_have_the_exact_probabilities(temperature, k, p, m):
    draws_count = 100_000
    order = np.random.default_rng(6).permutation(8)
    row = np.log(CHANCES)[order]
    hot = list(row / temperature)
    hot = only(hot, kept_of_top_k(hot, k))
    hot = only(hot, kept_of_top_p(hot, p)[0])
    hot = only(hot, kept_of_min_p(hot, m))
    expected = np.asarray(softmax(hot)) * draws_count
    # Half of them are steps of one seed, half are first steps of one seed each.
    first = np.arange(draws_count) < draws_count // 2
    seed = np.where(first, 17, np.arange(draws_count)).astype(np.uint32)
    step = np.where(first, np.arange(draws_count), 0).astype(np.int32)
    sampling = Sampling(
        temperature=np.full(draws_count, temperature, np.float32),
        top_k=np.full(draws_count, k, np.int32),
        top_p=np.full(draws_count, p, np.float32),
        min_p=np.full(draws_count, m, np.float32),
        seed=seed,
    )
    logits = np.broadcast_to(row.astype(np.float32), (draws_count, 8))
    tokens = np.asarray(draws(logits, sampling, None, step))
    possible = expected > 0
    for part in (tokens, tokens[first], tokens[~first]):
        counts = np.bincount(part, minlength=8)
        assert counts[~possible].sum() == 0
        share = expected[possible] * len(part) / draws_count
        assert stats.chisquare(counts[possible], share).pvalue > 1e-4
    # One draw tells nothing of the next: pairs are as likely as their parts together.
    pairs = stats.contingency.crosstab(tokens[first][:-1], tokens[first][1:]).count
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_a_row_is_drawn_alone_as_in_any_batch():
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 1, (5, 40)).astype(np.float32)
    options = [
        SamplingOptions(
            temperature=0.8 + row / 5,
            top_k=30 - row,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            presence_penalty=0.1,
            logit_bias={row: 1.0},
            seed=100 + row,
        )
        for row in range(5)
    ]
    prompts = rng.integers(0, 40, (5, 4)).astype(np.int32)

    @jax.jit
    def answers(logits, sampling, prompts, start):
        """Twelve tokens [12, B] of each row, whose first is its step `start` [B]."""

        def token(carry, _):
            counts, step = carry
            chosen = draw(logits, sampling, counts, step)
            return (counts.add(chosen, step >= 0), step + 1), chosen

        return jax.lax.scan(token, (history(prompts, 40), start), length=12)[1]

    start = np.asarray([0, 3, 0, 9, 1], np.int32)
    ask = functools.partial(Sampling.of, vocab_size=40)
    together = np.asarray(answers(logits, ask(options), prompts, start))
    turned = np.roll(np.arange(5), 2)
    again = answers(
        logits[turned], ask([options[i] for i in turned]), prompts[turned], start[turned]
    )
    np.testing.assert_array_equal(again, together[:, turned])
    for i in range(5):
        alone = answers(logits[[i]], ask([options[i]]), prompts[[i]], start[[i]])
        np.testing.assert_array_equal(alone[:, 0], together[:, i])
    assert len({tuple(column) for column in together.T}) == 5


def test_other_seeds_and_other_steps_draw_anew():
    logits = np.zeros((3, 1000), np.float32)
    sampling = Sampling(temperature=f32(1, 1, 1), seed=np.asarray([1, 1, 2**32 - 1], np.uint32))
    out = np.asarray(draws(logits, sampling, None, np.asarray([0, 1, 0])))
    assert len(set(out)) == 3
    np.testing.assert_array_equal(out, draws(logits, sampling, None, np.asarray([0, 1, 0])))


def test_other_settings_share_a_program(rows):
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(args)
        return draw(*args)

    for temperature, k, bias in ((0.5, 4, {1: 1.0}), (1.5, 7, {2: -3.0})):
        asked = SamplingOptions(temperature=temperature, top_k=k, logit_bias=bias)
        greedy = SamplingOptions(top_p=0.5)
        sampling = Sampling.of([asked] + [greedy] * (ROWS - 1), VOCAB)
        assert sampling.top_p is None  # Only a greedy row has it.
        counted(rows, sampling, None, np.zeros(ROWS, np.int32))
    assert len(traces) == 1


def test_nan_and_infinities():
    nan = np.nan
    logits = f32(
        [nan, 1, 2, nan],
        [-INF, -INF, nan, -5],
        [1, INF, 0, nan],
        [nan, nan, nan, nan],
        [-INF, -INF, -INF, -INF],
        [nan, 3, -INF, nan],
    )
    greedy = [2, 3, 1, 0, 0, 1]
    np.testing.assert_array_equal(draws(logits, Sampling()), greedy)
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.int32)
    sampling = Sampling(
        temperature=ones,
        top_k=zeros + 3,
        top_p=ones * np.float32(0.999),
        min_p=ones * np.float32(1e-6),
        seed=np.arange(6).astype(np.uint32),
    )
    out = np.stack([draws(logits, sampling, None, zeros + step) for step in range(40)])
    assert set(out[:, 0]) == {1, 2}
    assert (out[:, 1:] == greedy[1:]).all()


def test_bfloat16_and_a_vocabulary_of_one(rows):
    half = jnp.asarray(rows, jnp.bfloat16)
    options = [SamplingOptions(temperature=0.9, top_p=0.9, seed=row) for row in range(ROWS)]
    sampling, step = Sampling.of(options, VOCAB), np.arange(ROWS, dtype=np.int32)
    whole = draws(half.astype(jnp.float32), sampling, None, step)
    np.testing.assert_array_equal(draws(half, sampling, None, step), whole)
    assert whole.dtype == jnp.int32
    one = Sampling.of([SamplingOptions(temperature=2.0, top_k=4, top_p=0.1, min_p=1.0)], 1)
    assert draw(f32([-3.0]), one, None, np.zeros(1, np.int32)).tolist() == [0]
    assert [x.tolist() for x in module.log_probabilities(f32([7.0]), np.zeros(1, int), 5)] == [
        [0.0],
        [[0]],
        [[0.0]],
    ]


def test_log_probabilities_are_those_of_raw_logits(rows):
    tokens = np.arange(ROWS) % VOCAB
    chosen, ids, values = module.log_probabilities(rows, tokens, 3)
    assert chosen.dtype == values.dtype == jnp.float32 and ids.dtype == jnp.int32
    for b, row in enumerate(rows.astype(np.float64)):
        with np.errstate(divide="ignore"):
            exact = np.log(softmax(row))
        order = by_likelihood(row)[:3]
        np.testing.assert_allclose(chosen[b], exact[tokens[b]], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(ids[b], order)
        np.testing.assert_allclose(values[b], exact[order], rtol=1e-5, atol=1e-6)
    assert module.log_probabilities(rows, tokens, 0)[1].shape == (ROWS, 0)


def test_what_a_batch_asks_for_becomes_arrays():
    bias = {4: 1.0, 2: -INF, 7: 3.0}
    options = [
        SamplingOptions(),
        SamplingOptions(temperature=0.5, top_k=50, seed=2**32 - 1, logit_bias=bias),
        SamplingOptions(temperature=1, presence_penalty=-1, top_p=None, top_k=None),
    ]
    sampling = Sampling.of(options, 9)
    for unused in ("top_p", "min_p", "repetition_penalty", "frequency_penalty"):
        assert getattr(sampling, unused) is None
    assert sampling.needs_history and not Sampling.of(options[:2], 9).needs_history
    np.testing.assert_array_equal(sampling.temperature, f32(0, 0.5, 1))
    np.testing.assert_array_equal(sampling.top_k, [0, 9, 0])
    np.testing.assert_array_equal(sampling.presence_penalty, f32(0, 0, -1))
    np.testing.assert_array_equal(sampling.bias_ids, [[-1] * 4, [4, 2, 7, -1], [-1] * 4])
    np.testing.assert_array_equal(sampling.bias_values[1], f32(1, -INF, 3, 0))
    assert sampling.seed.dtype == np.uint32 and sampling.seed[1] == 2**32 - 1
    assert Sampling.of(options[2:], 9).seed != Sampling.of(options[2:], 9).seed
    assert Sampling.of([SamplingOptions(min_p=0.1)] * 2, 9) == Sampling()
    assert Sampling.of([], 9) == Sampling()


def test_options_of_a_request():
    options = SamplingOptions(stop="end", stop_token_ids=[np.int64(3)], seed=np.uint32(5))
    assert (options.stop, options.stop_token_ids, options.seed) == (("end",), (3,), 5)
    same = SamplingOptions(stop=["end"], stop_token_ids=(3,), seed=5, temperature=None)
    assert options == same and hash(options) == hash(same)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "0.7"),
        ("temperature", float("nan")),
        ("temperature", INF),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1e-9),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -INF),
        ("seed", -1),
        ("seed", 2**32),
        ("logprobs", 21),
        ("logit_bias", [1, 2]),
        ("logit_bias", {"7": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: INF}),
        ("logit_bias", {1: "much\nmore"}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop", ""),
        ("stop_token_ids", 7),
    ],
)
def test_wrong_values(field, value):
    with pytest.raises(UserError) as caught:
        SamplingOptions(**{field: value})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{field}: ")
    assert "allowed" in lines[1] and "fix" in lines[2]


@pytest.mark.parametrize(("field", "value"), [("logit_bias", {9: 1}), ("stop_token_ids", [9])])
def test_ids_outside_the_vocabulary(field, value):
    options = SamplingOptions(**{field: value})
    Sampling.of([options], 10)
    with pytest.raises(UserError, match=f"{field}: 9\n.*below 9") as caught:
        Sampling.of([options], 9)
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_missing_is_named(rows):
    ones = np.ones(ROWS, np.float32)
    with pytest.raises(ValueError, match="counts"):
        draw(rows, Sampling(presence_penalty=ones))
    with pytest.raises(ValueError, match="seed, step"):
        draw(rows, Sampling(temperature=ones), None, np.zeros(ROWS, int))
