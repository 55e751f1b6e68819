"""From effects of independent clusters to a verdict on a claim.

A cluster is what would be drawn anew if somebody repeated the study: an SFT pair with its reward model. RL seeds and
prompts are inside it and make its effect less noisy; they are not further evidence. The interval is Student's t over
the clusters' effects. Beside "is there a difference" it answers "is there none that matters": the effect is practically
equal if its 90 % interval lies within ± the margin that was fixed beforehand (two one-sided tests, Schuirmann 1987).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
MAX_CLUSTERS = 10_000
FAR = 10.0
"""Standard errors beyond the critical value from which on the power is 1."""


@dataclass(frozen=True)
class Verdict:
    """What so many clusters say about a claim of the form "the effect is above 0"."""

    verdict: str
    """`holds`, `practically equal`, `does not hold` or `not resolved`."""
    effect: float
    low: float
    high: float
    """95 % over clusters; infinite for a single one."""
    margin: float
    clusters: int
    spread: float
    """Standard deviation of the clusters' effects."""
    power: float
    """The chance that so many clusters show an effect as large as the margin (95 %, two-sided)."""
    clusters_needed: int | None
    """Clusters for a power of 0.8; None if more than 10,000, or if the spread is not known."""


def judge(effects: Sequence[float], *, margin: float) -> Verdict:
    """The verdict on "the mean effect is above 0".

    Args:
        effects: one a cluster.
        margin: the largest effect that does not matter, > 0, in the effects' unit, fixed before they were seen.

    Raises:
        ValueError: no effect, one that is not finite, or a margin that is not above 0.
    """
    values = np.asarray(effects, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"judge: effects are {list(effects)}. Give one finite number a cluster.")
    if not margin > 0:
        raise ValueError(f"judge: margin={margin}. Give the largest effect that does not matter.")
    count, mean = len(values), float(values.mean())
    if count == 1:
        return Verdict("not resolved", mean, -math.inf, math.inf, margin, 1, math.nan, 0.0, None)
    spread = float(values.std(ddof=1))
    stderr = spread / math.sqrt(count)
    half = _quantile(CONFIDENCE, count) * stderr
    equal = abs(mean) + _quantile(2 * CONFIDENCE - 1, count) * stderr < margin
    low, high = mean - half, mean + half
    word = "practically equal" if equal else _word(low, high)
    return Verdict(
        word, mean, low, high, margin, count, spread, power_of(margin, spread, count),
        clusters_needed(margin, spread),
    )  # fmt: skip


def _word(low: float, high: float) -> str:
    return "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"


def power_of(effect: float, spread: float, clusters: int) -> float:
    """The chance that a t test over `clusters` shows an effect of that size (95 %, two-sided; noncentral t)."""
    if spread == 0:
        return 1.0
    critical, shift = _quantile(CONFIDENCE, clusters), effect / spread * math.sqrt(clusters)
    if shift > critical + FAR:  # scipy's noncentral t is not defined that far out
        return 1.0
    shape = (clusters - 1, shift)
    return float(stats.nct.sf(critical, *shape) + np.nan_to_num(stats.nct.cdf(-critical, *shape)))


def clusters_needed(effect: float, spread: float) -> int | None:
    """The smallest number of clusters with a power of 0.8 for `effect`; None if it is over 10,000."""
    counts = range(2, MAX_CLUSTERS + 1)
    at = bisect_left(counts, POWER, key=lambda count: power_of(effect, spread, count))
    return counts[at] if at < len(counts) else None


def _quantile(confidence: float, clusters: int) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, clusters - 1))
