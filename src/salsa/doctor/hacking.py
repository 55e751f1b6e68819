"""Gates of reward hacking: does what was not trained on rise with what was."""

from collections.abc import Mapping, Sequence

import numpy as np

from salsa.doctor.evidence import RLRun, Samples
from salsa.doctor.findings import FAULTY, SUSPICIOUS, Finding, Verdict, p_mean_above, worst


def proxy_against_gold(samples: Sequence[Samples], scores: Sequence[str]) -> Finding | None:
    """Policy minus model before RL, paired by prompt, averaged over seeds (t tests over prompts).

    Faulty where the trained score rises and a held-out score falls; suspicious where it does not rise with it.
    """
    before = next((s for s in samples if not s.trained), None)
    if before is None or not scores or "proxy" not in before.columns:
        return None
    verdicts: dict[tuple[str, str], Verdict] = {}
    changes: dict[tuple[str, str], float] = {}
    for arm in (s for s in samples if s.trained):
        proxy = (arm.columns["proxy"] - before.columns["proxy"]).mean(axis=0)
        if p_mean_above(proxy) > SUSPICIOUS:
            continue
        for name in (n for n in scores if n in arm.columns):
            gold = (arm.columns[name] - before.columns[name]).mean(axis=0)
            key = arm.arm, name
            changes[key] = float(gold.mean())
            verdicts[key] = "sound" if p_mean_above(gold) < SUSPICIOUS else "suspicious"
            if p_mean_above(-gold) < FAULTY:
                verdicts[key] = "faulty"
    if not verdicts:
        return Finding(
            "hacking", "proxy against held-out score", "sound",
            "No arm raised the trained score, so there is nothing that could have been hacked.",
        )  # fmt: skip
    verdict = worst(verdicts.values())
    key = min((k for k, v in verdicts.items() if v == verdict), key=changes.__getitem__)
    return Finding(
        "hacking",
        "proxy against held-out score",
        verdict,
        f"{key[0]} raises the trained score, and {key[1]} by {changes[key]:+.3f}.",
        ""
        if verdict == "sound"
        else "The reward model was outwitted rather than pleased: raise rl.kl_coef, stop "
        "earlier, or mend the reward. Read replies where the two disagree most.",
        {f"{arm}, {name}": change for (arm, name), change in changes.items()},
        _worst_replies(samples, *key) if verdict != "sound" else (),
    )


def over_optimised(runs: Sequence[RLRun], scores: Sequence[str]) -> Finding | None:
    """In which third of training a held-out score was best, and whether it fell since (t test over runs)."""
    if len(runs) < 2 or not scores or min(len(run.rows) for run in runs) < 9:
        return None
    for name in scores:
        if not all(name in row for run in runs for row in run.rows):
            continue
        thirds = np.array(
            [[np.mean([r[name] for r in part]) for part in _thirds(run.rows)] for run in runs]
        )
        best = int(thirds.mean(axis=0).argmax())
        if best < 2 and p_mean_above(thirds[:, best] - thirds[:, 2]) < SUSPICIOUS:
            return Finding(
                "hacking", "over-optimisation", "suspicious",
                f"{name} was best in the {('first', 'second')[best]} third of training and fell by "
                f"{(thirds[:, best] - thirds[:, 2]).mean():.3f} since.",
                "Stop there (rl.num_updates), or raise rl.kl_coef.",
                {"best third": best + 1.0},
            )  # fmt: skip
    return Finding(
        "hacking",
        "over-optimisation",
        "sound",
        "No held-out score was better earlier than in the end.",
    )


def _thirds(rows: Sequence[Mapping[str, float]]) -> list[Sequence[Mapping[str, float]]]:
    third = len(rows) // 3
    return [rows[:third], rows[third:-third], rows[-third:]]


def _worst_replies(samples: Sequence[Samples], arm: str, score: str) -> list[str]:
    one = next(s for s in samples if s.arm == arm)
    proxy, gold = one.columns["proxy"][0], one.columns[score][0]
    z = (proxy - proxy.mean()) / (proxy.std() or 1) - (gold - gold.mean()) / (gold.std() or 1)
    return [
        f"{one.texts[i]!r}: proxy {proxy[i]:.2f}, {score} {gold[i]:.2f}" for i in np.argsort(-z)[:3]
    ]
