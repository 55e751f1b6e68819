"""Win rates and differences with intervals. The unit is the prompt; seeds are a second level, clusters a third.

Intervals are t intervals over independent units (`clustered_mean`; over clusters and prompts, `nested_mean`), except
where Wilson's is allowed: one comparison per prompt and no tie. An outcome that never varies has no
spread to estimate, so its interval is Wilson's for as many prompts: thirty wins of thirty are no proof of 100 %.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and confidence interval."""

    mean: float
    stderr: float
    low: float
    high: float
    df: float
    """Degrees of freedom of the t interval; a fraction where two sources of error are mixed."""


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
    """Comparisons without a verdict; they are in none of the other figures."""
    num_clusters: int
    """Independent units (prompts) behind the interval."""
    bounds: tuple[float, float]
    """The rate if every dropped comparison had been lost, and if every one had been won."""
    p_value: float
    """Two-sided, of rate = ½."""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not resolved` where the interval includes one half."""
        return "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not resolved"

    @property
    def resolution(self) -> float:
        """The smallest distance from one half that so many prompts can resolve, ties apart."""
        return resolution(self.num_clusters or self.n)


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
        preferences: 1 = the baseline is better, 2 = the candidate, 1.5 = tie (or 0, as AlpacaEval writes it); None or
            NaN = no verdict, which is dropped and counted.
        clusters: what each comparison belongs to (its prompt); standard errors are clustered by it. With one comparison
            a cluster and no tie the interval is Wilson's, else Student's t over the clusters.
        confidence: level of the interval.

    Raises:
        ValueError: a preference outside [1, 2], no verdict at all, or not one cluster for each preference.
    """
    given = [math.nan if p is None else float(p) for p in preferences]
    keep = [i for i, p in enumerate(given) if not math.isnan(p)]
    values = np.array([given[i] or 1.5 for i in keep])
    if not len(values):
        raise ValueError(
            "win_rate: no preference holds a verdict. Give at least one number in [1, 2]."
        )
    if values.min() < 1 or values.max() > 2:
        raise ValueError(
            f"win_rate: preferences lie in [1, 2], got {values.min()} to {values.max()}."
        )
    if clusters is not None and len(clusters) != len(given):
        raise ValueError(
            f"win_rate: {len(given)} preferences and {len(clusters)} clusters. Give one cluster each."
        )
    groups = [clusters[i] for i in keep] if clusters is not None else list(keep)
    return rate_of(values - 1, groups, dropped=len(given) - len(values), confidence=confidence)


def rate_of(
    outcome: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    seeds: Sequence[Hashable] | None = None,
    weights: np.ndarray | None = None,
    dropped: int = 0,
    confidence: float = 0.95,
) -> WinRate:
    """Weighted win rate of outcomes in [0, 1]: 1 = the candidate won, 0 = it lost, ½ = tie.

    `clusters`, `seeds` and `weights` are each outcome's prompt, training seed and Arena-Hard weight (`nested_mean`);
    `dropped` comparisons without a verdict widen the bounds only.
    """
    w = np.ones(len(outcome)) if weights is None else weights
    estimate = nested_mean(outcome, clusters, seeds=seeds, weights=w, confidence=confidence)
    num_clusters = len(set(clusters))
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    p_value = t_test(estimate, 0.5)
    one_each = num_clusters == len(outcome) and set(np.unique(outcome)) <= {0.0, 1.0}
    if estimate.stderr == 0 or (one_each and weights is None):
        low, high = wilson(estimate.mean, num_clusters, confidence)
    if estimate.stderr == 0 and estimate.mean in (0.0, 1.0):
        p_value = 2 * 0.5**num_clusters
    won, total, lost = float((w * outcome).sum()), float(w.sum()), dropped * float(w.max())
    return WinRate(
        rate=estimate.mean,
        stderr=estimate.stderr,
        low=low,
        high=high,
        wins=int((outcome > 0.5).sum()),
        losses=int((outcome < 0.5).sum()),
        ties=int((outcome == 0.5).sum()),
        n=len(outcome),
        dropped=dropped,
        num_clusters=num_clusters,
        bounds=(won / (total + lost), (won + lost) / (total + lost)),
        p_value=min(1.0, p_value),
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
    groups = list(clusters if clusters is not None else range(len(differences)))
    estimate = clustered_mean(differences, groups)
    return difference_of(estimate, len(differences))


def difference_of(estimate: Estimate, n: int) -> Difference:
    """An estimated mean of `n` paired differences, with its p-value against 0."""
    e = estimate
    return Difference(e.mean, e.stderr, e.low, e.high, t_test(e, 0.0), n)


def clustered_mean(
    values: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    weights: np.ndarray | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Weighted mean with a cluster-robust standard error and a t interval with G − 1 degrees of freedom.

    se² = G/(G−1) · Σ_g (Σ_{i∈g} w_i (x_i − x̄))² / (Σ w)². With one cluster the interval is infinite.
    """
    w = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    mean = float((w * values).sum() / w.sum())
    sums = np.zeros(len(names))
    np.add.at(sums, [names[name] for name in clusters], w * (values - mean))
    num_clusters = len(names)
    if num_clusters < 2:
        return Estimate(mean, math.inf, -math.inf, math.inf, 0)
    spread = num_clusters / (num_clusters - 1) * float((sums**2).sum())
    return _t_interval(mean, math.sqrt(spread) / float(w.sum()), num_clusters, confidence)


def nested_mean(
    values: np.ndarray,
    prompts: Sequence[Hashable],
    *,
    seeds: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    weights: np.ndarray | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean over prompts, training seeds and clusters, with an interval that answers for all that are given.

    Prompts and seeds: two t intervals, one over the prompts (`clustered_mean`) and one over the seeds' means; the
    wider holds. The error of a mean has a part from prompts and a part from seeds; the wider interval answers for the
    larger one and has its degrees of freedom. Where one part rules it covers at its level, where both are alike a
    little less, and with two seeds that hardly differ it is wider than need be: one degree of freedom cannot know that.

    With clusters the seeds are inside them, and part of how the clusters' means differ. The parts are added instead,
    each with its own quantile (Cochran and Cox 1950): of G clusters and P prompts that they share

        half = (t_{G−1}·v_C + t_{P−1}·v_P) / √(v_C + v_P)     v_C = s²(clusters' means)/G     v_P = σ²_P/P

    σ²_P is the covariance of the clusters' means of one prompt, 0 if it is below, for what a prompt adds in every
    cluster is not in v_C. It covers 95 to 97 % from three clusters on, whatever the sizes; the wider of two intervals
    falls to 90 % with eight (benchmarks/coverage.py, docs/decisions/0005).

    Args:
        values: any unit; the estimate has it too.
        prompts: the prompt of each value.
        seeds: its training seed.
        clusters: what would be drawn anew if the study were repeated, e.g. its SFT pair with the reward model. Every
            cluster counts the same. A single one is no level, as a single seed is none.
        weights: of the values; 1 if not given.
        confidence: level of the interval.

    Raises:
        ValueError: not one prompt, seed and cluster for each value.
    """
    for name, labels in (("prompts", prompts), ("seeds", seeds), ("clusters", clusters)):
        if labels is not None and len(labels) != len(values):
            raise ValueError(
                f"nested_mean: {len(values)} values and {len(labels)} {name}. Give one of each."
            )
    if clusters is not None and len(set(clusters)) > 1:
        w = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
        return _over_clusters(np.asarray(values, dtype=float), prompts, clusters, w, confidence)
    over_prompts = clustered_mean(values, prompts, weights=weights, confidence=confidence)
    names = list(dict.fromkeys(seeds)) if seeds is not None else []
    if len(names) < 2:
        return over_prompts
    w = np.ones(len(values)) if weights is None else weights
    own = [np.array([seed == name for seed in seeds or ()]) for name in names]
    means = np.array([(w[rows] * values[rows]).sum() / w[rows].sum() for rows in own])
    over_seeds = clustered_mean(means, names, confidence=confidence)
    half = (over_seeds.high - over_seeds.low) / 2
    if half <= over_prompts.high - over_prompts.mean:
        return over_prompts
    mean = over_prompts.mean
    return Estimate(mean, over_seeds.stderr, mean - half, mean + half, over_seeds.df)


def _over_clusters(
    values: np.ndarray,
    prompts: Sequence[Hashable],
    clusters: Sequence[Hashable],
    weights: np.ndarray,
    confidence: float,
) -> Estimate:
    """`nested_mean` with clusters; prompts may be missing in a cluster."""
    rows = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    columns = {name: number for number, name in enumerate(dict.fromkeys(prompts))}
    at = [rows[name] for name in clusters], [columns[name] for name in prompts]
    weight, total = np.zeros((2, len(rows), len(columns)))
    np.add.at(weight, at, weights)
    np.add.at(total, at, weights * values)
    return _of_cells(weight, total, confidence)


def _of_cells(weight: np.ndarray, total: np.ndarray, confidence: float) -> Estimate:
    """The mean of the clusters' means with the interval of `nested_mean`.

    Args:
        weight: of the values of one prompt in one cluster together, [clusters, prompts].
        total: of their products with the values.
        confidence: level of the interval.
    """
    means = total.sum(axis=1) / weight.sum(axis=1)
    num_clusters, num_prompts = weight.shape
    v_clusters = float(means.var(ddof=1)) / num_clusters
    share = weight / (num_clusters * weight.sum(axis=1, keepdims=True))
    """What each cell counts in the mean; they sum to 1."""
    apart = share * np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    apart -= share * means[:, None]
    products = (apart.sum(axis=0) ** 2 - (apart**2).sum(axis=0)).sum()
    pairs = (share.sum(axis=0) ** 2 - (share**2).sum(axis=0)).sum()
    v_prompts = 0.0
    if pairs > 0 and num_prompts > 1:  # pairs of clusters that share a prompt
        covariance = num_prompts / (num_prompts - 1) * products / pairs
        v_prompts = max(0.0, float(covariance)) * float((share.sum(axis=0) ** 2).sum())
    return cochran_cox(
        float(means.mean()),
        (v_clusters, v_prompts),
        (num_clusters - 1, num_prompts - 1),
        confidence,
    )


def cochran_cox(
    mean: float, variances: tuple[float, float], dfs: tuple[int, int], confidence: float
) -> Estimate:
    """The interval mean ± Σ_i t_i·v_i / √(Σ_i v_i); `df` is that of the t interval with its width and √(Σ_i v_i)."""
    total, level = math.fsum(variances), (1 + confidence) / 2
    if total == 0:
        return Estimate(mean, 0.0, mean, mean, min(dfs))
    stderr = math.sqrt(total)
    used = [(v, df) for v, df in zip(variances, dfs, strict=True) if v > 0]
    quantile = sum(v * float(special.stdtrit(df, level)) for v, df in used) / total
    low, high = min(df for _, df in used), max(df for _, df in used)

    def excess(df: float) -> float:
        return float(special.stdtrit(df, level)) - quantile

    if excess(low) <= 0:  # where one variance is all there is, rounding may leave no root
        df = float(low)
    elif excess(high) >= 0:
        df = float(high)
    else:
        df = float(optimize.brentq(excess, low, high))
    return Estimate(mean, stderr, mean - quantile * stderr, mean + quantile * stderr, df)


def two_level_mean(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """`nested_mean` of `values` [seeds, prompts]."""
    prompts, seeds = _levels(values)
    return nested_mean(values.ravel(), prompts, seeds=seeds, confidence=confidence)


def three_level_mean(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """`nested_mean` of `values` [clusters, seeds, prompts]; the seeds of different clusters are different ones."""
    if len(values) < 2:
        return two_level_mean(values[0], confidence=confidence)
    weight = np.full((values.shape[0], values.shape[2]), float(values.shape[1]))
    return _of_cells(weight, values.sum(axis=1), confidence)


def two_level_win_rate(candidate: np.ndarray, baseline: np.ndarray) -> WinRate:
    """Win rate of scores [seeds, prompts], the k-th seed against the k-th, interval over seeds and prompts."""
    outcome = (candidate > baseline) + 0.5 * (candidate == baseline)
    prompts, seeds = _levels(outcome)
    return rate_of(outcome.ravel(), prompts, seeds=seeds)


def wilson(rate: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share `rate` of `n` independent decisive comparisons."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = min(centre - half, rate), max(centre + half, rate)  # rounding must not shut it out
    return max(0.0, low), min(1.0, high)


def resolution(n: int, confidence: float = 0.95) -> float:
    """Half-width of the interval of a rate near one half without ties: ±11 points for 80 prompts, ±4.4 for 500."""
    return float(stats.norm.ppf((1 + confidence) / 2)) * 0.5 / math.sqrt(n)


def t_test(estimate: Estimate, null: float) -> float:
    """Two-sided p-value of mean = `null`."""
    distance = abs(estimate.mean - null)
    if distance == 0 or math.isinf(estimate.stderr):
        return 1.0
    if estimate.stderr == 0:
        return 0.0
    return float(2 * stats.t.sf(distance / estimate.stderr, estimate.df))


def _t_interval(mean: float, stderr: float, num_units: int, confidence: float) -> Estimate:
    half = float(stats.t.ppf((1 + confidence) / 2, num_units - 1)) * stderr
    return Estimate(mean, stderr, mean - half, mean + half, num_units - 1)


def _levels(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The prompt and the seed of every element of [seeds, prompts], in `ravel`'s order."""
    seeds, prompts = np.indices(values.shape)
    return prompts.ravel().tolist(), seeds.ravel().tolist()
