"""Gates of the critic: where it starts, whether it learns, what it explains."""

from collections.abc import Sequence

import numpy as np

from salsa.doctor.evidence import Episodes, RLRun
from salsa.doctor.findings import SUSPICIOUS, Finding, Verdict, p_mean_above
from salsa.doctor.reward import same_limit
from salsa.doctor.rollout import gap

FEW = 6
"""Updates below which a t test of the explained variance could hardly say anything."""


def start(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether the first values are those of the model that the critic starts from, before each token is chosen."""
    known = [e for e in episodes if "values" in e.again]
    if not known:
        return None
    gaps = {}
    for one in known:
        spread = float(np.concatenate(list(one.again["values"])).std())
        gaps[id(one)] = gap(one.values, one.again["values"]) / max(spread, 1e-9)
    off = max(known, key=lambda e: gaps[id(e)])
    value = gaps[id(off)]
    limit = same_limit(off.precision)
    verdict: Verdict = "faulty" if value > limit else "sound"
    says = f"{off.run}: the first values and those computed anew differ by {value:.2g} of their spread."
    if verdict == "faulty" and off.late_values is not None:
        spread = float(np.concatenate(list(off.late_values)).std())
        if gap(off.values, off.late_values) / max(spread, 1e-9) <= limit:
            says += " They are read off one position late, where the token is known already."
    return Finding(
        "critic",
        "start",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "V(x, y_<t) is read off the hidden state before token t: look at the positions, "
        "and at what the critic is loaded from.",
        {"difference": value},
    )


def trained(runs: Sequence[RLRun]) -> Finding | None:
    """Whether the critic's weights moved."""
    known = [run for run in runs if run.critic_moved is not None]
    if not known:
        return None
    still = [run.name for run in known if not run.critic_moved]
    return Finding(
        "critic",
        "trained",
        "faulty" if still else "sound",
        f"{still[0]}: the critic ended as it started."
        if still
        else "Its weights moved in every run.",
        ""
        if not still
        else "No step reached the critic: look at its optimizer, its gradients and at "
        "rl.critic_learning_rate.",
        {"unmoved": float(len(still))},
    )


def explained(runs: Sequence[RLRun]) -> Finding | None:
    """Explained variance over the second half of each run, all runs together (one-sided t test above 0).

    Never faulty: PPO with a critic that explains nothing is REINFORCE with more noise, and may learn.
    """
    halves = [
        [row["explained_variance"] for row in run.rows[len(run.rows) // 2 :]]
        for run in runs
        if run.rows and "explained_variance" in run.rows[0]
    ]
    means = np.array([np.mean(half) for half in halves])
    if not len(means):
        return None
    values = np.array([value for half in halves for value in half])
    few = len(values) < FEW and means.mean() > 0
    useful = few or p_mean_above(values) < SUSPICIOUS
    return Finding(
        "critic",
        "explained variance",
        "sound" if useful else "suspicious",
        f"It explains {means.mean():.2f} of the returns' variance in the second half of the runs.",
        ""
        if useful
        else "A higher rl.critic_learning_rate, rl.critic_warmup, or more updates; rloo needs no critic.",
        {"mean": float(means.mean()), "worst run": float(means.min())},
    )
