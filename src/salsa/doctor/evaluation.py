"""Gates of the evaluation: are its numbers those of the models, and which effect could it see at all."""

import math
from collections.abc import Sequence

import numpy as np

from salsa.doctor.evidence import Samples
from salsa.doctor.findings import POWER_Z, SUSPICIOUS, Finding, Verdict, p_mean_above, percent
from salsa.doctor.reward import explain_scores, same_limit, score_gap


def scores(samples: Sequence[Samples], precision: str) -> Finding | None:
    """Whether the scores in the samples are what the reward model on disk gives those replies."""
    known = [s for s in samples if s.proxy_again is not None]
    if not known:
        return None
    recorded = {s.arm: _head(s) for s in known}
    gaps = {s.arm: score_gap(recorded[s.arm], s.proxy_again) for s in known}
    off = max(known, key=lambda s: gaps[s.arm])
    limit = same_limit(precision)
    verdict: Verdict = "faulty" if gaps[off.arm] > limit else "sound"
    says = f"Scores of {off.arm} in the samples and computed anew differ by {percent(gaps[off.arm])} of their spread."
    if verdict == "faulty":
        lengths = off.columns["length"][0][: len(recorded[off.arm])].tolist()
        says += f" {explain_scores(recorded[off.arm], off.proxy_again, {}, lengths)}"
    return Finding(
        "evaluation",
        "scores",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "Evaluation scored something else than RL did: look at what is passed to the "
        "reward and in what order.",
        {"difference": gaps[off.arm]},
    )


def paired(samples: Sequence[Samples]) -> Finding | None:
    """Whether every arm answered the same prompts, and the arm that the KL is measured to has a KL of 0."""
    if not samples:
        return None
    different = [s.arm for s in samples if list(s.prompts) != list(samples[0].prompts)]
    before = next((s for s in samples if not s.trained), None)
    own = [v for k, v in before.columns.items() if k.startswith("kl_to_")][:1] if before else []
    apart = bool(own) and float(np.abs(own[0]).max()) > 0
    negative = [
        s.arm
        for s in samples
        for k, v in s.columns.items()
        if k.startswith("kl") and v.mean() < -1e-3
    ]
    verdict: Verdict = "faulty" if different or apart or negative else "sound"
    says = "Every arm answered the same prompts."
    if different:
        says = f"{different[0]} answered other prompts than {samples[0].arm}: their difference is no paired one."
    elif apart:
        says = "The KL of the model that arms are measured to, to itself, is not 0."
    elif negative:
        says = f"The exact KL of {negative[0]} is negative."
    todo = "" if verdict == "sound" else "See that every arm is evaluated with the same recipe."
    return Finding(
        "evaluation", "paired", verdict, says, todo, {"prompts": float(len(samples[0].prompts))}
    )


def power(samples: Sequence[Samples], baseline: str) -> Finding | None:
    """The smallest difference from the baseline that such an evaluation sees with power 0.8: 2.8 standard errors.

    Suspicious where RL itself, baseline against the model before it, had no effect as large: then no difference between
    arms, which is a part of that, could have been seen.
    """
    base = next((s for s in samples if s.arm == baseline), None)
    before = next((s for s in samples if not s.trained), None)
    others = [s for s in samples if s.trained and s.arm != baseline and "proxy" in s.columns]
    if base is None or before is None or not others or "proxy" not in base.columns:
        return None
    gain = (base.columns["proxy"] - before.columns["proxy"]).mean(axis=0)
    seen = {s.arm: POWER_Z * _error(s.columns["proxy"] - base.columns["proxy"]) for s in others}
    arm = max(seen, key=seen.__getitem__)
    sd = float(base.columns["proxy"].std()) or 1.0
    enough = gain.mean() > seen[arm] and p_mean_above(gain) < SUSPICIOUS
    return Finding(
        "evaluation",
        "power",
        "sound" if enough else "suspicious",
        f"{arm} against {baseline}: only a difference of {seen[arm]:.3f} ({seen[arm] / sd:.2f} standard deviations "
        f"of a score) is seen with power 0.8; RL itself gained {gain.mean():+.3f}.",
        ""
        if enough
        else "“Not resolved” says nothing here. More rl.seeds narrow the interval fastest, then more "
        "held-out prompts; or train longer.",
        {
            "smallest difference": seen[arm],
            "in standard deviations": seen[arm] / sd,
            "gain of RL": float(gain.mean()),
        },
    )


def _head(one: Samples) -> np.ndarray:
    assert one.proxy_again is not None
    return one.columns["proxy"][0][: len(one.proxy_again)]


def _error(differences: np.ndarray) -> float:
    """Standard error of the mean of [seeds, prompts]: over prompts or over seeds, the larger, as the report has it."""
    prompts = differences.mean(axis=0)
    errors = [prompts.std(ddof=1) / math.sqrt(len(prompts)) if len(prompts) > 1 else math.inf]
    if len(differences) > 1:
        seeds = differences.mean(axis=1)
        errors.append(seeds.std(ddof=1) / math.sqrt(len(seeds)))
    return float(max(errors))
