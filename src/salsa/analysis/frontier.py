"""Reward against KL over β, and an arm minus the baseline where both have spent the same KL.

The same β is another constraint once the reference moves, so arms are compared at equal KL to one yardstick. An
arm's frontier is the path of its trained policies in the plane of KL and reward, from its init model (β = ∞) down to
its smallest β. Between two neighbours both ends are mixed with the weights that make √KL linear: near the init model
the reward grows with the square root of the KL (Gao, Schulman and Hilton 2023, arXiv 2210.10760), so a chord in the KL
itself lies below what training would reach there, and the arm with the coarser grid of β would lose by its grid. Far
from 0 both agree; `chord` in the result is the same difference with the chord, and where the two disagree a β between
is missing.

A comparison stays within the KL that both arms reached; nothing is extrapolated. Where a path turns back, the policy
at the smaller β counts, as in a forecast. KL in nats per response, rewards in their own unit, win rates in points over
50.

The unit is the cluster: an SFT pair with its reward model. Each gives one effect, with an interval over its prompts by
a bootstrap; `verdicts.judge` has the last word over the clusters. Numpy and scipy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from salsa.analysis.paths import START, ArmPath, Policy, check, gather
from salsa.evaluate.results import rounded
from salsa.evaluate.winrate import cochran_cox, three_level_mean
from salsa.runtime.tracking import round_metric

BOOTSTRAPS = 1000
"""Resamples of the clusters and the prompts."""
MIN_REACHED = 0.9
"""The share of the resamples that must have the level, or the cluster is left out."""
SQRT, LINEAR = 0.5, 1.0
"""Powers of the KL that are linear between two policies."""
GAUSS = tuple(zip(*np.polynomial.legendre.leggauss(2), strict=True))
"""(place in [−1, 1], weight): exact for cubics, which what is integrated is between two policies."""


def frontier(
    policies: Sequence[Policy],
    baseline: str,
    yardstick: str,
    *,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, Any]:
    """The frontiers of all arms by one yardstick, and every arm minus the baseline at equal KL.

    Clusters in which an arm or a β is missing that others have are left out, and named in `incomplete`.

    Args:
        policies: of runs that differ in their cluster and in β only; init models have β = START.
        baseline: the arm that the others are compared with.
        yardstick: a column, `kl_own` or `kl_to_<model>`; arms that were not measured by it are left out.
        bootstraps: resamples.

    Returns:
        `arms` (`points` over β, `training`, `parted`), `matched` (over the clusters) and `rows` (a row a cluster).

    Raises:
        DataError: other prompts or another reward in one frontier, fewer than 20 prompts, no complete cluster.
    """
    check(policies)
    clusters, incomplete, paths = gather(policies, yardstick)
    scores = list(policies[0].rewards)
    count = len(policies[0].prompts)
    rng = np.random.default_rng(0)
    weights = _resampled(rng, count, bootstraps)
    multiples = _resampled(rng, len(clusters), bootstraps)
    matched, rows = [], []
    for arm, path in paths.items():
        if arm != baseline and baseline in paths:
            pair = _Pair(arm, baseline, path, paths[baseline])
            over, of_each = _at_equal_kl(pair, clusters, yardstick, scores, weights, multiples)
            matched += over
            rows += of_each
    return {
        "yardstick": yardstick,
        "title": title(yardstick),
        "clusters": clusters,
        "incomplete": incomplete,
        "num_prompts": count,
        "scores": scores,
        "arms": {
            arm: {
                "points": _points(path, yardstick, scores),
                "training": _training(
                    [p for p in policies if p.arm == arm and p.cluster in clusters],
                    yardstick,
                    scores,
                ),
                "parted": _parted(path, yardstick, scores, weights, multiples),
            }
            for arm, path in paths.items()
        },
        "matched": matched,
        "rows": rows,
    }


@dataclass(frozen=True)
class _Pair:
    """An arm and the baseline."""

    arm: str
    baseline: str
    path: ArmPath
    other: ArmPath


def _at_equal_kl(
    pair: _Pair,
    clusters: Sequence[str],
    yardstick: str,
    scores: Sequence[str],
    weights: np.ndarray,
    multiples: np.ndarray,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(effects over the clusters, effects in each): at the KL of each of the baseline's β, and on average."""
    matched: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    count, betas = weights.shape[1], pair.other.betas
    for index in (*range(len(betas)), None):
        if index is not None and betas[index] == START:
            continue
        found = [
            _compare(_of(pair.path, c), _of(pair.other, c), yardstick, scores, index, weights)
            for c in range(len(clusters))
        ]
        named = {
            "subject": pair.arm,
            "baseline": pair.baseline,
            "at": f"equal {title(yardstick)}" + ("" if index is not None else ", average"),
            "beta": None if index is None else betas[index],
        }
        for measure in found[0].effects:
            rows += [
                named | {"cluster": cluster, "measure": measure} | one.row(measure, count)
                for cluster, one in zip(clusters, found, strict=True)
                if one.reached
            ]
            if any(one.reached for one in found):
                over = _over_clusters(found, measure, multiples, count)
                matched.append(named | {"measure": measure} | over)
    return matched, rows


def title(yardstick: str) -> str:
    """A yardstick's column in words."""
    model = yardstick.removeprefix("kl_to_")
    return "KL to own reference" if yardstick == "kl_own" else f"KL to {model}"


def positions(kl: np.ndarray, level: np.ndarray, power: float = SQRT) -> np.ndarray:
    """How a path's policies are mixed to spend `level`.

    Between neighbours i and i + 1 of the path the weights are 1 − t and t with t = (l^p − k_i^p)/(k_{i+1}^p − k_i^p).
    Of several such places the last of the path (the smallest β) counts.

    Args:
        kl: [resamples, policies], nats, in the path's order.
        level: [resamples, levels], nats.
        power: p; SQRT or LINEAR.

    Returns:
        Weights [resamples, levels, policies], which sum to 1; NaN where the path does not reach the level.
    """
    ends, at = np.maximum(kl, 0) ** power, (np.maximum(level, 0) ** power)[..., None]
    made = np.zeros((*level.shape, kl.shape[1]))
    if kl.shape[1] < 2:
        return np.full_like(made, np.nan)
    a, b = ends[:, None, :-1], ends[:, None, 1:]
    inside = (np.minimum(a, b) <= at) & (at <= np.maximum(a, b))
    last = kl.shape[1] - 2 - inside[..., ::-1].argmax(axis=-1, keepdims=True)
    ends = np.broadcast_to(ends[:, None], made.shape)
    near, far = (np.take_along_axis(ends, i, axis=-1) for i in (last, last + 1))
    step = np.where(far == near, 1.0, far - near)
    share = np.where(far == near, 1.0, (at - near) / step)
    np.put_along_axis(made, last, 1 - share, axis=-1)
    np.put_along_axis(made, last + 1, share, axis=-1)
    made[~inside.any(axis=-1)] = np.nan
    return made


@dataclass(frozen=True)
class _Found:
    """An arm minus the baseline in one cluster. Arrays: first the value of all prompts, then those of resamples."""

    effects: Mapping[str, np.ndarray]
    """Measure → [1 + resamples]; NaN where the level is not reached."""
    chord: Mapping[str, float]
    levels: tuple[float, float]
    """From which KL to which; the same for a single level."""

    @property
    def reached(self) -> bool:
        """Whether both arms have the level, in (nearly) all resamples too."""
        known = np.isfinite(next(iter(self.effects.values())))
        return bool(known[0]) and float(known.mean()) >= MIN_REACHED

    def row(self, measure: str, count: int) -> dict[str, float]:
        """Effect and 95 % interval over `count` prompts: ± t_{n−1} bootstrap standard errors."""
        values = self.effects[measure]
        half = float(stats.t.ppf(0.975, count - 1)) * float(np.nanstd(values[1:], ddof=1))
        effect = float(values[0])
        return {"effect": effect, "low": effect - half, "high": effect + half}


def _compare(
    own: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    yardstick: str,
    scores: Sequence[str],
    index: int | None,
    weights: np.ndarray,
) -> _Found:
    """One arm minus the baseline in one cluster, at the baseline's KL at β number `index`, or averaged over the KL.

    Args:
        own: the arm's column → [βs, seeds, prompts].
        other: the baseline's.
        yardstick: the column that is equal.
        scores: the columns that are compared.
        index: of the baseline's β; None for the mean over all KL that both reach (the area between the curves, over
            the width of that range).
        weights: of the prompts, [1 + resamples, prompts].
    """
    mean = {n: (weights @ own[n].mean(axis=1).T, weights @ other[n].mean(axis=1).T) for n in own}
    won = {score: _won(own[score], other[score], weights) for score in scores}

    def differences(power: float, rows: int) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
        """Measure → [rows], and the range of KL."""
        a, b = (kl[:rows] for kl in mean[yardstick])
        mine, theirs, shares, levels = _mixtures(a, b, index, power)
        effects: dict[str, np.ndarray] = {}
        for score in scores:
            a, b = (values[:rows] for values in mean[score])
            rate = np.einsum("rq,rqa,rqb,rab->r", shares, mine, theirs, won[score][:rows])
            effects[score] = np.einsum("rq,rqa,ra->r", shares, mine, a)
            effects[score] -= np.einsum("rq,rqb,rb->r", shares, theirs, b)
            effects[f"{score} win rate"] = 100 * (rate - 0.5)
        return effects, levels

    effects, levels = differences(SQRT, len(weights))
    chord, _ = differences(LINEAR, 1)
    return _Found(effects, {name: float(values[0]) for name, values in chord.items()}, levels)


def _mixtures(
    own: np.ndarray, other: np.ndarray, index: int | None, power: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
    """Both arms' weights [resamples, levels, policies], the levels' shares [resamples, levels], and the KL's ends.

    Over a range the levels are Gauss's between all neighbouring policies of both paths, in the power of the KL that is
    linear there, so that sums over them are integrals over the KL.
    """
    if index is not None:
        level = other[:, index : index + 1]
        theirs = np.zeros((*level.shape, other.shape[1]))
        theirs[..., index] = 1.0
        at = float(level[0, 0])
        return positions(own, level, power), theirs, np.ones(level.shape), (at, at)
    low = np.maximum(own.min(axis=1), other.min(axis=1))[:, None]
    high = np.minimum(own.max(axis=1), other.max(axis=1))[:, None]
    knots = np.sort(
        np.clip(np.concatenate([own, other], axis=1), low, np.maximum(low, high)), axis=1
    )
    knots = np.maximum(knots, 0) ** power
    middle, half = (knots[:, 1:] + knots[:, :-1]) / 2, (knots[:, 1:] - knots[:, :-1]) / 2
    places = np.concatenate([middle + half * x for x, _ in GAUSS], axis=1)
    dense = places ** (1 / power - 1) / power  # dKL for a step of KL^power
    shares = np.concatenate([half * w for _, w in GAUSS], axis=1) * dense
    total = shares.sum(axis=1, keepdims=True)
    shares = np.divide(
        shares, total, out=np.full_like(shares, np.nan), where=(total > 0) & (low < high)
    )
    level = places ** (1 / power)
    mine, theirs = positions(own, level, power), positions(other, level, power)
    empty = shares == 0  # between equal knots there is nothing, and nothing may be reached
    mine[empty], theirs[empty] = 0.0, 0.0
    return mine, theirs, shares, (float(low[0, 0]), float(high[0, 0]))


def _won(own: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of wins, ties ½, of every pair of policies; the k-th seed meets the k-th: [resamples, βs, βs]."""
    a, b = own[:, None], other[None]
    if a.shape[2] != b.shape[2]:  # arms with other numbers of seeds: everyone meets everyone
        a, b = a[:, :, :, None], b[:, :, None]
        outcome = ((a > b) + 0.5 * (a == b)).mean(axis=(2, 3))
    else:
        outcome = ((a > b) + 0.5 * (a == b)).mean(axis=2)
    return np.einsum("rp,abp->rab", weights, outcome)


def _over_clusters(
    found: Sequence[_Found], measure: str, multiples: np.ndarray, count: int
) -> dict[str, Any]:
    """The mean over the clusters that reach the level, with two intervals.

    `low`, `high`: as `winrate.nested_mean`; the prompts' part is the mean covariance between clusters of their
    bootstrap estimates, which share the resampled prompts. `bootstrap`: 2.5 to 97.5 % of the means when clusters and
    prompts are both resampled.
    """
    inside = [i for i, one in enumerate(found) if one.reached]
    values = np.array([found[i].effects[measure] for i in inside])
    resampled = values[:, 1:]
    resampled = np.where(np.isfinite(resampled), resampled, np.nanmean(resampled, axis=1)[:, None])
    total = len(inside)
    effect = float(values[:, 0].mean())
    low: float | None = None
    high: float | None = None
    spread: list[float] | None = None
    if total > 1:
        v_clusters = float(values[:, 0].var(ddof=1)) / total
        of_mean = float(resampled.mean(axis=0).var(ddof=1))
        alone = float(resampled.var(axis=1, ddof=1).sum()) / total**2
        v_prompts = max(0.0, (of_mean - alone) * total / (total - 1))
        made = cochran_cox(effect, (v_clusters, v_prompts), (total - 1, count - 1), 0.95)
        low, high = round_metric(made.low), round_metric(made.high)
        times = multiples[1:, inside]
        shares = times.sum(axis=1)
        drawn = (times * resampled.T).sum(axis=1)[shares > 0] / shares[shares > 0]
        spread = [round_metric(float(q)) for q in np.quantile(drawn, [0.025, 0.975])]
    levels = [float(np.mean([found[i].levels[end] for i in inside])) for end in (0, 1)]
    average = levels[0] != levels[1]
    return {
        "levels": [round_metric(level) for level in levels],
        "effect": round_metric(effect),
        "low": low,
        "high": high,
        "bootstrap": spread,
        "chord": round_metric(float(np.mean([found[i].chord[measure] for i in inside]))),
        "area": round_metric(effect * (levels[1] - levels[0])) if average else None,
        "clusters": total,
        "left_out": len(found) - total,
    }


def _points(path: ArmPath, yardstick: str, scores: Sequence[str]) -> list[dict[str, Any]]:
    """A row a β: means with intervals over clusters, seeds and prompts (`winrate.nested_mean`)."""
    return [
        {"beta": None if beta == START else beta}
        | {
            ("kl" if name == yardstick else name): rounded(
                three_level_mean(path.columns[name][:, number])
            )
            for name in (yardstick, *scores)
        }
        for number, beta in enumerate(path.betas)
    ]


def _training(
    policies: Sequence[Policy], yardstick: str, scores: Sequence[str]
) -> list[dict[str, Any]]:
    """A row a β and update at which the KL was logged: means over clusters and seeds, on training prompts."""
    column = "kl" if yardstick == "kl_own" else yardstick
    names = {column: "kl", "score": scores[0]} | {score: score for score in scores[1:]}
    steps: dict[tuple[float, float], list[Mapping[str, float]]] = {}
    for policy in policies:
        for row in policy.curve:
            if column in row and all(name in row for name in names):
                steps.setdefault((policy.beta, row["step"]), []).append(row)
    return [
        {"beta": beta, "step": step}
        | {to: round_metric(float(np.mean([r[name] for r in rows]))) for name, to in names.items()}
        for (beta, step), rows in sorted(steps.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def _parted(
    path: ArmPath,
    yardstick: str,
    scores: Sequence[str],
    weights: np.ndarray,
    multiples: np.ndarray,
) -> list[dict[str, Any]]:
    """Where every held-out score leaves the trained one on the mean path of an arm.

    They part if the best held-out score lies at a smaller KL than the best trained one: `kl` is that KL, and `lost`
    what the held-out score loses from there to the best trained one. `share`: in how many resamples of clusters and
    prompts they part. The best of noisy means is flattered, so a share near one half says nothing.
    """
    mean = {
        name: np.einsum("rc,rp,ckp->rk", multiples, weights, path.columns[name].mean(axis=2))
        for name in (yardstick, *scores)
    }
    kl, every = mean[yardstick], np.arange(len(weights))
    best = {score: mean[score].argmax(axis=1) for score in scores}
    rows = []
    for score in scores[1:]:
        own, proxy = best[score], best[scores[0]]
        parted = kl[every, own] < kl[every, proxy]
        lost = mean[score][0, own[0]] - mean[score][0, proxy[0]]
        rows.append(
            {
                "score": score,
                "kl": round_metric(float(kl[0, own[0]])) if parted[0] else None,
                "best_kl": round_metric(float(kl[0, own[0]])),
                f"best_{scores[0]}_kl": round_metric(float(kl[0, proxy[0]])),
                "lost": round_metric(float(lost)),
                "share": round_metric(float(parted[1:].mean())) if len(parted) > 1 else None,
            }
        )
    return rows


def _of(path: ArmPath, cluster: int) -> dict[str, np.ndarray]:
    return {name: values[cluster] for name, values in path.columns.items()}


def _resampled(rng: np.random.Generator, count: int, times: int) -> np.ndarray:
    """Weights [1 + times, count] that sum to 1: equal ones, then those of resamples."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=times) / count
    return np.concatenate([np.full((1, count), 1 / count), drawn])
