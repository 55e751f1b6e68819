"""Coverage by simulation: a nominal 95 % interval holds the truth in 93 to 97 % of 2,000 evaluations."""

import numpy as np
import pytest
from scipy import stats

from salsa.evaluate.winrate import clustered_mean, three_level_mean, two_level_mean, win_rate

EVALUATIONS = 2000
pytestmark = pytest.mark.slow


def outcomes(rng, shape, *, skill, tie, prompt_sd):
    """Win 1, tie ½, loss 0 from a latent quality: a prompt's own (both turns share it) plus noise. And its mean."""
    prompts, turns = shape
    latent = skill + prompt_sd * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, turns))
    spread = np.sqrt(1 + prompt_sd**2)
    truth = 0.5 * (stats.norm.sf((tie - skill) / spread) + stats.norm.sf((-tie - skill) / spread))
    return ((latent > tie) + 0.0 + (latent > -tie)) / 2, truth


@pytest.mark.parametrize(
    ("prompts", "turns", "skill", "tie", "prompt_sd"),
    [
        (80, 2, 0.0, 0.4, 1.0),  # MT-Bench: 80 questions, two turns, a third ties
        (80, 2, 0.5, 0.2, 0.5),
        (80, 1, 0.3, 0.0, 0.0),  # no ties, no clusters: Wilson
        (500, 2, 0.2, 0.3, 1.0),  # Arena-Hard
        (40, 3, 0.0, 0.6, 2.0),  # strong clusters, many ties
    ],
)
def test_clustered_win_rate_covers(prompts, turns, skill, tie, prompt_sd):
    rng = np.random.default_rng([prompts, turns])
    clusters = np.repeat(np.arange(prompts), turns).tolist() if turns > 1 else None
    hits = 0
    for _ in range(EVALUATIONS):
        found, truth = outcomes(rng, (prompts, turns), skill=skill, tie=tie, prompt_sd=prompt_sd)
        result = win_rate((1 + found).ravel().tolist(), clusters=clusters)
        hits += result.low <= truth <= result.high
    assert 0.93 <= hits / EVALUATIONS <= 0.97


def test_weighted_mean_covers():
    """Arena-Hard's weights are outcomes too: a ratio, linearised. Two games a prompt, >> weighs 3."""
    rng = np.random.default_rng(5)
    truth, hits = None, 0
    scores, weights = np.array([1.0, 1, 0.5, 0, 0]), np.array([3.0, 1, 1, 1, 3])
    cuts = np.array([1.2, 0.3, -0.3, -1.2])

    def play(prompts):
        latent = 0.3 + rng.normal(size=(prompts, 1)) + 0.7 * rng.normal(size=(prompts, 2))
        label = (latent[..., None] < cuts).sum(-1)
        return scores[label].ravel(), weights[label].ravel()

    values, weight = play(2_000_000)
    truth = (values * weight).sum() / weight.sum()
    clusters = np.repeat(np.arange(200), 2).tolist()
    for _ in range(EVALUATIONS):
        values, weight = play(200)
        result = clustered_mean(values, clusters, weights=weight)
        hits += result.low <= truth <= result.high
    assert 0.93 <= hits / EVALUATIONS <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.2, 1.0])
def test_two_level_mean_never_covers_much_less(seeds, seed_sd):
    """With few seeds no interval covers 95 % whatever the seeds' spread is; ours errs on the wide side."""
    rng = np.random.default_rng([seeds, int(10 * seed_sd)])
    hits = 0
    for _ in range(EVALUATIONS):
        values = (
            seed_sd * rng.normal(size=(seeds, 1))
            + 0.5 * rng.normal(size=(1, 80))
            + 0.9 * rng.normal(size=(seeds, 80))
        )
        result = two_level_mean(values)
        hits += result.low <= 0 <= result.high
    assert hits / EVALUATIONS >= 0.93
    if seed_sd == 1.0:
        assert hits / EVALUATIONS <= 0.97


@pytest.mark.parametrize("clusters", [4, 8])
@pytest.mark.parametrize("cluster_sd", [0.0, 0.1, 0.3, 1.0])
def test_three_level_mean_covers(clusters, cluster_sd):
    """Clusters, two seeds each, prompts that all share; few clusters, and yet 94 % or more."""
    rng = np.random.default_rng([clusters, int(10 * cluster_sd)])
    hits = 0
    for _ in range(EVALUATIONS):
        values = (
            cluster_sd * rng.normal(size=(clusters, 1, 1))
            + 0.1 * rng.normal(size=(clusters, 2, 1))
            + 0.3 * rng.normal(size=(1, 1, 40))
            + rng.normal(size=(clusters, 2, 40))
        )
        result = three_level_mean(values)
        hits += result.low <= 0 <= result.high
    assert 0.94 <= hits / EVALUATIONS <= 0.985
