"""Claim: nominal 95 % intervals of win rates cover 93 to 97 %, and what few training seeds or few clusters do to that.

    python benchmarks/coverage.py [evaluations]

Prints a JSON line: the share of simulated evaluations whose interval holds the truth, for clustered win rates with ties
(`win_rate`), for two levels (`two_level_mean`) beside a bootstrap over seeds and prompts on the same values, and for
three (`three_level_mean`: clusters, two seeds each, prompts that all share) beside other rules, with the mean
half-width in units of the noise of a single value.
"""

import json
import sys

import numpy as np
from scipy import stats

from salsa.evaluate.winrate import three_level_mean, two_level_mean, win_rate

RATES = {
    "80 prompts x 2 turns, ties": (80, 2, 0.0, 0.4, 1.0),
    "80 x 2, rate 0.66": (80, 2, 0.5, 0.2, 0.5),
    "80 x 1, no ties": (80, 1, 0.3, 0.0, 0.0),
    "500 x 2, ties": (500, 2, 0.2, 0.3, 1.0),
    "40 x 3, strong clusters": (40, 3, 0.0, 0.6, 2.0),
}


def rate_coverage(rng, evaluations, prompts, turns, skill, tie, prompt_sd):
    """Coverage of `win_rate`; a latent quality has a part that a prompt's turns share."""
    spread = np.sqrt(1 + prompt_sd**2)
    truth = (stats.norm.sf((tie - skill) / spread) + stats.norm.sf((-tie - skill) / spread)) / 2
    clusters = np.repeat(np.arange(prompts), turns).tolist() if turns > 1 else None
    hits = 0
    for _ in range(evaluations):
        latent = (
            skill + prompt_sd * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, turns))
        )
        found = ((latent > tie) + 0.0 + (latent > -tie)) / 2
        result = win_rate((1 + found).ravel().tolist(), clusters=clusters)
        hits += result.low <= truth <= result.high
    return hits / evaluations


def bootstrap(rng, values, resamples=500):
    """Percentile interval; seeds and prompts resampled, crossed."""
    seeds, prompts = values.shape
    a = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    b = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    means = np.einsum("rs,sp,rp->r", a, values, b) / values.size
    return np.quantile(means, [0.025, 0.975])


def two_level_coverage(rng, evaluations, seeds, seed_sd, prompts=80):
    """Coverage of the bootstrap and of `two_level_mean`; prompts have sd 0.5, noise 0.9."""
    hits = np.zeros(2)
    for _ in range(evaluations):
        values = (
            seed_sd * rng.normal(size=(seeds, 1))
            + 0.5 * rng.normal(size=(1, prompts))
            + 0.9 * rng.normal(size=(seeds, prompts))
        )
        low, high = bootstrap(rng, values)
        ours = two_level_mean(values)
        hits += [low <= 0 <= high, ours.low <= 0 <= ours.high]
    return dict(zip(("bootstrap", "ours"), (hits / evaluations).round(4).tolist(), strict=True))


def three_level_coverage(rng, evaluations, clusters, cluster_sd, prompt_sd, prompts=80, seeds=2):
    """Rule → [coverage, mean half-width]; seeds have sd 0.1 and single values 1."""
    made: dict[str, list[tuple[float, float]]] = {}
    for _ in range(evaluations):
        values = (
            cluster_sd * rng.normal(size=(clusters, 1, 1))
            + 0.1 * rng.normal(size=(clusters, seeds, 1))
            + prompt_sd * rng.normal(size=(1, 1, prompts))
            + rng.normal(size=(clusters, seeds, prompts))
        )
        mean = abs(values.mean())
        ours = three_level_mean(values)
        halves = rivals(values.mean(axis=1)) | {"ours": ours.high - ours.mean}
        low, high = bootstrap(rng, values.mean(axis=1))
        made.setdefault("bootstrap", []).append((low <= 0 <= high, (high - low) / 2))
        for rule, half in halves.items():
            made.setdefault(rule, []).append((mean <= half, half))
    return {rule: np.mean(pairs, axis=0).round(4).tolist() for rule, pairs in made.items()}


def rivals(cells):
    """Rule → half-width from cell means [clusters, prompts], balanced.

    `wider`: of the t intervals over clusters and over prompts. `added`: both quantiles' squares, each with its
    variance.
    `satterthwaite`: the variances' sum with his degrees of freedom. `floored`: t over the clusters, whose variance is
    at least what the cells within them make it.
    """
    clusters, prompts = cells.shape
    rest = cells - cells.mean(axis=1, keepdims=True)
    within = (rest - rest.mean(axis=0)).var(ddof=0) * cells.size
    within /= (clusters - 1) * (prompts - 1) * prompts * clusters  # of the mean
    over_clusters = cells.mean(axis=1).var(ddof=1) / clusters
    over_prompts = cells.mean(axis=0).var(ddof=1) / prompts
    shared = max(0.0, over_prompts - within)
    t = [stats.t.ppf(0.975, n - 1) for n in (clusters, prompts)]
    total = over_clusters + shared
    df = total**2 / (over_clusters**2 / (clusters - 1) + shared**2 / (prompts - 1))
    return {
        "wider": max(t[0] * np.sqrt(over_clusters), t[1] * np.sqrt(over_prompts)),
        "added": np.sqrt(t[0] ** 2 * over_clusters + t[1] ** 2 * shared),
        "satterthwaite": stats.t.ppf(0.975, df) * np.sqrt(total),
        "floored": t[0] * np.sqrt(max(over_clusters, within)),
    }


def main() -> None:
    """Simulate everything and print one line."""
    evaluations = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rng = np.random.default_rng(0)
    print(
        json.dumps(
            {
                "evaluations": evaluations,
                "win_rate": {
                    name: rate_coverage(rng, evaluations, *case) for name, case in RATES.items()
                },
                "two_level": {
                    f"{seeds} seeds, sd {sd}": two_level_coverage(rng, evaluations, seeds, sd)
                    for seeds in (2, 3, 5)
                    for sd in (0.0, 0.1, 0.2, 0.5, 1.0)
                },
                "three_level": {
                    f"{clusters} clusters, sd {sd}, prompts {prompt_sd}": three_level_coverage(
                        rng, evaluations, clusters, sd, prompt_sd
                    )
                    for clusters in (4, 8)
                    for sd in (0.0, 0.1, 0.3, 1.0)
                    for prompt_sd in (0.0, 0.5)
                },
            }
        )
    )


if __name__ == "__main__":
    main()
