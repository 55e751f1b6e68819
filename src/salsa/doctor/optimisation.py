"""Gates of the optimiser: does it move, too far, and in the direction of the score."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from salsa.doctor.evidence import RLRun
from salsa.doctor.findings import SUSPICIOUS, Finding, Verdict


def moved(runs: Sequence[RLRun]) -> Finding | None:
    """Whether the policy's weights moved, and no gradient was 0."""
    known = [run for run in runs if run.policy_moved is not None]
    if not known:
        return None
    still = [run.name for run in known if not run.policy_moved]
    dead = [run.name for run in known if any(row.get("grad_norm", 1.0) == 0 for row in run.rows)]
    verdict: Verdict = "faulty" if still else "suspicious" if dead else "sound"
    says = "Its weights moved in every run, and no gradient was 0."
    if still:
        says = f"{still[0]}: the policy ended as it started."
    elif dead:
        says = f"{dead[0]}: an update had no gradient."
    return Finding(
        "optimisation",
        "policy moves",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "Look at what requires a gradient, at the optimizer's step, and whether all "
        "scores of a rollout are equal.",
        {"unmoved": float(len(still)), "without gradient": float(len(dead))},
    )


def step_size(runs: Sequence[RLRun]) -> Finding | None:
    """How far one update moves the policy, per token, against the policy's entropy at the start.

    The clip bounds a ratio at 1 ± ε, a KL of ε²/2. Faulty where one update moved by more nats per token than the policy
    had: it knows nothing any more of what it said. Suspicious where a quarter of that is gone in one update, or more
    than 0.4 of the tokens are clipped (the alarm's bound).
    """
    found = {}
    for run in runs:
        if run.rows and run.rows[0]["entropy"] > 0:
            step = max(_within(run), _between(run)) / run.rows[0]["entropy"]
            clips = [row.get("clip_fraction", 0.0) for row in run.rows]
            found[run.name] = (step, max(clips), float(run.config["clip_range"]))
    if not found:
        return None
    name = max(found, key=lambda key: found[key][0])
    step, clip, bound = found[name]
    verdict: Verdict = (
        "faulty" if step > 1 else "suspicious" if step > 0.25 or clip > 0.4 else "sound"
    )
    return Finding(
        "optimisation",
        "step size",
        verdict,
        f"{name}: its largest update moved the policy by {step:.2g} of its entropy, and {clip:.0%} of the tokens were "
        f"clipped (ε = {bound:g}).",
        ""
        if verdict == "sound"
        else "Lower rl.learning_rate or rl.num_epochs, or raise rl.rollout_size.",
        {"largest step": step, "largest clip fraction": clip},
    )


def _within(run: RLRun) -> float:
    """Largest KL(old ‖ new) per token within an update, as its optimizer steps saw it.

    The first step of an update sees the policy as it was, so the mean of n steps is one of n − 1.
    """
    size = int(run.config["rollout_size"])
    count = int(run.config["num_epochs"]) * size / int(run.config["minibatch_size"] or size)
    if count < 2:
        return 0.0
    return max(row.get("approx_kl", 0.0) for row in run.rows) * count / (count - 1)


def _between(run: RLRun) -> float:
    """Largest rise of the KL to the reference from one update to the next, per token, less three standard errors."""
    pairs = list(zip(run.rows, run.rows[1:], strict=False)) if run.pulls else []
    return max(
        (
            (now["kl"] - before["kl"] - 3 * math.hypot(now["kl_stderr"], before["kl_stderr"]))
            / now["length"]
            for before, now in pairs
            if now["length"] > 0
        ),
        default=0.0,
    )


def improves(runs: Sequence[RLRun]) -> Finding | None:
    """Whether the score rises from the first to the last third of the runs (z test with the rollouts' own noise).

    Never faulty: too short a run does not rise either.
    """
    rises, variances = [], []
    for run in runs:
        third = len(run.rows) // 3
        if third:
            first, last = run.rows[:third], run.rows[-third:]
            batch = int(run.config["rollout_size"])
            mean = lambda rows, name: float(np.mean([row[name] for row in rows]))
            rises.append(mean(last, "score") - mean(first, "score"))
            noise = sum(row["score_std"] ** 2 for row in (*first, *last))
            variances.append(noise / batch / third**2)
    if not rises:
        return None
    rise, error = float(np.mean(rises)), math.sqrt(sum(variances)) / len(rises)
    fell = stats.norm.cdf(rise / max(error, 1e-12)) < SUSPICIOUS
    rose = stats.norm.sf(rise / max(error, 1e-12)) < SUSPICIOUS
    word = "rises" if rose else "falls" if fell else "does not change beyond its noise"
    return Finding(
        "optimisation",
        "score",
        "sound" if rose else "suspicious",
        f"The score {word}: {rise:+.3f} ± {error:.3f} from the first to the last third of the runs.",
        ""
        if rose
        else "More updates or larger rollouts; if it falls, look at the findings above first.",
        {"rise": rise, "standard error": error},
    )
