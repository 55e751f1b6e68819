"""Sign test, McNemar and Holm against scipy and hand-worked numbers; biases against brute force."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy import optimize, stats

from salsa.evaluate.bias import length_bias, length_controlled, position_bias
from salsa.evaluate.significance import holm, mcnemar, sign_test


def test_sign_test_counts_a_prompt_once():
    result = sign_test([1, 1, 0, 0.5, 1, 0], clusters=["a", "a", "b", "b", "c", "d"])
    assert (result.wins, result.losses, result.ties) == (2, 2, 0)
    outcome = [1] * 15 + [0] * 5 + [0.5] * 7
    result = sign_test(outcome)
    assert (result.wins, result.losses, result.ties) == (15, 5, 7)
    assert result.p_value == pytest.approx(2 * stats.binom.cdf(5, 20, 0.5))
    assert sign_test([0.5, 0.5]).p_value == 1.0


def test_mcnemar_is_the_exact_test_on_discordant_prompts():
    a = [1] * 9 + [0] * 2 + [1] * 20 + [0] * 4
    b = [0] * 9 + [1] * 2 + [1] * 20 + [0] * 4
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (9, 2)
    assert result.p_value == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    for a, b, told in (([1, 0], [1], "2 and 1"), ([1], [1, 0], "1 and 2")):
        with pytest.raises(ValueError, match=told):
            mcnemar(a, b)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_error_rate_of_the_family():
    """Three true null hypotheses, 4,000 times: at least one rejection in at most 5 %."""
    rng = np.random.default_rng(0)
    rejected = [min(holm(list(row))) < 0.05 for row in rng.uniform(size=(4000, 3))]
    assert 0.03 < np.mean(rejected) < 0.06


def test_position_bias():
    games = [
        ("first", "second"),
        ("first", "first"),
        ("tie", "tie"),
        ("second", None),
        (None, None),
    ]
    bias = position_bias(games)
    assert (bias.games, bias.both, bias.consistent) == (7, 3, 2)
    assert (bias.first_wins, bias.second_wins) == (3, 2)
    assert bias.consistency == pytest.approx(2 / 3) and bias.first_rate == pytest.approx(0.6)
    assert position_bias([]).consistency is None and position_bias([]).first_rate is None


def test_longer_answer_wins():
    bias = length_bias([1, 0, 0.5, 1], [30, 10, 50, 5], [20, 20, 10, 9], clusters=range(4))
    assert (bias.longer_wins, bias.shorter_wins) == (2, 1)
    assert (bias.mean_candidate, bias.mean_baseline) == (23.75, 14.75)


def simulate(rng, n, w0, w1):
    difference = rng.normal(30, 60, n)
    chance = 1 / (1 + np.exp(-(w0 * np.tanh(difference / difference.std()) + w1)))
    return (rng.uniform(size=n) < chance).astype(float), difference


def test_length_controlled_rate_is_the_maximum_of_the_likelihood():
    outcome, difference = simulate(np.random.default_rng(1), 300, 1.0, 0.4)
    outcome[::7] = 0.5
    x = np.tanh(difference / difference.std())

    def loss(w):
        logit = w[0] * x + w[1]
        return np.sum(np.logaddexp(0, logit) - outcome * logit)

    best = optimize.minimize(
        loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    )
    found = length_controlled(outcome, difference, range(300))
    assert found.mean == pytest.approx(1 / (1 + np.exp(-best.x[1])), abs=1e-6)
    assert found.df == 299
    p = 1 / (1 + np.exp(-(best.x[0] * x + best.x[1])))
    design = np.stack([x, np.ones(300)], axis=1)
    bread = np.linalg.inv(sum(q * (1 - q) * np.outer(row, row) for q, row in zip(p, design, strict=True)))  # fmt: skip
    meat = sum(r**2 * np.outer(row, row) for r, row in zip(outcome - p, design, strict=True))
    of_logit = np.sqrt(300 / 299 * (bread @ meat @ bread)[1, 1])
    assert found.stderr == pytest.approx(of_logit * found.mean * (1 - found.mean), rel=1e-4)
    half = stats.t.ppf(0.975, 299) * found.stderr
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.01)


def test_length_controlled_rate_counts_a_prompt_once():
    outcome, difference = simulate(np.random.default_rng(1), 300, 1.0, 0.4)
    once = length_controlled(outcome, difference, range(300))
    twice = length_controlled(np.tile(outcome, 2), np.tile(difference, 2), [*range(300)] * 2)
    assert astuple(twice) == pytest.approx(astuple(once), rel=1e-6)


def test_length_controlled_rate_takes_the_length_out_and_covers():
    """A judge that likes length, two models that are equal otherwise, one of them longer."""
    rng, hits, raw = np.random.default_rng(2), 0, []
    for _ in range(400):
        outcome, difference = simulate(rng, 300, 1.5, 0.0)
        found = length_controlled(outcome, difference, range(300))
        hits += found.low <= 0.5 <= found.high
        raw.append(outcome.mean())
    assert np.mean(raw) > 0.56
    assert 0.92 <= hits / 400 <= 0.98


def test_length_controlled_rate_says_when_it_cannot_tell():
    assert length_controlled([1, 0, 1, 0], [5, 5, 5, 5], range(4)) is None
    assert length_controlled([1, 1, 0, 0], [5, 9, -3, -8], range(4)) is None
    assert length_controlled([1, 1, 1, 1], [5, -9, 3, 8], range(4)) is None
