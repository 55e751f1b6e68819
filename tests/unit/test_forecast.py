"""The forecast equals enumeration, its bias is gone, and it says nothing where it knows nothing."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.special import logsumexp

from salsa.analysis.forecast import (
    MIN_ESS,
    Replies,
    at_equal,
    at_equal_beta,
    best_of,
    best_of_kl,
    default_betas,
    forecast,
    tilt,
)
from salsa.errors import DataError

COUNTS = np.array([1, 2, 3, 5, 8, 13, 12, 20])
"""How often each of eight responses is among the 64 replies of ρ: its probability is COUNTS / 64."""
REWARD = np.array([2.0, -1.0, 0.5, 1.5, 0.0, -0.5, 0.7, -2.0])
GOLD = np.array([0.1, 0.9, -0.4, 0.3, 0.0, 0.6, -0.2, 0.5])
LENGTH = np.array([1, 2, 3, 4, 5, 6, 7, 8])
OTHER = np.array([1, 3, 2, 4, 10, 12, 12, 20]) / 64


def drawn(values: np.ndarray) -> np.ndarray:
    return np.repeat(values, COUNTS)[None].astype(float)


def enumerated(beta: float) -> dict[str, float]:
    """The optimum over all eight responses."""
    rho = COUNTS / COUNTS.sum()
    optimum = rho * np.exp(REWARD / beta)
    optimum /= optimum.sum()
    return {
        "proxy": optimum @ REWARD,
        "gold": optimum @ GOLD,
        "length": optimum @ LENGTH,
        "value": optimum @ REWARD - beta * (optimum @ np.log(optimum / rho)),
        "kl_own": optimum @ np.log(optimum / rho),
        "kl_to_other": optimum @ np.log(optimum / OTHER),
    }


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_all_replies_give_the_enumerated_optimum(beta):
    ratios = np.log(COUNTS / COUNTS.sum() / OTHER)
    replies = Replies(
        {"proxy": drawn(REWARD), "gold": drawn(GOLD)}, {"other": drawn(ratios)}, drawn(LENGTH)
    )
    estimate = tilt(replies, [beta], jackknife=False)
    for name, value in enumerated(beta).items():
        assert estimate.columns[name][0, 0] == pytest.approx(value, abs=1e-12), name


def sampled(
    rng: np.random.Generator, prompts: int, count: int, reward: np.ndarray = REWARD
) -> Replies:
    """Replies of ρ to so many prompts, `count` each."""
    index = rng.choice(len(COUNTS), p=COUNTS / COUNTS.sum(), size=(prompts, count))
    ratios = np.log(COUNTS / COUNTS.sum() / OTHER)
    return Replies(
        {"proxy": reward[index], "gold": GOLD[index]},
        {"other": ratios[index], "self": np.zeros(index.shape)},
        LENGTH[index].astype(float),
    )


def test_the_jackknife_takes_the_bias_out():
    replies = sampled(np.random.default_rng(0), 20_000, 64)
    exact = enumerated(0.8)
    plain, corrected = tilt(replies, [0.8], jackknife=False), tilt(replies, [0.8])
    for name in ("proxy", "value", "kl_own", "kl_to_other"):
        before = abs(plain.columns[name].mean() - exact[name])
        stderr = corrected.columns[name].std() / 20_000**0.5
        assert before > 6 * stderr, name
        assert abs(corrected.columns[name].mean() - exact[name]) < 3.5 * stderr, name


@pytest.mark.parametrize("beta", [0.005, 0.02, 1.0])
def test_the_jackknife_leaves_replies_out_one_by_one(beta):
    """Also where one reply outweighs all others by more digits than there are."""
    one = sampled(np.random.default_rng(3), 5, 40, reward=np.array([1.0, *[0.0] * 7]))
    only = np.zeros((5, 40))
    only[:, 7] = 1.0
    replies = Replies({"proxy": only, "gold": one.scores["gold"]}, one.log_ratios, one.lengths)
    found = tilt(replies, [beta]).columns

    def statistics(keep: list[int]) -> dict[str, np.ndarray]:
        """Straight from the definitions, in log space."""
        exponent = only[:, keep] / beta
        log_z = logsumexp(exponent, axis=1) - np.log(len(keep))
        share = np.exp(exponent - logsumexp(exponent, axis=1, keepdims=True))
        mean = lambda values: (share * values[:, keep]).sum(axis=1)
        own = mean(only) / beta - log_z
        return {
            "proxy": mean(only), "gold": mean(one.scores["gold"]), "length": mean(one.lengths),
            "value": beta * log_z, "kl_own": own, "kl_to_other": own + mean(one.log_ratios["other"]),
        }  # fmt: skip

    whole, every = statistics(list(range(40))), list(range(40))
    without = [statistics([j for j in every if j != i]) for i in every]
    for name, values in whole.items():
        expected = 40 * values - 39 * np.mean([part[name] for part in without], axis=0)
        assert np.allclose(found[name][:, 0], expected, rtol=1e-9, atol=1e-9), name


def test_effective_sample_size_counts_replies_of_equal_weight():
    reward = np.array([[0.0] * 8 + [-1e3] * 24])
    estimate = tilt(Replies({"proxy": reward}, {}, np.ones((1, 32))), [1.0])
    assert estimate.ess[0, 0] == pytest.approx(8)
    assert not estimate.speaks[0]


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(1)
    reward, gold = rng.normal(size=(2, 3, 6))
    replies = Replies({"proxy": reward, "gold": gold}, {}, np.ones((3, 6)))
    for n in (1, 2, 4, 6):
        best = best_of(replies, n)
        for prompt in range(3):
            chosen = [max(s, key=lambda i: reward[prompt, i]) for s in combinations(range(6), n)]
            assert best["proxy"][prompt] == pytest.approx(np.mean(reward[prompt, chosen]))
            assert best["gold"][prompt] == pytest.approx(np.mean(gold[prompt, chosen]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
def test_kl_of_best_of_n_is_that_of_the_largest_of_n_uniform_numbers(n):
    """Its density is n·u^(n−1)."""
    expected, _ = quad(lambda u: n * u ** (n - 1) * np.log(n * u ** (n - 1)) if u else 0.0, 0, 1)
    assert best_of_kl(n) == pytest.approx(expected, abs=1e-7)


def test_too_few_replies_are_told_with_how_many_are_needed():
    replies = {name: sampled(np.random.default_rng(2), 10, 32) for name in ("a", "b")}
    with pytest.raises(DataError, match=r"32 replies a prompt .* Set forecast.num_samples=\d+"):
        forecast(replies, [0.01, 0.02], 0.01)


def test_a_smaller_beta_than_the_replies_allow_is_replaced_and_said():
    replies = {name: sampled(np.random.default_rng(3), 50, 64) for name in ("a", "b")}
    made = forecast(replies, default_betas(0.1), 0.1)
    assert made["wanted_beta"] == 0.1 < made["beta"]
    assert made["samples_for_wanted_beta"] > 64
    spoken = [row for row in made["frontiers"]["a"] if "columns" in row]
    assert spoken[0]["beta"] == pytest.approx(made["beta"], rel=1e-6)
    assert all(row["ess"] >= MIN_ESS for row in spoken)


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize(
    ("wanted", "taken"), [(1.0, 2.0), (2.0, 2.0), (2.0 + 1e-12, 2.0), (3, 5.0)]
)
def test_the_first_is_the_baseline_at_the_smallest_beta_that_is_no_smaller(names, wanted, taken):
    replies = {name: sampled(np.random.default_rng(3), 20, 64) for name in names}
    made = forecast(replies, [8.0, 2.0, 5.0], wanted)
    assert (made["baseline"], made["beta"]) == (names[0], taken)
    assert {row["candidate"] for row in made["comparisons"]} == {names[1]}


def test_a_reference_against_itself_is_worth_nothing():
    own = tilt(sampled(np.random.default_rng(4), 30, 64), BETAS)
    same = at_equal_beta("a", own, own, BETAS, 10)
    assert all(e.mean == 0 and e.stderr == 0 for e in same.differences.values())
    for by in ("kl_own", "kl_to_other"):
        matched = at_equal("a", by, own, own, BETAS, 10, np.random.default_rng(0))
        assert matched is not None and matched.candidate_beta == pytest.approx(BETAS[10])
        assert all(abs(e.mean) < 1e-12 for e in matched.differences.values())


BETAS = default_betas(0.5)[4:]


def test_a_shifted_reward_is_seen_at_every_match():
    rng = np.random.default_rng(5)
    own = tilt(sampled(rng, 400, 128, REWARD + 0.2), BETAS)
    other = tilt(sampled(rng, 400, 128), BETAS)
    for comparison in (
        at_equal_beta("a", own, other, BETAS, 8),
        at_equal("a", "kl_own", own, other, BETAS, 8, rng),
        at_equal("a", "kl_to_other", own, other, BETAS, 8, rng),
    ):
        assert comparison is not None
        estimate = comparison.differences["proxy"]
        assert estimate.low < 0.2 < estimate.high and estimate.low > 0.1


def test_nothing_beats_the_yardstick_by_kl_to_it():
    """KL(π* ‖ q) of another reference is larger than that of q's own optimum with the same reward: Gibbs."""
    many = lambda values: np.tile(values, (3, 20))  # each reply often enough to speak
    ratios = np.log(COUNTS / COUNTS.sum() / OTHER)
    theirs = np.repeat(REWARD, np.round(OTHER * 64).astype(int))
    q = Replies({"proxy": many(theirs)}, {"q": many(np.zeros(64))}, many(np.ones(64)))
    rho = Replies(
        {"proxy": many(drawn(REWARD)[0])}, {"q": many(drawn(ratios)[0])}, many(np.ones(64))
    )
    dense = [float(b) for b in np.geomspace(0.2, 200, 400)]
    own, other = tilt(rho, dense, jackknife=False), tilt(q, dense, jackknife=False)
    for index in (60, 100, 150):
        matched = at_equal("rho", "kl_to_q", own, other, dense, index, np.random.default_rng(0))
        if matched is not None:
            assert matched.differences["proxy"].mean < 1e-4
    assert at_equal("rho", "kl_to_q", own, other, dense, 100, np.random.default_rng(0)) is not None


def test_intervals_at_a_matched_level_cover():
    rng = np.random.default_rng(6)
    inside = 0
    for _ in range(60):
        own, other = (tilt(sampled(rng, 30, 64), BETAS[::3]) for _ in range(2))
        matched = at_equal("a", "kl_own", own, other, BETAS[::3], 3, rng)
        assert matched is not None
        estimate = matched.differences["proxy"]
        inside += estimate.low <= 0 <= estimate.high
        half = stats.t.ppf(0.975, 29) * estimate.stderr
        assert (estimate.df, estimate.high - estimate.mean) == (29, pytest.approx(half))
    assert 52 <= inside <= 60
