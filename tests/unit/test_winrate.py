"""Statistics against scipy, closed forms and a brute-force simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from salsa.evaluate.winrate import paired_difference, two_level_mean, two_level_win_rate, win_rate


def test_counts_rate_and_dropped():
    result = win_rate([2, 2, 1.5, 1, None, float("nan")])
    assert (result.wins, result.losses, result.ties, result.n, result.dropped) == (2, 1, 1, 4, 2)
    assert result.rate == 0.625


def test_candidate_is_two():
    assert win_rate([2] * 30).rate == 1 and win_rate([2] * 30).verdict == "better"
    assert win_rate([1] * 30).rate == 0 and win_rate([1] * 30).verdict == "worse"
    assert win_rate([1, 2] * 15).verdict == "not resolved"


def test_interval_without_ties_is_wilson():
    result = win_rate([2] * 37 + [1] * 13)
    p, n, z = 0.74, 50, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (result.low, result.high) == pytest.approx((centre - half, centre + half))


def test_interval_with_ties_is_students_t():
    values = np.array([2, 1.5, 1, 2, 2, 1.5, 1, 2])
    result = win_rate(list(values))
    expected = stats.ttest_1samp(values - 1, 0).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_clusters_of_equal_answers_count_once():
    """Every prompt asked five times with the same outcome: the interval must be that of the prompts."""
    once = win_rate([2, 1.5, 1, 2, 2, 1, 1.5], clusters=range(7))
    five = win_rate([2, 1.5, 1, 2, 2, 1, 1.5] * 5, clusters=list(range(7)) * 5)
    assert (five.low, five.high, five.stderr) == pytest.approx((once.low, once.high, once.stderr))
    assert five.stderr > 2 * win_rate([2, 1.5, 1, 2, 2, 1, 1.5] * 5).stderr


def test_paired_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    result, expected = paired_difference(a, b), stats.ttest_rel(a, b)
    assert result.mean == pytest.approx(a.mean() - b.mean())
    assert result.p_value == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert paired_difference(a, a).p_value == 1.0


def test_impossible_input():
    for bad, message in [([3.0], "lie in"), ([None], "no preference holds")]:
        with pytest.raises(ValueError, match=message):
            win_rate(bad)
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1, 2], [1])


def test_two_level_interval_with_one_seed_is_the_prompts_bootstrap():
    values = np.random.default_rng(1).normal(size=(1, 200))
    result = two_level_mean(values)
    expected = stats.bootstrap(
        (values[0],), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5)
    )
    assert result.mean == pytest.approx(values.mean())
    assert result.low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert result.high == pytest.approx(expected.confidence_interval.high, abs=0.02)


def test_two_level_interval_sees_the_seeds():
    """Prompts without spread, seeds with: an interval over prompts alone would have no width."""
    values = np.array([0.0, 1.0, 2.0, 3.0])[:, None] * np.ones(50)
    assert two_level_mean(values).stderr == pytest.approx(math.sqrt(1.25 / 4), rel=0.1)


def test_two_level_win_rate():
    candidate, baseline = np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([[0.0, 2, 4], [0, 0, 0]])
    result = two_level_win_rate(candidate, baseline)
    assert (result.wins, result.losses, result.ties, result.n) == (4, 1, 1, 6)
    assert result.rate == pytest.approx(0.75)
    flipped = two_level_win_rate(baseline, candidate)
    assert (flipped.low, flipped.high) == pytest.approx((1 - result.high, 1 - result.low), abs=0.02)
