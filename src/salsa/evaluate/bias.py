"""What a judge goes by besides quality: the place of an answer, and its length."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from salsa.evaluate.winrate import Estimate

SWAPPED = {"first": "second", "second": "first", "tie": "tie"}
"""The verdict by place that names the same winner once the answers have changed places."""


@dataclass(frozen=True)
class PositionBias:
    """How two games with swapped places agree."""

    games: int
    """Games with a verdict."""
    both: int
    """Comparisons where both games have a verdict."""
    consistent: int
    """Of those, comparisons where both games name the same winner, or both a tie."""
    first_wins: int
    second_wins: int
    consistency: float | None
    """Share of comparisons that survive the swap."""
    first_rate: float | None
    """Share of decisive games that the answer shown first won; ½ would be fair."""


@dataclass(frozen=True)
class LengthBias:
    """Lengths, and how often the longer answer wins."""

    mean_candidate: float
    mean_baseline: float
    longer_wins: int
    shorter_wins: int
    controlled: Estimate | None
    """The candidate's rate at equal length; None where the data cannot tell quality from length."""
    longer_rate: float | None
    """Share of decisive comparisons of unequal length that the longer answer won."""


def position_bias(games: Sequence[tuple[str | None, str | None]]) -> PositionBias:
    """Bias towards a place, from both games' verdicts by *place*: `first`, `second`, `tie` or None (no verdict).

    The answers change places between the games, so `first` then `second` is one consistent winner.
    """
    verdicts = [verdict for pair in games for verdict in pair if verdict is not None]
    both = [(one, two) for one, two in games if one is not None and two is not None]
    consistent = sum(one == SWAPPED[two] for one, two in both)
    first, second = verdicts.count("first"), verdicts.count("second")
    shares = _share(consistent, len(both)), _share(first, first + second)
    return PositionBias(len(verdicts), len(both), consistent, first, second, *shares)


def length_bias(
    outcome: Sequence[float],
    candidate: Sequence[float],
    baseline: Sequence[float],
    clusters: Sequence[Hashable],
) -> LengthBias:
    """Bias towards length, from outcomes (1 = the candidate won) and both answers' lengths."""
    won, longer = np.asarray(outcome), np.asarray(candidate) - np.asarray(baseline)
    decisive = (won != 0.5) & (longer != 0)
    num_decisive = int(decisive.sum())
    with_longer = int(((won > 0.5) == (longer > 0))[decisive].sum())
    return LengthBias(
        mean_candidate=float(np.mean(candidate)),
        mean_baseline=float(np.mean(baseline)),
        longer_wins=with_longer,
        shorter_wins=num_decisive - with_longer,
        controlled=length_controlled(outcome, longer, clusters),
        longer_rate=_share(with_longer, num_decisive),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def length_controlled(
    outcome: Sequence[float], length_difference: Sequence[float], clusters: Sequence[Hashable]
) -> Estimate | None:
    """The rate at equal length: logit P(win) = w0·tanh(z) + w1, z = length difference / its sd; returns σ(w1).

    A logistic regression with ties as ½; the interval is that of w1 (cluster-robust sandwich, t with G − 1 degrees of
    freedom) through σ. "Length-controlled", after Dubois et al. 2024 (arXiv 2404.04475), but not AlpacaEval's LC: that
    one also fits each prompt's difficulty. None where lengths do not vary, or length or the candidate alone separates
    wins from losses, so that the maximum lies at infinity.
    """
    y, difference = np.asarray(outcome, dtype=float), np.asarray(length_difference, dtype=float)
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    if len(names) < 3 or difference.std() == 0:
        return None
    x = np.stack([np.tanh(difference / difference.std()), np.ones(len(y))], axis=1)
    w = np.zeros(2)
    for _ in range(100):
        p = special.expit(x @ w)
        information = x.T @ (x * (p * (1 - p))[:, None])
        if not math.isfinite(np.linalg.cond(information)) or np.abs(w).max() > 15:
            return None
        step = np.linalg.solve(information, x.T @ (y - p))
        w = w + step
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None
    scores = np.zeros((len(names), 2))
    np.add.at(scores, [names[name] for name in clusters], x * (y - special.expit(x @ w))[:, None])
    inverse = np.linalg.inv(information)
    covariance = len(names) / (len(names) - 1) * inverse @ (scores.T @ scores) @ inverse
    stderr = math.sqrt(covariance[1, 1])
    half = float(stats.t.ppf(0.975, len(names) - 1)) * stderr
    rate, low, high = (float(special.expit(logit)) for logit in (w[1], w[1] - half, w[1] + half))
    return Estimate(rate, stderr * rate * (1 - rate), low, high, len(names) - 1)
