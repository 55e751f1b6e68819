"""Gates of rewards and advantages: the score at the right token, the recursion, and how much of it is signal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from salsa.doctor.evidence import Episodes, RLRun
from salsa.doctor.findings import Finding, Verdict
from salsa.doctor.kl import penalties

TOLERANCE = 1e-3
"""Share of the spread by which two ways to compute one formula in fp32 may differ (seven digits are kept)."""


def placement(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether reward minus KL penalty is the score, at the last token, and nothing elsewhere."""
    worst_gap, where, place = 0.0, "", ""
    for one in episodes:
        beta = one.kl_coef if one.config.get("kl_in") == "reward" else 0.0
        spread = float(one.scores.std()) or 1.0
        rest = [r + beta * kl for r, kl in zip(one.rewards, penalties(one), strict=True)]
        wanted = [
            np.eye(1, len(r), len(r) - 1)[0] * s for r, s in zip(rest, one.scores, strict=True)
        ]
        off = max(float(np.abs(a - b).max()) for a, b in zip(rest, wanted, strict=True)) / spread
        # where β itself is another, all tokens are off: that is the KL's gate
        slot = [int(np.argmax(np.abs(r))) - len(r) + 1 for r in rest if len(r) > 1]
        if off > worst_gap:
            worst_gap, where = off, f"{one.run}, update {one.update}"
            place = f"{-int(np.median(slot))} before the last token" if slot else ""
    if not where:
        return None if not episodes else Finding(
            "advantages", "score's place", "sound", "The score stands at the last token of each reply."
        )  # fmt: skip
    verdict: Verdict = "faulty" if worst_gap > TOLERANCE else "sound"
    return Finding(
        "advantages",
        "score's place",
        verdict,
        "The score stands at the last token of each reply."
        if verdict == "sound"
        else f"{where}: what is left of the rewards without the penalty is not the score at the last token (most of it "
        f"is {place}).",
        ""
        if verdict == "sound"
        else "The score belongs to the mask's last 1: look at where the rewards are made.",
        {"difference": worst_gap},
    )


def recursion(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether advantages are what the rewards and values give, computed anew (GAE, or against the group).

    PPO's are whitened over the whole rollout, of which a part is here: any rising line through them is right.
    """
    off = {}
    for one in episodes:
        size = int(one.config.get("group_size", 1))
        whole = len(one.advantages) // size * size  # the trace may end within a group
        one = replace(one, rewards=one.rewards[:whole], values=one.values[:whole])
        ours = np.concatenate([*one.advantages[:whole], np.zeros(0)])
        if len(ours) > 2:
            off[f"{one.run}, update {one.update}"] = _misfit(ours, _expected(one), one.config)
    if not off:
        return None
    name = max(off, key=off.__getitem__)
    verdict: Verdict = "faulty" if off[name] > TOLERANCE else "sound"
    return Finding(
        "advantages",
        "recursion",
        verdict,
        f"{name}: advantages in training and computed anew differ by {off[name]:.2g} of their spread.",
        ""
        if verdict == "sound"
        else "Look at the recursion, at values outside the mask, and at the sign.",
        {"difference": off[name]},
    )


def signal(runs: Sequence[RLRun]) -> Finding | None:
    """How much of the advantages is the score and how much the penalty's noise: the KL-Hack before it happens.

    Over replies, share = Var(score) / (Var(score) + β²·Var(KL)). Whitening hides it: the sum is scaled to 1 whatever it
    is made of. A rollout of B replies is worth share·B replies about the score. Faulty where the first rollout, before
    any step, is worth less than one; suspicious where one of the first five is worth less than two.
    """
    worth: dict[str, list[float]] = {}
    for run in runs:
        if not run.rows or not run.pulls or run.config.get("kl_in") != "reward":
            continue
        batch = int(run.config["rollout_size"])
        for row in run.rows[:5]:
            penalty = row["kl_coef"] * row["kl_stderr"] * math.sqrt(batch)
            total = row["score_std"] ** 2 + penalty**2
            share = row["score_std"] ** 2 / total if total > 0 else 1.0
            worth.setdefault(run.name, []).append(share * batch)
    if not worth:
        return None
    first = min(worth, key=lambda name: worth[name][0])
    least = min(worth, key=lambda name: min(worth[name]))
    verdict: Verdict = "sound"
    if worth[first][0] < 1:
        verdict, least = "faulty", first
    elif min(worth[least]) < 2:
        verdict = "suspicious"
    value = worth[least][0] if verdict == "faulty" else min(worth[least])
    return Finding(
        "advantages",
        "signal against penalty",
        verdict,
        f"{least}: a rollout is worth {value:.2g} replies that are about the score; the rest is the penalty's noise.",
        ""
        if verdict == "sound"
        else "Silence is the cheapest reply in this regime (KL-Hack). Lower rl.kl_coef, start "
        "the policy at its reference, raise rl.rollout_size, or put the KL in the loss (rl.kl_in: loss).",
        {"replies' worth at the start": worth[least][0], "least": min(worth[least])},
    )


def _expected(one: Episodes) -> np.ndarray:
    """Advantages before whitening, of all tokens in a row."""
    if one.config.get("algorithm", "ppo") == "ppo":
        gamma, decay = float(one.config["gamma"]), float(one.config["gae_lambda"])
        return np.concatenate(
            [_gae(r, v, gamma, decay) for r, v in zip(one.rewards, one.values, strict=True)]
        )
    size = int(one.config["group_size"])
    totals = np.array([r.sum() for r in one.rewards]).reshape(-1, size)
    centred = totals - totals.mean(axis=1, keepdims=True)
    if one.config["algorithm"] == "rloo":
        centred = centred * size / (size - 1)
    else:
        centred = centred / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return np.repeat(centred.ravel(), [len(r) for r in one.rewards])


def _gae(rewards: np.ndarray, values: np.ndarray, gamma: float, decay: float) -> np.ndarray:
    """A_t = Σ_k (γλ)^k·δ_{t+k}, summed up term by term: not the recursion that the loop uses."""
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    steps = np.arange(len(deltas))
    powers = np.triu((gamma * decay) ** np.maximum(steps[None, :] - steps[:, None], 0))
    return powers @ deltas


def _misfit(ours: np.ndarray, expected: np.ndarray, config: Mapping[str, Any]) -> float:
    """Root mean square difference over the spread, after the best rising line where they are whitened."""
    if config["algorithm"] == "ppo":  # the only one that whitens
        spread = expected.std()
        if spread == 0:
            return 0.0
        slope = float(np.cov(expected, ours, ddof=0)[0, 1] / spread**2)
        if slope <= 0:
            return 2.0  # turned round
        fitted = ours.mean() + slope * (expected - expected.mean())
    else:
        fitted = expected
    scale = ours.std() or 1.0
    return float(np.sqrt(np.mean((ours - fitted) ** 2)) / scale)
