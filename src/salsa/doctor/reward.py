"""Gates of the reward: what it learned, and whether RL and the evaluation got the scores that it gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from salsa.doctor.evidence import Episodes, Reward, Samples
from salsa.doctor.findings import (
    FAULTY,
    SUSPICIOUS,
    Finding,
    Verdict,
    graded,
    p_above,
    p_below,
    percent,
)

LEARNABLE = 0.25
"""A reward model that has not learned a quarter of what there is to learn ranks replies mostly by chance."""
SAME = 0.02
"""Share of the scores' standard deviation by which two computations of a score may differ: bf16 keeps three digits of
it, fp32 seven."""
SAME_BF16 = 0.2
"""The same where the run computed in bf16, whose rounding adds up over the layers."""


def accuracy(reward: Reward | None) -> Finding | None:
    """Held-out accuracy (ties one half) against chance and against what the labels' noise allows (exact binomial).

    Faulty where it is below a quarter of the way from chance to what the noise allows, or where the very pairs that it
    was trained on are ranked worse than by chance.
    """
    if reward is None or not len(reward.held_out):
        return None
    right, total = _right(reward.held_out), len(reward.held_out)
    trained, ceiling = _right(reward.seen), reward.ceiling or 1.0
    least = 0.5 + LEARNABLE * (ceiling - 0.5)
    p_value = min(p_below(right, total, least), p_below(trained, len(reward.seen), 0.5))
    verdict: Verdict = "faulty" if p_value < FAULTY else "sound"
    if verdict == "sound" and p_above(right, total, 0.5) > SUSPICIOUS:
        verdict = "suspicious"
    limit = f"; the labels' noise allows for {percent(ceiling)}" if reward.ceiling else ""
    known = (
        f" The prompts of {reward.known_prompts} have other pairs that it was trained on: reward.holdout_prompts=true "
        "measures new prompts."
    )
    seen = trained / max(len(reward.seen), 1)
    return Finding(
        "reward",
        "held-out accuracy",
        verdict,
        f"{percent(right / total)} of {total} held-out pairs are ranked right ({percent(seen)} of those it was trained "
        f"on){limit}.{known if reward.known_prompts else ''}",
        ""
        if verdict == "sound"
        else "More pairs, more epochs or a higher reward.learning_rate. Below half, chosen "
        f"and rejected are exchanged somewhere. {total} held-out pairs tell accuracies "
        f"{percent(1.4 / np.sqrt(total))} apart.",
        {
            "accuracy": right / total,
            "on seen pairs": seen,
            "pairs": float(total),
            "allowed by noise": ceiling,
        },
    )


def calibration(reward: Reward | None) -> Finding | None:
    """Whether a difference of scores means what Bradley and Terry say: P(chosen) = σ(difference).

    The score test of slope 1: z = Σ d·(1 − σ(d)) / √Σ d²·σ(d)(1 − σ(d)) over the held-out differences d.
    """
    if reward is None or len(reward.held_out) < 2:
        return None
    d = reward.held_out[:, 0] - reward.held_out[:, 1]
    chance = expit(d)
    z = (d * (1 - chance)).sum() / np.sqrt(max((d**2 * chance * (1 - chance)).sum(), 1e-12))
    over = stats.norm.cdf(z) < SUSPICIOUS  # fewer right than the differences claim
    claimed = float(expit(np.abs(d)).mean())
    got = _right(reward.held_out) / len(d)
    return Finding(
        "reward",
        "calibration",
        "suspicious" if over else "sound",
        f"It is sure of {percent(claimed)} of the held-out pairs on average and right on {percent(got)}.",
        ""
        if not over
        else "It is surer than it should be, so RL will chase differences that are not there: fewer "
        "epochs, or more pairs.",
        {"claimed": claimed, "right": got, "z": float(z)},
    )


def length_bias(samples: Sequence[Samples]) -> Finding | None:
    """Rank correlation of score and length over the replies of the model that RL starts from."""
    before = next((s for s in samples if not s.trained), None)
    if before is None or "proxy" not in before.columns:
        return None
    scores, lengths = before.columns["proxy"][0], before.columns["length"][0]
    if scores.std() == 0 or lengths.std() == 0:
        return None
    rho = float(np.clip(stats.spearmanr(scores, lengths).statistic, -0.999, 0.999))
    error = 1 / np.sqrt(len(scores) - 3)
    # more than half of the variance of the ranks is length: |rho| > √½
    z = (abs(np.arctanh(rho)) - np.arctanh(np.sqrt(0.5))) / error
    mild = (abs(np.arctanh(rho)) - np.arctanh(0.3)) / error
    verdict: Verdict = graded(stats.norm.sf(z))
    if verdict == "sound" and stats.norm.sf(mild) < SUSPICIOUS:
        verdict = "suspicious"
    return Finding(
        "reward",
        "length",
        verdict,
        f"Score and length of the replies before RL have a rank correlation of {rho:+.2f}.",
        ""
        if verdict == "sound"
        else "RL will change the length first. Balance the pairs by length, or give a penalty "
        "for it among reward.functions.",
        {"rank correlation": rho},
    )


def constant(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether different replies get different scores."""
    told = [e for e in episodes if len(e.scores) > 1 and len(set(e.texts)) > 1]
    if not told:
        return None
    flat = [e for e in told if np.ptp(e.scores) == 0]
    return Finding(
        "reward",
        "tells replies apart",
        "faulty" if flat else "sound",
        f"{flat[0].run}: every reply scores {flat[0].scores[0]:.4g}."
        if flat
        else "Different replies score differently.",
        ""
        if not flat
        else "There is nothing to learn from a constant: look at what the reward returns for two replies.",
        {"runs with one score": float(len({e.run for e in flat}))},
    )


def scores_in_training(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether RL learned from the scores that the reward model on disk gives those texts, and if not, from which."""
    known = [e for e in episodes if e.scores_again is not None]
    if not known:
        return None
    gaps = {id(e): score_gap(e.unfined, e.scores_again, e.config) for e in known}
    off = max(known, key=lambda e: gaps[id(e)])
    gap = gaps[id(off)]
    verdict: Verdict = "faulty" if gap > same_limit(off.precision) else "sound"
    says = f"Scores of {off.run} in training and computed anew differ by {percent(gap)} of their spread."
    todo = ""
    if verdict == "faulty":
        says += f" {explain_scores(off.unfined, off.scores_again, off.other_scores, list(map(len, off.responses)))}"
        todo = "RL saw other scores than the model on disk gives: look at what is passed to it and in what order."
    shown = []
    if verdict == "faulty" and off.scores_again is not None:
        rows = np.argsort(-np.abs(off.unfined - off.scores_again))[:3]
        shown = [
            f"{off.texts[i]!r}: {off.unfined[i]:.3f} in training, {off.scores_again[i]:.3f} anew"
            for i in rows
        ]
    return Finding("reward", "scores in training", verdict, says, todo, {"difference": gap}, shown)


def drift(samples: Sequence[Samples]) -> Finding | None:
    """Whether policies score outside of what the reward model saw: above nearly all replies before RL.

    Suspicious where the mean score of a policy lies above 99 % of the scores before RL.
    """
    before = next((s for s in samples if not s.trained and "proxy" in s.columns), None)
    after = [s for s in samples if s.trained and "proxy" in s.columns]
    if before is None or not after:
        return None
    high = float(np.quantile(before.columns["proxy"], 0.99))
    top = max(after, key=lambda s: s.columns["proxy"].mean())
    mean = float(top.columns["proxy"].mean())
    share = float((before.columns["proxy"] < mean).mean())
    return Finding(
        "reward",
        "drift",
        "suspicious" if mean > high else "sound",
        f"The mean score of {top.arm} lies above {percent(share)} of the scores before RL.",
        ""
        if mean <= high
        else "The reward model is asked about replies unlike those it learned from: label some of "
        "the policy's replies, or stop RL earlier.",
        {"share of scores below": share, "mean": mean},
    )


def score_gap(
    scores: np.ndarray, again: np.ndarray | None, settings: Mapping[str, Any] | None = None
) -> float:
    """Mean |difference| over the spread of the scores.

    Scaled scores are compared after scaling both alike, without those that were clipped: the scale of that moment is
    not known.
    """
    assert again is not None
    scores, again = np.asarray(scores, float), np.asarray(again, float)
    settings = settings or {}
    clip = settings.get("score_clip") or np.inf
    if settings.get("normalize_scores"):
        free = np.abs(scores) < clip * (1 - 1e-6)
        scores, again = (_standard(x[free]) for x in (scores, again))
    else:
        again = again.clip(-clip, clip)
    if not len(scores):
        return 0.0
    spread = again.std()
    return (
        float(np.mean(np.abs(scores - again)) / spread) if spread > 0 else float(np.ptp(scores) > 0)
    )


def explain_scores(
    scores: np.ndarray,
    again: np.ndarray | None,
    others: Mapping[str, np.ndarray],
    lengths: Sequence[int],
) -> str:
    """In words, what the scores are if they are not what the reward model gives."""
    assert again is not None
    if np.ptp(scores) == 0:
        return "They are all the same."
    for name, other in others.items():
        if score_gap(scores, other) < SAME_BF16:
            return f"They are those of {name}."
    for shift in (1, -1):
        if score_gap(scores, np.roll(again, shift)) < SAME_BF16:
            return "They are those of the neighbouring reply: shifted by one row."
    rest = scores - again
    if rest.std() > 0 and np.std(lengths) > 0:
        r = float(np.corrcoef(rest, lengths)[0, 1])
        if abs(r) > 0.9:
            return f"The difference follows the reply's length (correlation {r:+.2f})."
    return f"Their correlation is {np.corrcoef(scores, again)[0, 1]:+.2f}."


def _right(pairs: np.ndarray) -> int:
    if not len(pairs):
        return 0
    return int(np.floor((pairs[:, 0] > pairs[:, 1]).sum() + (pairs[:, 0] == pairs[:, 1]).sum() / 2))


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / (x.std() or 1.0)


def same_limit(precision: str) -> float:
    """Share of the spread by which two computations of a score may differ in this arithmetic."""
    return SAME if precision == "fp32" else SAME_BF16
