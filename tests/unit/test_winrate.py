"""Statistics against scipy, closed forms and a brute-force simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from salsa.evaluate.winrate import (
    clustered_mean,
    cochran_cox,
    nested_mean,
    paired_difference,
    rate_of,
    resolution,
    t_test,
    three_level_mean,
    two_level_mean,
    two_level_win_rate,
    wilson,
    win_rate,
)


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


def test_wilson_is_scipys():
    for wins, n in [(0, 5), (5, 5), (37, 50)]:
        expected = stats.binomtest(wins, n).proportion_ci(0.9, method="wilson")
        assert wilson(wins / n, n, 0.9) == pytest.approx((expected.low, expected.high))


def test_an_outcome_that_never_varies_still_has_an_interval():
    """Thirty prompts, both turns won: no spread to estimate, and no proof of 100 % either."""
    result = win_rate([2] * 60, clusters=[i // 2 for i in range(60)])
    assert result.high == 1 and result.low == pytest.approx(wilson(1, 30)[0]) and result.low < 0.9
    tied = win_rate([1.5] * 30)
    assert tied.low < 0.4 and tied.high > 0.6
    seeds = two_level_win_rate(np.ones((2, 30)), np.zeros((2, 30)))
    assert seeds.low == pytest.approx(result.low)


def test_dropped_verdicts_bound_the_rate():
    result = win_rate([2, 2, 1, 1.5, None, None])
    assert result.bounds == pytest.approx((2.5 / 6, 4.5 / 6))
    assert win_rate([2, 1]).bounds == (0.5, 0.5)


def test_what_n_can_resolve():
    assert resolution(80) == pytest.approx(0.1096, abs=1e-4)
    assert resolution(500) == pytest.approx(0.0438, abs=1e-4)
    assert win_rate([2, 1] * 40, clusters=[i // 2 for i in range(80)]).resolution == resolution(40)


def test_weighted_mean_is_the_mean_of_repeated_rows():
    """Arena-Hard repeats a decisive verdict three times; a weight of 3 within one prompt is that."""
    values, weights = np.array([1.0, 0, 0.5, 1, 0]), np.array([3.0, 1, 1, 1, 3])
    clusters = np.array(["p", "p", "q", "r", "r"])
    repeated = np.repeat(values, weights.astype(int))
    expected = clustered_mean(repeated, list(np.repeat(clusters, weights.astype(int))))
    result = clustered_mean(values, list(clusters), weights=weights)
    assert (result.mean, result.stderr, result.low) == pytest.approx(
        (expected.mean, expected.stderr, expected.low)
    )
    inside = rate_of(values, list(clusters), weights=weights, dropped=2)
    assert 0 <= inside.low <= inside.rate <= inside.high <= 1
    assert inside.bounds == pytest.approx((4.5 / 15, 10.5 / 15))


def test_clustered_standard_error_is_the_bootstraps_over_prompts():
    """Brute force: resample whole prompts of unequal size, 4,000 times."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 5, size=120)
    prompt = rng.normal(0, 0.6, size=120)
    clusters = np.repeat(np.arange(120), sizes)
    values = np.clip(np.round(0.5 + prompt[clusters] + rng.normal(0, 0.4, len(clusters))), 0, 1)
    means = []
    by_prompt = [values[clusters == i] for i in range(120)]
    for _ in range(4000):
        drawn = np.concatenate([by_prompt[i] for i in rng.integers(120, size=120)])
        means.append(drawn.mean())
    assert clustered_mean(values, list(clusters)).stderr == pytest.approx(np.std(means), rel=0.06)


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
    with pytest.raises(ValueError, match="2 preferences and 1 clusters"):
        win_rate([1, 2], clusters=["a"])


def test_two_level_interval_with_one_seed_is_the_t_interval_over_prompts():
    values = np.random.default_rng(1).normal(size=(1, 200))
    result = two_level_mean(values)
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert result.mean == pytest.approx(values.mean())
    assert (result.low, result.high) == pytest.approx(tuple(expected))


def test_two_level_interval_sees_the_seeds():
    """Prompts without spread, seeds with: an interval over prompts alone would have no width."""
    values = np.array([0.0, 1.0, 2.0, 3.0])[:, None] * np.ones(50)
    expected = stats.ttest_1samp([0.0, 1, 2, 3], 0).confidence_interval(0.95)
    result = two_level_mean(values)
    assert (result.low, result.high) == pytest.approx(tuple(expected))


def test_two_level_p_value_agrees_with_its_interval():
    rng = np.random.default_rng(2)
    for _ in range(50):
        values = rng.normal(size=(3, 1)) + rng.normal(size=(3, 40)) * rng.uniform(0.1, 3)
        estimate = two_level_mean(values)
        assert (t_test(estimate, 0.0) < 0.05) == (not estimate.low <= 0 <= estimate.high)


def test_seeds_may_have_lost_verdicts():
    """Unbalanced seeds: the mean is over all values, the interval over the seeds' own means."""
    values = np.array([1.0, 1, 1, 0, 0])
    result = nested_mean(values, list("pqrpq"), seeds=[0, 0, 0, 1, 1])
    expected = stats.ttest_1samp([1.0, 0.0], 0).confidence_interval(0.95)
    assert result.mean == 0.6 and result.df == 1
    assert result.high - result.low == pytest.approx(expected.high - expected.low)


def test_alpaca_evals_raw_rate():
    """100·mean(preference − 1), 0 is a tie, null is dropped, SE = 100·sd(ddof 1)/√n."""
    result = win_rate([2, 1.8, 0, 1, None, 1.2])
    values = np.array([1, 0.8, 0.5, 0, 0.2])
    assert result.rate == pytest.approx(values.mean()) and result.dropped == 1 and result.ties == 1
    assert result.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_p_value_of_a_rate():
    assert win_rate([2] * 6).p_value == pytest.approx(2 / 64)
    assert win_rate([1.5] * 6).p_value == 1.0
    values = [2, 2, 1.5, 1, 2, 2, 1.5, 2]
    expected = stats.ttest_1samp(np.array(values) - 1, 0.5).pvalue
    assert win_rate(values).p_value == pytest.approx(expected)


def test_two_level_win_rate():
    candidate, baseline = np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([[0.0, 2, 4], [0, 0, 0]])
    result = two_level_win_rate(candidate, baseline)
    assert (result.wins, result.losses, result.ties, result.n) == (4, 1, 1, 6)
    assert result.rate == pytest.approx(0.75)
    flipped = two_level_win_rate(baseline, candidate)
    assert (flipped.low, flipped.high) == pytest.approx((1 - result.high, 1 - result.low), abs=0.02)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_are_at_the_level_that_was_asked(confidence):
    """Oracle: scipy's t interval, over prompts where they rule, over the seeds' means where those do."""
    prompts = np.array([0.0, 1, 2, 5])
    expected = stats.ttest_1samp(prompts, 0).confidence_interval(confidence)
    one = clustered_mean(prompts, range(4), confidence=confidence)
    assert (one.low, one.high) == pytest.approx(tuple(expected))
    alike = two_level_mean(np.array([prompts, prompts]), confidence=confidence)
    assert (alike.low, alike.high) == pytest.approx(tuple(expected))
    apart = np.array([[0.0, 0.1, 0.2], [5.0, 5.1, 5.2], [9.0, 9.1, 9.2]])
    expected = stats.ttest_1samp(apart.mean(axis=1), 0).confidence_interval(confidence)
    both = two_level_mean(apart, confidence=confidence)
    assert (both.low, both.high) == pytest.approx(tuple(expected))


def test_the_seeds_means_are_weighted_as_their_values_are():
    """Weights 1 and 3: seed means 0.75 · b + 0.25 · a."""
    values = np.array([0.0, 4.0, 10.0, 14.0, 20.0, 28.0])
    weights = np.array([1.0, 3.0] * 3)
    result = nested_mean(values, [0, 1] * 3, seeds=[0, 0, 1, 1, 2, 2], weights=weights)
    expected = stats.ttest_1samp([3.0, 13.0, 26.0], 0).confidence_interval(0.95)
    assert (result.high - result.low) == pytest.approx(expected.high - expected.low)


def cells_of(values):
    """nested_mean of [clusters, prompts]."""
    clusters, prompts = (level.ravel().tolist() for level in np.indices(values.shape))
    return nested_mean(values.ravel(), prompts, clusters=clusters)


def test_clusters_and_the_prompts_that_they_share_are_added():
    """Oracle: the mean squares of a two-way table; Cochran and Cox's mixture of the two quantiles."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 1)) + rng.normal(size=12) + 0.3 * rng.normal(size=(5, 12)) + 2
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    rest = values - rows[:, None] - columns + values.mean()
    of_prompts = 5 * columns.var(ddof=1) - (rest**2).sum() / (4 * 11)
    v_clusters, v_prompts = rows.var(ddof=1) / 5, of_prompts / 5 / 12
    t_clusters, t_prompts = stats.t.ppf(0.975, 4), stats.t.ppf(0.975, 11)
    half = (t_clusters * v_clusters + t_prompts * v_prompts) / math.sqrt(v_clusters + v_prompts)
    result = cells_of(values)
    assert result.mean == pytest.approx(values.mean())
    assert (result.low, result.high) == pytest.approx((result.mean - half, result.mean + half))
    assert result.stderr == pytest.approx(math.sqrt(v_clusters + v_prompts))
    assert 4 < result.df < 11 and stats.t.ppf(0.975, result.df) * result.stderr == pytest.approx(
        half
    )


def test_clusters_with_prompts_of_their_own_are_a_t_interval():
    values = np.random.default_rng(4).normal(size=(6, 3, 10))
    clusters, seeds, prompts = (level.ravel() for level in np.indices(values.shape))
    own = [f"{c}-{p}" for c, p in zip(clusters, prompts, strict=True)]
    result = nested_mean(values.ravel(), own, seeds=seeds.tolist(), clusters=clusters.tolist())
    expected = stats.ttest_1samp(values.mean(axis=(1, 2)), 0).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx(tuple(expected)) and result.df == 5


def test_clusters_that_agree_leave_the_prompts():
    prompts = np.array([0.0, 1, 2, 5, 3])
    expected = stats.ttest_1samp(prompts, 0).confidence_interval(0.95)
    result = cells_of(np.array([prompts, prompts, prompts]))
    assert (result.low, result.high) == pytest.approx(tuple(expected)) and result.df == 4


def test_prompts_that_pull_clusters_apart_take_nothing_away():
    """A prompt that is good in one cluster and bad in the other has a covariance below 0: it counts as none."""
    values = np.array([[1.0, -1, 2, -2], [-1.0, 1, -2, 2]]) + np.array([[0.0], [3.0]])
    expected = stats.ttest_1samp([0.0, 3.0], 0).confidence_interval(0.95)
    result = cells_of(values)
    assert (result.low, result.high) == pytest.approx(tuple(expected))


def test_every_cluster_counts_the_same():
    """Three values in one cluster, one in the other: the mean of the clusters' means, weights inside them."""
    weights = np.array([1.0, 3.0, 1.0, 1.0])
    values = np.array([0.0, 4.0, 10.0, 10.0])
    result = nested_mean(values, "abca", clusters=[0, 0, 0, 1], weights=weights)
    assert result.mean == pytest.approx(((0 + 12 + 10) / 5 + 10) / 2)


def test_one_cluster_is_no_level():
    values = np.random.default_rng(5).normal(size=(1, 3, 20))
    assert three_level_mean(values) == two_level_mean(values[0])


def test_three_levels_are_nested_means():
    """The seeds of a cluster are its own, whatever they are called."""
    values = np.random.default_rng(7).normal(size=(3, 2, 9)) + np.arange(9)
    clusters, seeds, prompts = (level.ravel().tolist() for level in np.indices(values.shape))
    expected = nested_mean(values.ravel(), prompts, seeds=seeds, clusters=clusters)
    assert vars(three_level_mean(values)) == pytest.approx(vars(expected))


def test_p_value_over_clusters_agrees_with_its_interval():
    rng = np.random.default_rng(6)
    shifts, found = rng.uniform(0, 1, 60), []
    for shift in shifts:
        values = shift + 0.4 * rng.normal(size=(4, 1, 1)) + rng.normal(size=(4, 2, 20))
        estimate = three_level_mean(values + 0.5 * rng.normal(size=20))
        found.append(t_test(estimate, 0.0) < 0.05)
        assert found[-1] == (not estimate.low <= 0 <= estimate.high)
    assert 0 < sum(found) < len(found)


def test_levels_of_another_length_are_told():
    with pytest.raises(ValueError, match="nested_mean: 3 values and 2 clusters. Give one of each."):
        nested_mean(np.zeros(3), "abc", clusters="ab")


def test_cochran_cox_where_one_variance_is_all_there_is():
    """Rounding leaves no df between the two whose quantile is the interval's: the report of such a run broke off."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        variances = [1.0, 10.0 ** rng.uniform(-20, -14)]
        dfs = (int(rng.integers(1, 8)), int(rng.integers(9, 300)))
        for large in (0, 1):
            found = cochran_cox(0.0, (variances[large], variances[1 - large]), dfs, 0.95)
            assert found.df == pytest.approx(dfs[large], rel=1e-6)
            assert found.high == pytest.approx(stats.t.ppf(0.975, dfs[large]), rel=1e-6)
