"""Claim: nominal 95 % intervals of win rates cover 93 to 97 %, and what few training seeds do to that.

    python benchmarks/coverage.py [evaluations]

Prints a JSON line: the share of simulated evaluations whose interval holds the truth, for clustered win rates with ties
(`win_rate`), and for two levels (`two_level_mean`) beside a bootstrap over seeds and prompts on the same values.
"""

import json
import sys

import numpy as np
from scipy import stats

from salsa.evaluate.winrate import two_level_mean, win_rate

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
            }
        )
    )


if __name__ == "__main__":
    main()
