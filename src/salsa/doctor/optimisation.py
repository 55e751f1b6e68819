"""Gates of the optimiser: does it move, too far, and in the direction of the score."""

import math
from collections.abc import Sequence

import numpy as np

from salsa.doctor.evidence import RLRun
from salsa.doctor.findings import SUSPICIOUS, Finding, Verdict, p_mean_above


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
    """How far one update moves the policy: KL(old ‖ new) per token against the entropy of the policy at the start.

    The clip bounds a ratio at 1 ± ε, a KL of ε²/2. Faulty where one update moved by more nats per token than the policy
    had: it knows nothing any more of what it said. Suspicious where a quarter of that is gone in one update, or more
    than 0.4 of the tokens are clipped (the alarm's bound).
    """
    found = {}
    for run in runs:
        rows = [row for row in run.rows if "approx_kl" in row]
        if rows and rows[0]["entropy"] > 0:
            steps = np.array([row["approx_kl"] for row in rows]) / rows[0]["entropy"]
            clips = np.array([row["clip_fraction"] for row in rows])
            found[run.name] = (
                float(steps.max()),
                float(clips.max()),
                run.config.get("clip_range", 0.2),
            )
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


def improves(runs: Sequence[RLRun]) -> Finding | None:
    """Whether the score rises from the first to the last third of each run (one-sided t tests over runs).

    Never faulty: too short a run does not rise either.
    """
    rises = []
    for run in runs:
        scores = [row["score"] for row in run.rows]
        third = max(len(scores) // 3, 1)
        if len(scores) >= 3:
            rises.append(float(np.mean(scores[-third:]) - np.mean(scores[:third])))
    if not rises:
        return None
    values, error = np.array(rises), 0.0
    if len(values) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
        fell = p_mean_above(-values) < SUSPICIOUS
        flat = p_mean_above(values) > SUSPICIOUS
    else:
        fell, flat = bool(values[0] < 0), False
    verdict: Verdict = "suspicious" if fell or flat else "sound"
    word = "falls" if fell else "rises" if not flat else "rises by no more than its noise"
    return Finding(
        "optimisation",
        "score",
        verdict,
        f"The score {word}: {values.mean():+.3f} from the first to the last third of the runs (± {error:.3f}).",
        ""
        if verdict == "sound"
        else "More updates or larger rollouts; if it falls, look at the findings above first.",
        {"rise": float(values.mean()), "standard error": error},
    )
