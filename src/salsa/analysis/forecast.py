"""What a reference is worth at the optimum, before any RL.

For a reference ρ, a reward r and a KL coefficient β the best policy is π*(y|x) ∝ ρ(y|x)·exp(r(x, y)/β), and its value
E_π*[r] − β·KL(π* ‖ ρ) is β·log E_ρ[exp(r/β)] (Gibbs' variational principle). So K replies of ρ, weighted by exp(r/β),
are replies of π* (self-normalised importance sampling), and with Z = E_ρ[exp(r/β)]

    E_π*[f]    = E_ρ[f·exp(r/β)] / Z
    KL(π* ‖ ρ) = E_π*[r]/β − log Z
    KL(π* ‖ q) = KL(π* ‖ ρ) + E_π*[log ρ(y|x) − log q(y|x)]

per prompt, in nats per response. The bias of order 1/K is taken out by the jackknife over replies. Few replies carry
all the weight where β is small; a β is silent unless nine of ten prompts have an effective sample size of MIN_ESS.

What RL reaches, against this, is the optimiser's share. Numpy only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import gammaln

from salsa.artifacts import read_jsonl
from salsa.errors import DataError
from salsa.evaluate.results import rounded
from salsa.evaluate.winrate import Estimate, clustered_mean
from salsa.runtime.tracking import round_metric

MIN_ESS = 20.0
"""The effective sample size below which nothing is said."""
BOOTSTRAPS = 1000
"""Resamples of the prompts behind the intervals at a matched level."""
BEST_OF = (1, 2, 4, 8, 16, 32, 64)

Table = Mapping[str, np.ndarray]
"""Column → values [prompts, βs]."""


@dataclass(frozen=True)
class Replies:
    """K replies of one reference to each of n prompts; every array is [n, K]."""

    scores: Mapping[str, np.ndarray]
    """The first is the reward that would be optimised."""
    log_ratios: Mapping[str, np.ndarray]
    """Yardstick q → log ρ(y|x) − log q(y|x), in nats; 0 where q is ρ."""
    lengths: np.ndarray

    @property
    def reward(self) -> np.ndarray:
        """What the optimum is taken of."""
        return next(iter(self.scores.values()))


def read_replies(
    name: str,
    yardsticks: Sequence[str],
    replies: Path,
    scores: Path,
    logprobs: Mapping[str, Path],
) -> Replies:
    """The replies of the candidate `name` from its stages' directories.

    Args:
        name: the candidate; it is no yardstick of its own, its log-ratio is 0.
        yardsticks: the models that KL is measured to.
        replies: the directory of `replies.jsonl`.
        scores: of `scores.jsonl`.
        logprobs: every other yardstick → of `logprobs.jsonl`.
    """
    drawn = [row["replies"] for row in read_jsonl(replies / "replies.jsonl")]
    scored = read_jsonl(scores / "scores.jsonl")
    own = np.array([[reply["logprob"] for reply in row] for row in drawn])
    under = {
        model: np.array([row["logprobs"] for row in read_jsonl(path / "logprobs.jsonl")])
        for model, path in logprobs.items()
    } | {name: own}
    return Replies(
        scores={score: np.array([row[score] for row in scored]) for score in scored[0]},
        log_ratios={model: own - under[model] for model in yardsticks},
        lengths=np.array([[float(len(reply["ids"])) for reply in row] for row in drawn]),
    )


@dataclass(frozen=True)
class Tilted:
    """The optimum for every β, a row a prompt."""

    columns: Table
    """Scores, `length`, `value`, `kl_own` and `kl_to_<yardstick>`."""
    ess: np.ndarray
    """Effective sample size, [prompts, βs]."""

    @property
    def speaks(self) -> np.ndarray:
        """[βs]: whether nine of ten prompts have MIN_ESS."""
        return np.quantile(self.ess, 0.1, axis=0) >= MIN_ESS


def tilt(replies: Replies, betas: Sequence[float], *, jackknife: bool = True) -> Tilted:
    """π* of one reference for every β, estimated from its replies.

    Args:
        replies: of the reference.
        betas: KL coefficients, > 0.
        jackknife: take out the bias of order 1/K; without it the estimate is exact where the replies are all there are.
    """
    per_beta = [_tilt(replies, beta, jackknife) for beta in betas]
    columns = {
        name: np.stack([columns[name] for columns, _ in per_beta], axis=1)
        for name in per_beta[0][0]
    }
    return Tilted(columns, np.stack([ess for _, ess in per_beta], axis=1))


def _tilt(
    replies: Replies, beta: float, jackknife: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(column → [prompts], effective sample size [prompts]) at one β."""
    exponent = replies.reward / beta
    shift = exponent.max(axis=1, keepdims=True)
    weights = np.exp(exponent - shift)
    total, count = weights.sum(axis=1, keepdims=True), weights.shape[1]
    # The statistics of all replies in column 0, and of all but one in the others.
    kept = np.concatenate([total, total - weights], axis=1)
    counts = np.concatenate([[count], np.full(count, count - 1)])
    # Without the best reply, which may weigh more than all others together, a difference of sums has no digits left.
    best = np.arange(len(weights)), exponent.argmax(axis=1)
    without = best[0], best[1] + 1
    others = exponent.copy()
    others[best] = -np.inf
    second = others.max(axis=1)
    others = np.exp(others - second[:, None])
    kept[without] = others.sum(axis=1)

    def mean(values: np.ndarray) -> np.ndarray:
        parts = weights * values
        whole = parts.sum(axis=1, keepdims=True)
        sums = np.concatenate([whole, whole - parts], axis=1)
        sums[without] = (others * values).sum(axis=1)
        return sums / kept

    log_z = np.log(kept / counts) + shift
    log_z[without] += second - shift[:, 0]
    columns = {name: mean(values) for name, values in replies.scores.items()}
    columns["length"] = mean(replies.lengths)
    columns["value"] = beta * log_z
    columns["kl_own"] = mean(replies.reward) / beta - log_z
    for name, ratios in replies.log_ratios.items():
        columns[f"kl_to_{name}"] = columns["kl_own"] + mean(ratios)
    ess = total[:, 0] ** 2 / (weights**2).sum(axis=1)
    if not jackknife:
        return {name: both[:, 0] for name, both in columns.items()}, ess
    return {
        name: count * both[:, 0] - (count - 1) * both[:, 1:].mean(axis=1)
        for name, both in columns.items()
    }, ess


def best_of(replies: Replies, n: int) -> dict[str, np.ndarray]:
    """Column → [prompts]: the best by reward of n replies, without bias from all K.

    The j-th best of K is the best of n drawn without replacement with probability C(K − j, n − 1) / C(K, n). The KL to
    the reference is at most log n − (n − 1)/n (Beirami et al. 2024, arXiv 2401.01879).
    """
    count = replies.reward.shape[1]
    rank = np.arange(1, count - n + 2)
    chance = np.exp(_log_choose(count - rank, n - 1) - _log_choose(count, n))
    order = np.argsort(-replies.reward, axis=1, kind="stable")[:, : len(rank)]
    columns = {**replies.scores, "length": replies.lengths}
    return {
        name: (np.take_along_axis(values, order, axis=1) * chance).sum(axis=1)
        for name, values in columns.items()
    }


def best_of_kl(n: int) -> float:
    """The bound on KL(best of n ‖ ρ) in nats."""
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class Comparison:
    """A candidate minus the baseline, where both are equal in one thing."""

    candidate: str
    matched_by: str
    """`beta`, or the column that is equal: `kl_own`, `kl_to_base`, a score."""
    level: float
    """Of what is equal; it is the baseline's own at `beta`."""
    beta: float
    """The baseline's β."""
    candidate_beta: float
    """The β at which the candidate reaches the level."""
    differences: Mapping[str, Estimate]
    """Column → candidate − baseline, 95 % over prompts."""


def at_equal_beta(
    candidate: str, own: Tilted, other: Tilted, betas: Sequence[float], index: int
) -> Comparison:
    """Candidate minus baseline at the same β, paired by prompt, t interval."""
    prompts = range(len(own.ess))
    differences = {
        name: clustered_mean(own.columns[name][:, index] - other.columns[name][:, index], prompts)
        for name in own.columns
    }
    beta = betas[index]
    return Comparison(candidate, "beta", beta, beta, beta, differences)


def at_equal(
    candidate: str,
    by: str,
    own: Tilted,
    other: Tilted,
    betas: Sequence[float],
    index: int,
    rng: np.random.Generator,
) -> Comparison | None:
    """Candidate minus baseline where both have the baseline's `by` at β number `index`.

    The candidate's β is found on its mean curve over prompts, again in every bootstrap resample of the prompts (the
    same for both), and the interval is mean ± t·(bootstrap standard error). None if the candidate does not reach the
    level at any β for which there are samples enough.
    """
    count = len(own.ess)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=BOOTSTRAPS) / count
    weights = np.concatenate([np.full((1, count), 1 / count), weights])
    spoken = own.speaks
    names = list(own.columns)
    curves = {name: weights @ own.columns[name][:, spoken] for name in names}
    fixed = {name: weights @ other.columns[name][:, index] for name in names}
    logs = np.log(np.asarray(betas)[spoken])
    spends = by.startswith("kl_")
    at = [
        _crossing(row, level, spends=spends)
        for row, level in zip(curves[by], fixed[by], strict=True)
    ]
    if at[0] is None:
        return None
    reached = [(row, place) for row, place in enumerate(at) if place is not None]
    if len(reached) < 0.9 * len(at):
        return None
    differences = {}
    for name in names:
        values = np.array(
            [_between(curves[name][row], place) - fixed[name][row] for row, place in reached]
        )
        stderr = float(values[1:].std(ddof=1))
        half = float(stats.t.ppf(0.975, count - 1)) * stderr
        mean = float(values[0])
        differences[name] = Estimate(mean, stderr, mean - half, mean + half, count - 1)
    return Comparison(
        candidate,
        by,
        float(fixed[by][0]),
        float(betas[index]),
        math.exp(_between(logs, at[0])),
        differences,
    )


def forecast(
    replies: Mapping[str, Replies], betas: Sequence[float], wanted_beta: float
) -> dict[str, Any]:
    """Frontiers of every reference and what each is worth beside the first: the content of `forecast.json`.

    Args:
        replies: reference → its replies, to the same prompts; the first reference is the baseline.
        betas: KL coefficients.
        wanted_beta: the β that training would use. The references are compared there, or at the nearest larger β of
            `betas` for which all have samples enough; at an equal level, where the candidate can reach it as well.

    Raises:
        DataError: no β has samples enough; the message says how many are needed.
    """
    betas = sorted(betas)
    tilted = {name: tilt(own, betas) for name, own in replies.items()}
    baseline = next(iter(tilted))
    first = next(iter(replies.values()))
    num_prompts, num_samples = first.reward.shape
    index = _spoken_index(tilted, betas, wanted_beta, num_samples)
    yardsticks = [f"kl_to_{name}" for name in first.log_ratios]
    rng = np.random.default_rng(0)
    comparisons = []
    for name, own in tilted.items():
        if name == baseline:
            continue
        comparisons.append(at_equal_beta(name, own, tilted[baseline], betas, index))
        for by in (*yardsticks, "kl_own", *list(first.scores)[1:]):
            tried = (
                at_equal(name, by, own, tilted[baseline], betas, i, rng)
                for i in range(index, len(betas))
            )
            comparisons += islice((c for c in tried if c is not None), 1)
    return {
        "baseline": baseline,
        "references": list(replies),
        "scores": list(first.scores),
        "kl_to": list(first.log_ratios),
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "wanted_beta": wanted_beta,
        "beta": betas[index],
        "samples_for_wanted_beta": _samples_for(tilted, betas, wanted_beta, num_samples),
        "min_ess": MIN_ESS,
        "frontiers": {name: _frontier(own, betas) for name, own in tilted.items()},
        "best_of": {name: _best_of_rows(own) for name, own in replies.items()},
        "comparisons": [_comparison_row(c) for c in comparisons],
    }


def default_betas(kl_coef: float) -> list[float]:
    """25 β from a fifth of the recipe's to fifty times it, evenly spaced in log β; around 0.1 if it is 0."""
    middle = kl_coef or 0.1
    return [float(b) for b in np.geomspace(middle / 5, middle * 50, 25)]


def _spoken_index(
    tilted: Mapping[str, Tilted], betas: Sequence[float], wanted: float, num_samples: int
) -> int:
    speaks = np.all([own.speaks for own in tilted.values()], axis=0)
    fitting = [i for i, beta in enumerate(betas) if speaks[i] and beta >= wanted * (1 - 1e-9)]
    if not fitting:
        ess = min(float(np.quantile(own.ess[:, -1], 0.1)) for own in tilted.values())
        needed = math.ceil(num_samples * MIN_ESS / ess)
        raise DataError(
            f"forecast: {num_samples} replies a prompt are worth {ess:.1f} at β {betas[-1]:g}, and {MIN_ESS:g} are "
            f"needed. Set forecast.num_samples={needed} or more, or give larger forecast.betas."
        )
    return fitting[0]


def _samples_for(
    tilted: Mapping[str, Tilted], betas: Sequence[float], wanted: float, num_samples: int
) -> int:
    """Replies per prompt that the wanted β needs, if the effective share of them stays what it is."""
    nearest = int(np.argmin(np.abs(np.log(np.asarray(betas) / wanted)))) if wanted > 0 else 0
    ess = min(float(np.quantile(own.ess[:, nearest], 0.1)) for own in tilted.values())
    return (
        max(num_samples, math.ceil(num_samples * MIN_ESS / ess)) if ess < MIN_ESS else num_samples
    )


def _crossing(curve: np.ndarray, level: float, *, spends: bool) -> float | None:
    """Where, as a fractional index, `curve` (over rising β) meets `level`.

    A KL budget is spent: of several places the one at the smallest β counts, where the reward is largest. A score is
    reached where it costs least, at the largest β.
    """
    above = curve >= level
    places = np.flatnonzero(above[:-1] != above[1:])
    if not len(places):
        return None
    i = int(places[0] if spends else places[-1])
    return float(i + (level - curve[i]) / (curve[i + 1] - curve[i]))


def _between(curve: np.ndarray, place: float) -> float:
    low = min(int(place), len(curve) - 2)
    return float(curve[low] + (place - low) * (curve[low + 1] - curve[low]))


def _frontier(own: Tilted, betas: Sequence[float]) -> list[dict[str, Any]]:
    """A row for every β that speaks, means over prompts with intervals; for the others β and sample size alone."""
    prompts, rows = range(len(own.ess)), []
    for i, beta in enumerate(betas):
        row: dict[str, Any] = {
            "beta": round_metric(beta),
            "ess": round_metric(float(np.quantile(own.ess[:, i], 0.1))),
        }
        if own.speaks[i]:
            row["columns"] = {
                name: rounded(clustered_mean(values[:, i], prompts))
                for name, values in own.columns.items()
            }
        rows.append(row)
    return rows


def _best_of_rows(own: Replies) -> list[dict[str, Any]]:
    prompts, rows = range(len(own.reward)), []
    for n in BEST_OF:
        if n <= own.reward.shape[1] // 4:
            columns = {
                name: rounded(clustered_mean(values, prompts))
                for name, values in best_of(own, n).items()
            }
            rows.append({"n": n, "kl_bound": round_metric(best_of_kl(n)), "columns": columns})
    return rows


def _comparison_row(comparison: Comparison) -> dict[str, Any]:
    row = {k: round_metric(v) if isinstance(v, float) else v for k, v in vars(comparison).items()}
    differences = {name: rounded(e) for name, e in comparison.differences.items()}
    return row | {"differences": differences}


def _log_choose(n: Any, k: Any) -> Any:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
