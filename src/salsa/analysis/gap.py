"""What training reached of what its reference allows: trained arms against the optimum of the forecast.

Of all policies with KL(π ‖ ρ) = κ the one with the largest E[r] is ρ's tilted one (analysis/forecast.py). So for an arm
whose reference ρ stands still,

    gap   = E_π*[r] − E_arm[r]                                  at the arm's own κ; below 0 by noise alone
    share = (E_arm[r] − E_ρ[r]) / (E_π*[r] − E_ρ[r])            the part of the possible gain that was reached

in the reward that was optimised. Numpy and scipy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from salsa.runtime.tracking import round_metric


@dataclass(frozen=True)
class Agreement:
    """Whether what was forecast orders what was reached."""

    tau: float
    """Kendall's τ-b, −1 … 1."""
    p_value: float
    """Of τ = 0, two-sided, exact for few points."""
    same_sign: float
    """The share of points where both are above 0, or both below."""
    count: int


def gaps(forecast: Mapping[str, Any], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every trained arm whose reference was forecast.

    Args:
        forecast: content of `forecast.json`.
        report: content of `report.json`, of the same held-out prompts.

    `kl` is the arm's mean KL to its reference in nats per response; `optimum`, `gap` and `share` are None where the
    forecast's replies are too few to know the optimum at that KL.
    """
    reward, rows = forecast["scores"][0], []
    for name, arm in report["arms"].items():
        reference = arm["reference"]
        if not arm["trained"] or reference not in forecast["frontiers"]:
            continue
        kl, reached = (arm["mean"][key]["mean"] for key in ("kl_reference", reward))
        optimum = _at(forecast["frontiers"][reference], kl, reward)
        row = {"arm": name, "reference": reference, "kl": kl, "reached": reached}
        row |= {"optimum": optimum, "gap": None, "share": None}
        if optimum is not None:
            start = forecast["best_of"][reference][0]["columns"][reward]["mean"]
            row["gap"] = round_metric(optimum - reached)
            row["share"] = round_metric((reached - start) / (optimum - start))
        rows.append(row)
    return rows


def agreement(forecast: Sequence[float], reached: Sequence[float]) -> Agreement:
    """Of effects that were forecast and the same effects after training, a value a point (cluster, arm, β).

    Raises:
        ValueError: fewer than three points, or not as many of one as of the other.
    """
    if len(forecast) != len(reached) or len(forecast) < 3:
        raise ValueError(
            f"agreement: {len(forecast)} forecasts and {len(reached)} results. Give three or more of each."
        )
    test = stats.kendalltau(forecast, reached)
    same = float(np.mean(np.sign(forecast) == np.sign(reached)))
    return Agreement(float(test.statistic), float(test.pvalue), same, len(forecast))


def _at(frontier: Sequence[Mapping[str, Any]], kl: float, reward: str) -> float | None:
    """The optimal reward at a KL to the reference, interpolated between neighbouring β; None outside of those known."""
    known = [row["columns"] for row in frontier if "columns" in row]
    kls = [columns["kl_own"]["mean"] for columns in known]  # falls as β rises
    if not kls or not min(kls) <= kl <= max(kls):
        return None
    rewards = [columns[reward]["mean"] for columns in known]
    return round_metric(float(np.interp(kl, kls[::-1], rewards[::-1])))
