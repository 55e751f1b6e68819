"""Statistics of comparisons. The unit is the prompt; seeds are a second level; what cannot be resolved says so."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and confidence interval."""

    mean: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that the candidate wins, a tie counting one half."""

    rate: float
    stderr: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    n: int
    dropped: int

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not resolved` where the interval includes one half."""
        return "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not resolved"


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over pairs, with its interval and two-sided p-value."""

    mean: float
    stderr: float
    low: float
    high: float
    p_value: float
    n: int


def win_rate(
    preferences: Sequence[float | None],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of the candidate from preferences in [1, 2].

    Args:
        preferences: 1 = the baseline is better, 2 = the candidate, 1.5 = tie; None or NaN = no verdict, which is
            dropped and counted.
        clusters: what each comparison belongs to (its prompt); standard errors are clustered by it. Without clusters
            and without ties the interval is Wilson's, else Student's t over the clusters.
        confidence: level of the interval.

    Raises:
        ValueError: a preference outside [1, 2], or no verdict at all.
    """
    given = [math.nan if p is None else float(p) for p in preferences]
    keep = [i for i, p in enumerate(given) if not math.isnan(p)]
    values = np.array([given[i] for i in keep])
    if not len(values):
        raise ValueError(
            "win_rate: no preference holds a verdict. Give at least one number in [1, 2]."
        )
    if values.min() < 1 or values.max() > 2:
        raise ValueError(
            f"win_rate: preferences lie in [1, 2], got {values.min()} to {values.max()}."
        )
    groups = [clusters[i] for i in keep] if clusters is not None else list(keep)
    estimate = clustered_mean(values - 1, groups, confidence=confidence)
    wins, losses = int((values > 1.5).sum()), int((values < 1.5).sum())
    low, high = estimate.low, estimate.high
    decisive = set(np.unique(values)) <= {1.0, 2.0}
    if clusters is None and decisive:
        interval = stats.binomtest(wins, len(values)).proportion_ci(confidence, method="wilson")
        low, high = float(interval.low), float(interval.high)
    return WinRate(
        rate=estimate.mean,
        stderr=estimate.stderr,
        low=max(0.0, low),
        high=min(1.0, high),
        wins=wins,
        losses=losses,
        ties=len(values) - wins - losses,
        n=len(values),
        dropped=len(given) - len(values),
    )


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Mean of a − b over pairs (the same prompts), 95 % t interval over the clusters, and its two-sided p-value.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"paired_difference: {len(a)} and {len(b)} values. Give as many of one as of the other."
        )
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    groups = clusters if clusters is not None else range(len(differences))
    estimate = clustered_mean(differences, list(groups))
    num_clusters = len(set(groups))
    if estimate.stderr == 0:
        p_value = 1.0 if estimate.mean == 0 else 0.0
    else:
        p_value = float(2 * stats.t.sf(abs(estimate.mean / estimate.stderr), num_clusters - 1))
    return Difference(
        estimate.mean, estimate.stderr, estimate.low, estimate.high, p_value, len(differences)
    )


def clustered_mean(
    values: np.ndarray, clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Estimate:
    """Mean with a cluster-robust standard error and a t interval with G − 1 degrees of freedom.

    se² = G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))² / n². With one cluster the interval is infinite.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(names))
    np.add.at(sums, [names[name] for name in clusters], values - values.mean())
    num_clusters, mean = len(names), float(values.mean())
    if num_clusters < 2:
        return Estimate(mean, math.inf, -math.inf, math.inf)
    stderr = math.sqrt(num_clusters / (num_clusters - 1) * float((sums**2).sum())) / len(values)
    half = float(stats.t.ppf((1 + confidence) / 2, num_clusters - 1)) * stderr
    return Estimate(mean, stderr, mean - half, mean + half)


def two_level_mean(values: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of `values` [seeds, prompts], with a bootstrap interval over seeds and prompts.

    Both are resampled with replacement, crossed, `RESAMPLES` times; percentile interval. With one seed only prompts
    vary, and with two or three the seeds' part of the interval is too narrow: say how many there were.
    """
    num_seeds, num_prompts = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        seeds = np.bincount(rng.integers(num_seeds, size=num_seeds), minlength=num_seeds)
        prompts = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)
        means[i] = seeds @ values @ prompts / (num_seeds * num_prompts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values.mean()), float(means.std(ddof=1)), float(low), float(high))


def two_level_win_rate(candidate: np.ndarray, baseline: np.ndarray, *, seed: int = 0) -> WinRate:
    """Win rate of scores [seeds, prompts], the k-th seed against the k-th, interval over seeds and prompts."""
    outcome = (candidate > baseline) + 0.5 * (candidate == baseline)
    estimate = two_level_mean(outcome, seed=seed)
    return WinRate(
        rate=estimate.mean,
        stderr=estimate.stderr,
        low=estimate.low,
        high=estimate.high,
        wins=int((candidate > baseline).sum()),
        losses=int((candidate < baseline).sum()),
        ties=int((candidate == baseline).sum()),
        n=outcome.size,
        dropped=0,
    )
