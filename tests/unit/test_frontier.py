"""Frontiers: matched differences and areas against closed forms, intervals against theirs, bad input in one line."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from salsa.analysis.frontier import LINEAR, SQRT, _Found, _over_clusters, _won, frontier, positions
from salsa.analysis.paths import START, Policy
from salsa.errors import DataError

PROMPTS = [f"prompt {i}" for i in range(40)]
REWARDS = {"proxy": "p", "gold": "g"}


def policy(arm, beta, kl, proxy, gold=0.0, *, cluster="a", seed=0, prompts=PROMPTS, **given):
    """One that spends `kl` and scores `proxy` and `gold` on every prompt (or an array)."""
    columns = {"kl_to_base": kl, "proxy": proxy, "gold": gold}
    full = {name: np.broadcast_to(value, (len(prompts),)) * 1.0 for name, value in columns.items()}
    values = {"rewards": REWARDS} | given
    return Policy(f"{cluster}_{beta}", cluster, arm, beta, seed, prompts, full, **values)


def arm(name, points, **given):
    """Points (β, KL, proxy, …)."""
    return [policy(name, *point, **given) for point in points]


def matched(made, **wanted):
    (row,) = [m for m in made["matched"] if all(m[k] == v for k, v in wanted.items())]
    return row


def test_two_policies_are_mixed_so_that_the_root_of_the_kl_is_linear():
    kl = np.array([[0.0, 1.0, 4.0]])
    (row,) = positions(kl, np.array([[2.25, 0.25, 4.0]]))
    assert row == pytest.approx(np.array([[0, 0.5, 0.5], [0.5, 0.5, 0], [0, 0, 1]]))
    (row,) = positions(kl, np.array([[2.25]]), LINEAR)
    assert row == pytest.approx(np.array([[0, 1 - 1.25 / 3, 1.25 / 3]]))


def test_the_root_is_nearer_to_the_exact_optimum_than_the_chord():
    """π* ∝ ρ·exp(r/β) of 100 worlds of 200 replies, enumerated: the reward at β 0.55, between β 1 and 0.3."""
    rng = np.random.default_rng(0)
    errors: dict[tuple[str, float], list[float]] = {}
    for _ in range(100):
        base, r = rng.dirichlet(np.full(200, 0.5)), rng.normal(size=200)
        own = base * np.exp(rng.normal(size=200))
        own /= own.sum()
        optima = [own * np.exp((r - r.max()) / beta) for beta in (1.0, 0.3, 0.55)]
        optima = [p / p.sum() for p in optima]
        reward = [float(p @ r) for p in optima]
        for name, q in (("own", own), ("base", base)):
            kl = [float((p * np.log(p / q)).sum()) for p in optima]
            for power in (SQRT, LINEAR):
                (mixed,) = positions(np.array([kl[:2]]), np.array([kl[2:]]), power)
                error = float((mixed @ reward[:2])[0] - reward[2])
                errors.setdefault((name, power), []).append(error)
    bias = {key: float(np.mean(values)) for key, values in errors.items()}
    assert bias["own", LINEAR] < -0.12 and abs(bias["own", SQRT]) < 0.05
    assert bias["base", LINEAR] < bias["base", SQRT] - 0.05 < 0


def test_nothing_is_extrapolated():
    for path, level in (([1.0, 4.0], 0.9), ([1.0, 4.0], 4.1), ([2.0], 2.0)):
        assert np.isnan(positions(np.array([path]), np.array([[level]]))).all()


def test_where_a_path_turns_back_the_smaller_beta_counts():
    (row,) = positions(np.array([[0.0, 3.0, 2.0]]), np.array([[2.5, 1.0]]))
    share = (math.sqrt(3) - math.sqrt(2.5)) / (math.sqrt(3) - math.sqrt(2))
    assert row[0] == pytest.approx([0, 1 - share, share])
    assert row[1] == pytest.approx([1 - math.sqrt(1 / 3), math.sqrt(1 / 3), 0])


def test_equal_kl_takes_the_kl_away_and_equal_beta_does_not():
    """Both on proxy = 2√KL, salsa 0.3 above it and at other KLs: the difference is 0.3 wherever both are."""
    ppo = arm("ppo", [(START, 0.0, 0.0), (0.3, 1.0, 2.0), (0.1, 4.0, 4.0)])
    salsa = arm("salsa", [(START, 0.0, 0.3), (0.3, 2.25, 3.3), (0.1, 9.0, 6.3)])
    made = frontier(ppo + salsa, "ppo", "kl_to_base", bootstraps=20)
    for beta in (0.3, 0.1):
        row = matched(made, beta=beta, measure="proxy")
        assert row["effect"] == pytest.approx(0.3) and row["at"] == "equal KL to base"
        assert row["levels"] == [row["levels"][0]] * 2 and row["area"] is None
        assert matched(made, beta=beta, measure="gold")["effect"] == pytest.approx(0)
    average = matched(made, beta=None, measure="proxy")
    assert average["effect"] == pytest.approx(0.3)
    assert average["levels"] == [0.0, 4.0] and average["area"] == pytest.approx(1.2)
    assert average["at"] == "equal KL to base, average"
    chord = 0.3 + 3 * 1.0 / 2.25 - 2.0  # a straight line from 0 to 2.25 is too low at 1
    assert matched(made, beta=0.3, measure="proxy")["chord"] == pytest.approx(chord)
    reverse = frontier(ppo + salsa, "salsa", "kl_to_base", bootstraps=20)
    assert matched(reverse, beta=0.3, measure="proxy")["effect"] == pytest.approx(-0.3)


def test_the_area_is_an_integral_over_the_kl():
    """(3 − 1)·√KL over [1, 4]: 2·(2/3)·(8 − 1) = 28/3; straight lines: an oracle of many small steps."""
    ppo = arm("ppo", [(0.3, 0.5, math.sqrt(0.5)), (0.2, 2.0, math.sqrt(2)), (0.1, 4.0, 2.0)])
    salsa = arm("salsa", [(0.3, 1.0, 3.0), (0.1, 9.0, 9.0)])
    row = matched(
        frontier(ppo + salsa, "ppo", "kl_to_base", bootstraps=5), beta=None, measure="proxy"
    )
    assert row["area"] == pytest.approx(28 / 3) and row["effect"] == pytest.approx(28 / 9)
    steps = np.linspace(1, 4, 100_001)
    straight = np.interp(steps, [1, 9], [3, 9])
    straight -= np.interp(steps, [0.5, 2, 4], [math.sqrt(0.5), math.sqrt(2), 2])
    assert row["chord"] == pytest.approx(straight.mean(), abs=1e-4)


def test_a_level_that_one_arm_does_not_reach_is_left_out():
    ppo = arm("ppo", [(0.3, 1.0, 1.0), (0.1, 9.0, 3.0)])
    salsa = arm("salsa", [(0.3, 0.5, 1.0), (0.1, 4.0, 3.0)])
    made = frontier(ppo + salsa, "ppo", "kl_to_base", bootstraps=5)
    assert {m["beta"] for m in made["matched"]} == {0.3, None}
    assert matched(made, beta=None, measure="proxy")["levels"] == [1.0, 4.0]
    apart = arm("ppo", [(0.3, 5.0, 1.0), (0.1, 9.0, 3.0)]) + salsa
    made = frontier(apart, "ppo", "kl_to_base", bootstraps=5)
    assert made["matched"] == [] and made["rows"] == []


def test_wins_are_mixed_as_the_policies_are():
    """salsa loses every prompt at its start and wins all at β 0.1: half way in √KL it wins half."""
    ppo = arm("ppo", [(0.3, 1.0, 1.0), (0.1, 16.0, 2.0)])
    salsa = arm("salsa", [(START, 0.0, 0.0), (0.1, 4.0, 3.0)])
    made = frontier(ppo + salsa, "ppo", "kl_to_base", bootstraps=5)
    assert matched(made, beta=0.3, measure="proxy win rate")["effect"] == pytest.approx(0.0)
    assert matched(made, beta=0.3, measure="gold win rate")["effect"] == pytest.approx(0.0), "ties"
    late = salsa[:1] + arm("salsa", [(0.1, 16 / 9, 3.0)])
    made = frontier(ppo + late, "ppo", "kl_to_base", bootstraps=5)
    assert matched(made, beta=0.3, measure="proxy win rate")["effect"] == pytest.approx(25.0)


def test_the_interval_of_a_cluster_is_over_its_prompts():
    """At equal KL without noise in the KL it is that of paired differences."""
    noise = np.random.default_rng(0).normal(size=(2, 40))
    ppo = arm("ppo", [(0.3, 1.0, noise[0]), (0.1, 4.0, noise[0])])
    salsa = arm("salsa", [(0.3, 1.0, noise[1] + 1), (0.1, 4.0, noise[1] + 1)])
    made = frontier(ppo + salsa, "ppo", "kl_to_base", bootstraps=4000)
    (row,) = [r for r in made["rows"] if r["beta"] == 0.3 and r["measure"] == "proxy"]
    differences = noise[1] + 1 - noise[0]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert row["effect"] == pytest.approx(differences.mean())
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.02)
    assert matched(made, beta=0.3, measure="proxy")["low"] is None, "one cluster"


def study(gaps, noise=0.0, shared=0.0):
    """ppo and salsa in as many clusters; salsa is better by the cluster's gap, prompts differ together by `shared`."""
    rng = np.random.default_rng(1)
    made, together = [], shared * rng.normal(size=40)
    for number, gap in enumerate(gaps):
        for beta, kl in ((START, 0.0), (0.3, 1.0), (0.1, 4.0)):
            own = noise * rng.normal(size=40) + together
            made.append(policy("ppo", beta, kl, kl, cluster=f"p{number}"))
            made.append(policy("salsa", beta, kl, kl + gap + own, cluster=f"p{number}"))
    return made


def test_the_interval_over_clusters_is_students_where_prompts_agree():
    gaps = [0.1, 0.5, 0.3, 0.9]
    row = matched(frontier(study(gaps), "ppo", "kl_to_base"), beta=0.3, measure="proxy")
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (row["effect"], row["clusters"], row["left_out"]) == (pytest.approx(0.45), 4, 0)
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert 0.1 <= row["bootstrap"][0] < 0.45 < row["bootstrap"][1] <= 0.9


def test_the_clusters_spread_is_that_of_the_estimates_and_not_of_a_resample():
    """Resamples that all say 9 have no spread, so what is left is the t interval over the clusters' own effects."""
    effects = [0.1, 0.5, 0.3, 0.9]
    found = [
        _Found({"proxy": np.array([e, 9.0, 9.0, 9.0])}, {"proxy": e}, (1.0, 1.0)) for e in effects
    ]
    row = _over_clusters(found, "proxy", np.ones((4, 4)), count=40)
    low, high = stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx((0.45, low, high))


def test_prompts_that_all_clusters_share_widen_it():
    """Clusters that agree to the digit on prompts that differ: the t interval over the prompts is left."""
    made = study([0.5] * 4, shared=1.0)
    row = matched(frontier(made, "ppo", "kl_to_base", bootstraps=4000), beta=0.3, measure="proxy")
    values = made[1].columns["proxy"]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.03)


def test_points_are_means_over_clusters_seeds_and_prompts():
    made = [
        policy("ppo", beta, kl + c + 0.1 * s, 2.0 * c, cluster=c, seed=s)
        for c in (0, 1, 2)
        for s in (0, 1)
        for beta, kl in ((START, 0.0), (0.1, 3.0))
    ]
    found = frontier(made, "ppo", "kl_to_base", bootstraps=5)
    start, end = found["arms"]["ppo"]["points"]
    assert (start["beta"], end["beta"]) == (None, 0.1)
    assert start["kl"]["mean"] == pytest.approx(1.05) and end["kl"]["mean"] == pytest.approx(4.05)
    low, high = stats.ttest_1samp([0.0, 2.0, 4.0], 0).confidence_interval(0.95)
    assert (end["proxy"]["low"], end["proxy"]["high"]) == pytest.approx((low, high))
    assert found["matched"] == []


@pytest.mark.parametrize("seeds", [(2, 2), (1, 3)])
def test_the_kth_seed_meets_the_kth_and_with_other_numbers_everyone_meets_everyone(seeds):
    rng = np.random.default_rng(0)
    own, other = (rng.integers(0, 3, (2, count, 5)).astype(float) for count in seeds)
    weights = rng.dirichlet(np.ones(5), 4)
    met = [(k, k) for k in range(2)] if seeds == (2, 2) else [*product(*(range(n) for n in seeds))]
    for r, a, b in product(range(4), range(2), range(2)):
        wins = [
            weights[r, p] * (0.5 * (np.sign(own[a, i, p] - other[b, j, p]) + 1))
            for i, j in met
            for p in range(5)
        ]
        assert _won(own, other, weights)[r, a, b] == pytest.approx(sum(wins) / len(met))


def test_where_gold_leaves_the_proxy():
    """The best gold at a KL of 1, the best proxy at 9: they part at 1, and gold loses 2 from there."""
    points = [(START, 0.0, 0.0, 0.0), (0.3, 1.0, 1.0, 3.0), (0.1, 9.0, 5.0, 1.0)]
    found = frontier(arm("ppo", points), "ppo", "kl_to_base", bootstraps=10)
    (parted,) = found["arms"]["ppo"]["parted"]
    assert (parted["kl"], parted["best_proxy_kl"], parted["lost"]) == (1.0, 9.0, 2.0)
    assert parted["share"] == 1.0
    together = [(START, 0.0, 0.0, 0.0), (0.3, 1.0, 1.0, 3.0), (0.1, 9.0, 5.0, 4.0)]
    found = frontier(arm("ppo", together), "ppo", "kl_to_base", bootstraps=10)
    (parted,) = found["arms"]["ppo"]["parted"]
    assert parted["kl"] is None and parted["lost"] == 0 and parted["share"] == 0.0


def test_the_way_there_is_taken_from_the_metrics():
    rows = [
        {"step": 1, "kl": 0.0, "kl_to_base": 1.0, "score": 2.0, "gold": 3.0},
        {"step": 2, "kl": 0.5, "score": 2.5, "gold": 3.0},
    ]
    others = [{**rows[0], "score": 4.0}, rows[1]]
    made = [
        policy("ppo", 0.1, 1.0, 1.0, curve=rows),
        policy("ppo", 0.1, 1.0, 1.0, seed=1, curve=others),
    ]
    (way,) = frontier(made, "ppo", "kl_to_base", bootstraps=5)["arms"]["ppo"]["training"]
    assert way == {"beta": 0.1, "step": 1, "kl": 1.0, "proxy": 3.0, "gold": 3.0}


def test_a_cluster_that_is_not_finished_is_left_out_and_named():
    made = [p for p in study([0.1, 0.2, 0.3]) if (p.cluster, p.beta) != ("p1", 0.1)]
    found = frontier(made, "ppo", "kl_to_base", bootstraps=5)
    assert (found["clusters"], found["incomplete"]) == (["p0", "p2"], ["p1"])
    assert matched(found, beta=0.3, measure="proxy")["effect"] == pytest.approx(0.2)


BASE = study([0.1, 0.2])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "no evaluated policy"),
        ([*BASE, policy("ppo", 0.05, 1.0, 1.0, cluster="p0", prompts=PROMPTS[:30])],
         "p0_0.05, ppo seed 0 answered other prompts (30) than p0_inf, ppo seed 0 (40). Give all points one eval"),
        ([*BASE, policy("ppo", 0.05, 1.0, 1.0, cluster="p0", rewards=REWARDS | {"proxy": "q"})],
         "proxy of p0_0.05, ppo seed 0 is another reward than that of p0_inf, ppo seed 0"),
        ([policy("ppo", 0.3, 1.0, 1.0, prompts=PROMPTS[:12])],
         "12 held-out prompts are too few to resample. Give eval.prompts 20 or more"),
        ([p for p in BASE if (p.cluster, p.beta) not in (("p0", 0.3), ("p1", 0.1))],
         "no cluster has every arm at every β"),
        ([*BASE, *[policy("ppo", 0.1, 1.0, 1.0, cluster=c, seed=1) for c in ("p0", "p1")]],
         "another number of RL seeds"),
    ],
)  # fmt: skip
def test_what_is_no_frontier_is_one_line(made, message):
    with pytest.raises(DataError) as caught:
        frontier(made, "ppo", "kl_to_base", bootstraps=5)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rewards_may_differ_between_clusters():
    made = [policy("ppo", 0.3, 1.0, 1.0, cluster=c, rewards={"proxy": c}) for c in ("a", "b")]
    assert frontier(made, "ppo", "kl_to_base", bootstraps=5)["clusters"] == ["a", "b"]
