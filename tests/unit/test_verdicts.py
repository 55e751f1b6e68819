"""Verdicts: each word where it belongs, power against simulation, planted worlds judged rightly."""

import math

import numpy as np
import pytest
from scipy import stats

from salsa.analysis.verdicts import clusters_needed, judge, power_of

MARGIN = 3.0


@pytest.mark.parametrize(
    ("effects", "word"),
    [
        ([5.0, 6.0, 7.0, 6.5], "holds"),
        ([-5.0, -6.0, -7.0, -6.5], "does not hold"),
        ([0.5, -0.5, 0.2, -0.1], "practically equal"),
        ([1.0, 1.2, 0.9, 1.1], "practically equal"),
        ([9.0, -8.0, 2.0, 7.0], "not resolved"),
        ([2.0, 4.5, 3.0, 3.5], "holds"),
        ([40.0], "not resolved"),
    ],
)
def test_each_word_where_it_belongs(effects, word):
    made = judge(effects, margin=MARGIN)
    assert made.verdict == word and made.clusters == len(effects)
    assert made.low <= made.effect <= made.high


def test_one_cluster_shows_nothing():
    made = judge([40.0], margin=MARGIN)
    assert (made.low, made.high) == (-math.inf, math.inf) and math.isnan(made.spread)
    assert (made.effect, made.margin, made.power, made.clusters_needed) == (40.0, 3.0, 0.0, None)


def test_the_interval_is_students():
    effects = [1.0, 4.0, 2.5, 3.0, 0.5]
    made = judge(effects, margin=MARGIN)
    expected = stats.t.interval(0.95, 4, np.mean(effects), stats.sem(effects))
    assert (made.low, made.high) == pytest.approx(expected)


def test_power_is_what_simulation_gives():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 4.0, size=(20_000, 8))
    p_values = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert power_of(3.0, 4.0, 8) == pytest.approx((p_values < 0.05).mean(), abs=0.01)


def test_clusters_needed_is_the_smallest_that_does():
    for effect, spread in ((3.0, 4.0), (3.0, 1.0), (3.0, 12.0), (3.0, 0.0)):
        needed = clusters_needed(effect, spread)
        assert power_of(effect, spread, needed) >= 0.8
        assert needed == 2 or power_of(effect, spread, needed - 1) < 0.8
    assert clusters_needed(0.001, 10.0) is None


@pytest.mark.parametrize(
    ("effect", "allowed"),
    [(8.0, {"holds"}), (-8.0, {"does not hold"}), (0.0, {"practically equal", "not resolved"})],
)
def test_planted_worlds_are_judged_rightly(effect, allowed):
    """200 studies of 12 clusters, spread 4 points: a better reference, a worse one, and a null world."""
    rng = np.random.default_rng(1)
    words = [judge(rng.normal(effect, 4.0, 12), margin=MARGIN).verdict for _ in range(200)]
    assert sum(word in allowed for word in words) >= 190


def test_bad_input_is_told():
    for effects, margin in (([], 1.0), ([1.0, math.nan], 1.0), ([1.0, 2.0], 0.0)):
        with pytest.raises(ValueError, match="judge: "):
            judge(effects, margin=margin)
