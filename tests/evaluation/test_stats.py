"""Intervals: closed forms, SciPy, and coverage by simulation."""

import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import stats


def correlated(rng, p, rho, images=250, per_image=8):
    """Beta-binomial answers: P(right) = p, correlation rho between answers of one image."""
    scale = (1 - rho) / rho
    ability = rng.beta(p * scale, (1 - p) * scale, images)
    correct = rng.random((images, per_image)) < ability[:, None]
    return correct.reshape(-1), np.repeat(np.arange(images), per_image)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("rho", [0.05, 0.3, 0.7])
def test_coverage_with_correlated_questions(p, rho):
    rng = np.random.default_rng(7)
    trials = 1000
    hits = naive = 0
    for _ in range(trials):
        correct, ids = correlated(rng, p, rho)
        _, lo, hi = stats.accuracy_interval(correct, ids)
        hits += lo <= p <= hi
        _, lo, hi = stats.accuracy_interval(correct)
        naive += lo <= p <= hi
    assert hits / trials >= 0.93
    if rho >= 0.3:
        assert naive / trials < 0.85  # The mistake this function exists to avoid.


def test_coverage_of_the_paired_difference():
    rng = np.random.default_rng(3)
    trials, hits, rejected = 300, 0, 0
    for _ in range(trials):
        # Both methods share the image's ability: the true difference is zero, answers correlate.
        scale = 1 / 0.4 - 1
        ability = np.repeat(rng.beta(0.7 * scale, 0.3 * scale, 250), 8)
        ids = np.repeat(np.arange(250), 8)
        first, second = rng.random(2000) < ability, rng.random(2000) < ability
        result = stats.paired_difference(first, second, ids, resamples=1000)
        hits += result.lo <= 0 <= result.hi
        rejected += result.p < 0.05
    assert hits / trials >= 0.92  # 0.95 less 2.4 standard errors of this simulation.
    assert rejected / trials <= 0.08


def test_ten_thousand_resamples_are_quick():
    correct, ids = correlated(np.random.default_rng(0), 0.8, 0.3)
    start = time.process_time()
    stats.paired_difference(correct, ~correct, ids)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(("right", "n"), [(80, 100), (3, 40), (199, 200)])
def test_close_to_scipy_wilson_when_independent(right, n):
    correct = np.arange(n) < right
    expected = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    mean, lo, hi = stats.accuracy_interval(correct)
    assert mean == right / n
    # Student's t in place of the normal quantile is the whole difference.
    np.testing.assert_allclose([lo, hi], [expected.low, expected.high], atol=0.008)
    assert lo <= expected.low
    assert hi >= expected.high


def test_close_to_cluster_bootstrap_away_from_the_edges():
    correct, ids = correlated(np.random.default_rng(1), 0.7, 0.4)
    mean, lo, hi = stats.accuracy_interval(correct, ids)
    sums = np.bincount(ids, weights=correct)
    draws = stats.cluster_bootstrap(sums, np.full(250, 8.0))
    np.testing.assert_allclose([lo, hi], np.quantile(draws, [0.025, 0.975]), atol=0.006)
    np.testing.assert_allclose(draws.mean(), mean, atol=0.001)


def test_design_effect_of_copied_answers_is_the_cluster_size():
    """Eight copies of each answer carry the information of one."""
    single = np.random.default_rng(5).random(300) < 0.6
    copied, ids = np.repeat(single, 8), np.repeat(np.arange(300), 8)
    np.testing.assert_allclose(
        stats.accuracy_interval(copied, ids), stats.accuracy_interval(single), rtol=2e-3
    )


@pytest.mark.parametrize("value", [0, 1])
def test_unanimous_answers_claim_one_question_per_image(value):
    mean, lo, hi = stats.accuracy_interval(np.full(400, value), np.repeat(np.arange(100), 4))
    expected = scipy_stats.binomtest(100 * value, 100).proportion_ci(method="wilson")
    assert mean == value
    np.testing.assert_allclose([lo, hi], [expected.low, expected.high], atol=0.002)
    assert hi - lo > 0.03


def test_one_more_mistake_never_narrows_the_interval_much():
    """No cliff between 'all right' and 'one wrong'."""
    ids = np.repeat(np.arange(100), 8)
    lows = []
    for wrong in range(6):
        correct = np.ones(800, bool)
        correct[: 8 * wrong : 8] = False
        lows.append(stats.accuracy_interval(correct, ids).lo)
    assert max(lows) - lows[0] < 0.02


def test_one_image_says_nothing():
    assert stats.accuracy_interval([1, 1, 0, 1], [5, 5, 5, 5]) == (0.75, 0.0, 1.0)


def test_accepts_string_ids_unequal_clusters_and_partial_scores():
    mean, lo, hi = stats.accuracy_interval([1, 0.5, 0, 1], ["b", "a", "b", "c"])
    assert mean == 0.625
    assert 0 <= lo < mean < hi <= 1


def test_bootstrap_is_seeded_and_blocks_do_not_matter(monkeypatch):
    sums, counts = np.arange(50.0), np.full(50, 60.0)
    whole = stats.cluster_bootstrap(sums, counts, resamples=500, seed=4)
    np.testing.assert_array_equal(
        whole, stats.cluster_bootstrap(sums, counts, resamples=500, seed=4)
    )
    assert not np.array_equal(whole, stats.cluster_bootstrap(sums, counts, resamples=500, seed=5))
    monkeypatch.setattr(stats, "_DRAWS_PER_BLOCK", 1024)
    small = stats.cluster_bootstrap(sums, counts, resamples=500, seed=4)
    assert small.shape == (500,)
    # Standard error of a bootstrap mean, closed form.
    np.testing.assert_allclose(small.std(), sums.std() / 60 / np.sqrt(50), rtol=0.15)


def test_sign_flip_is_the_exact_sign_test_for_few_differences():
    first = np.zeros(100, int)
    first[:6] = 1
    second = np.zeros(100, int)
    result = stats.paired_difference(first, second)
    assert result.p == pytest.approx(scipy_stats.binomtest(6, 6).pvalue)
    assert result.mean == pytest.approx(0.06)


def test_sign_flip_monte_carlo_matches_the_binomial_test():
    first, second = np.zeros(200, int), np.zeros(200, int)
    first[:25] = 1
    second[25:35] = 1
    result = stats.paired_difference(first, second)
    assert result.p == pytest.approx(scipy_stats.binomtest(25, 35).pvalue, abs=0.006)
    assert 0 < result.lo < result.mean < result.hi


def test_identical_methods_are_not_a_certain_tie():
    same = np.arange(90) % 3 == 0
    mean, lo, hi, p = stats.paired_difference(same, same)
    assert mean == 0
    assert p == 1
    # Largest rate of differing images that shows none among 90 with probability 2.5 %.
    assert hi == pytest.approx(1 - 0.025 ** (1 / 90))
    assert lo == -hi


def test_holm_matches_scipy_style_reference():
    # Worked by hand: sorted .01 .02 .03 .04 -> .04, .06, .06, .06.
    np.testing.assert_allclose(stats.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(stats.holm([0.9, 0.8]), [1, 1])
    assert stats.holm([]).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.accuracy_interval([]),
        lambda: stats.accuracy_interval([1, 0], [1]),
        lambda: stats.accuracy_interval([2, 0]),
        lambda: stats.accuracy_interval([float("nan"), 0]),
        lambda: stats.paired_difference([1, 0], [1]),
        lambda: stats.holm([1.5]),
    ],
)
def test_bad_input_is_a_clear_error(call):
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3


def stored(name, right):
    """Rows of predictions: right [questions, draws]; three questions an image."""
    return [
        {
            **{"compressor": name, "index": i // 3, "slot": i % 3, "task": "t", "question": "?"},
            **{"correct": bool(right[i, draw]), "seed": draw},
        }
        for draw in range(right.shape[1])
        for i in range(len(right))
    ]


def test_several_draws_count_as_their_mean():
    """Against loops: a method with one draw beside one with three, and one with two."""
    rng = np.random.default_rng(3)
    once, thrice, twice = (rng.random((30, draws)) < 0.6 for draws in (1, 3, 2))
    images = [i // 3 for i in range(30)]
    for second in (thrice, twice):
        means = [sum(float(right) for right in row) / len(row) for row in second]
        want = stats.paired_difference([float(r) for r in once[:, 0]], means, images, resamples=500)
        assert want.mean == pytest.approx(sum(once[:, 0] - means) / 30, abs=1e-12)
        assert stats.paired_difference(once[:, 0], second, images, resamples=500) == want
        rows = stored("m", once), stored("random", second)
        found, count = stats.paired_predictions(*rows, resamples=500)
        assert count == 30 and found == pytest.approx(want)
        # Rows in another order, and a question that one of them lacks.
        rest, count = stats.paired_predictions(rows[0][:-1], rows[1][::-1], resamples=500)
        assert count == 29
        assert rest.mean == pytest.approx(sum((once[:, 0] - means)[:-1]) / 29, abs=1e-12)
    # Both may have draws, as many as they like.
    both = stats.paired_difference(twice, thrice, images, resamples=500)
    assert both.mean == pytest.approx(twice.mean() - thrice.mean(), abs=1e-12)


def test_draws_in_a_row_are_told_what_to_do():
    """What is read from a file of predictions without a look at its seeds."""
    with pytest.raises(UserError, match="paired_predictions") as caught:
        stats.paired_difference([1, 0], [1, 0, 1, 0, 1, 1], [0, 1])
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match="not as many draws"):
        stats.paired_difference([1, 0], [[1, 0], [1]])
    with pytest.raises(UserError, match="outside"):
        stats.paired_difference([1, 0], [[1, 2], [1, 0]])
    with pytest.raises(UserError, match="no question of 2"):
        stats.paired_predictions({(0, 0): 1.0}, {(1, 0): 1.0, (2, 0): 0.0})
