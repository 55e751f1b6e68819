"""Claim: studies of a world whose truth is known are judged rightly, 95 times of 100 or more.

    python benchmarks/planted_worlds.py [studies]

A study is eight clusters × two arms × three β and the init model × two RL seeds × prompts, drawn from a world and
judged by the functions that `salsa sweep` uses (`frontier`, `judge`). Prints a JSON line, for every world and every
comparison: `verdicts`, and at equal KL the share that is `right`, the mean `error` of the effect and what it is with a
`chord`, and how often `low` to `high` (`ours`) and the `bootstrap` of `frontier` hold the truth.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

from salsa.analysis.frontier import frontier
from salsa.analysis.paths import START, Policy
from salsa.analysis.verdicts import judge

CLUSTERS, SEEDS, PROMPTS = 8, 2, 80
MARGIN = 0.07
"""The study plan's, in units of the proxy."""
BETAS = (1.0, 0.3, 0.1)
REWARDS = {"proxy": "one"}


@dataclass(frozen=True)
class World:
    """What is true. Rewards in their own unit, KL in nats, everything else a standard deviation."""

    better: float
    """The candidate's reward minus the baseline's at equal KL; all of it from 0.02 nats on."""
    further: float
    """The candidate's KL at a β, over the baseline's."""
    allowed: tuple[str, ...]
    """The right verdicts at equal KL."""
    cluster_sd: float = 0.03
    """Of what is better, between clusters."""
    seed_sd: float = 0.02
    """Of a policy's reward, between RL seeds."""
    prompt_sd: float = 0.7
    """Of one reply's reward; half of the variance is the prompt's own and the same for every policy."""


SAME = ("practically equal", "not resolved")
WORLDS = {
    "a better reference": World(0.15, 1.0, ("holds",)),
    "a worse reference": World(-0.15, 1.0, ("does not hold",)),
    "no difference": World(0.0, 1.0, SAME),
    "another yardstick only": World(0.0, 1.8, SAME),
    "better, and nearer": World(0.15, 0.6, ("holds",)),
}


def kl_at(beta: float, further: float) -> float:
    """What a policy spends at β: σ²/(2β²) as in a Gaussian world with σ = 0.4, but for a limit of about 6 nats."""
    spent = 0.08 / beta**2
    return further * spent / (1 + spent / 6)


def reward_at(kl: float, better: float) -> float:
    """The frontier: σ·√(2·KL), σ = 0.4, and what an arm is better by."""
    return 0.4 * np.sqrt(2 * kl) + better * min(1.0, np.sqrt(kl / 0.02))


def study_of(world: World, rng: np.random.Generator) -> list[Policy]:
    """The evaluated policies of one study."""
    names = [f"prompt {i}" for i in range(PROMPTS)]
    half = world.prompt_sd / np.sqrt(2)
    of_prompt = half * rng.normal(size=PROMPTS)
    policies = []
    for number in range(CLUSTERS):
        better = {"ppo": 0.0, "salsa": world.better + world.cluster_sd * rng.normal()}
        shift = 0.1 * rng.normal()  # of both arms: another reward model
        for seed in range(SEEDS):
            start = of_prompt + shift + half * rng.normal(size=PROMPTS)
            for arm, own in better.items():
                further = world.further if arm == "salsa" else 1.0
                for beta in (START, *BETAS):
                    kl = 0.0 if beta == START else kl_at(beta, further) * rng.lognormal(0, 0.05)
                    proxy = start
                    if beta != START:
                        gain = reward_at(kl, own) + world.seed_sd * rng.normal()
                        proxy = of_prompt + shift + gain + half * rng.normal(size=PROMPTS)
                    spent = kl * rng.gamma(4, 1 / 4, size=PROMPTS)
                    policies.append(
                        Policy(
                            f"p{number}", f"p{number}", arm, beta, seed, names,
                            {"proxy": proxy, "kl_to_sft[0]": spent}, REWARDS,
                        )
                    )  # fmt: skip
    return policies


def at_equal_beta(policies: list[Policy], beta: float) -> list[float]:
    """Candidate minus baseline at one β, an effect a cluster."""
    mean = {
        (p.cluster, p.arm, p.seed): p.columns["proxy"].mean() for p in policies if p.beta == beta
    }
    clusters = dict.fromkeys(p.cluster for p in policies)
    return [
        float(np.mean([mean[c, "salsa", s] - mean[c, "ppo", s] for s in range(SEEDS)]))
        for c in clusters
    ]


def judged(world: World, rng: np.random.Generator, bootstraps: int) -> dict[str, dict]:
    """Comparison → verdict, effect, whether the intervals hold the truth, effect with a chord."""
    policies = study_of(world, rng)
    made = frontier(policies, "ppo", "kl_to_sft[0]", bootstraps=bootstraps)
    found = {}
    for row in made["matched"]:
        if row["measure"] != "proxy" or row["left_out"]:
            continue  # a level that some clusters do not reach: fewer clusters, another question
        beta = row["beta"]
        effects = [
            r["effect"] for r in made["rows"] if (r["beta"], r["measure"]) == (beta, "proxy")
        ]
        truth = truth_of(world, beta, row["levels"])
        name = "average" if beta is None else f"β {beta:g}"
        found[f"equal KL, {name}"] = {
            "verdict": judge(effects, margin=MARGIN).verdict,
            "error": row["effect"] - truth,
            "chord": row["chord"] - truth,
            "ours": row["low"] <= truth <= row["high"],
            "bootstrap": row["bootstrap"][0] <= truth <= row["bootstrap"][1],
        }
    for beta in BETAS:
        effects = at_equal_beta(policies, beta)
        found[f"equal β {beta:g}"] = {"verdict": judge(effects, margin=MARGIN).verdict}
    return found


def truth_of(world: World, beta: float | None, levels: list[float]) -> float:
    """What the candidate is better by at the baseline's KL, or on average over the range."""
    if beta is not None:
        return world.better * min(1.0, np.sqrt(levels[0] / 0.02))
    kl = np.linspace(*levels, 2001)
    return world.better * float(np.minimum(1.0, np.sqrt(kl / 0.02)).mean())


def simulate(world: World, studies: int, *, bootstraps: int, seed: int = 0) -> dict[str, dict]:
    """Comparison → what so many studies of a world found."""
    rng = np.random.default_rng(seed)
    every: dict[str, list[dict]] = {}
    for _ in range(studies):
        for name, one in judged(world, rng, bootstraps).items():
            every.setdefault(name, []).append(one)
    made = {}
    for name, found in every.items():
        words = Counter(one["verdict"] for one in found)
        made[name] = {"studies": len(found), "verdicts": dict(words)}
        if "error" in found[0]:
            made[name]["right"] = round(sum(words[w] for w in world.allowed) / len(found), 4)
            for key in ("error", "chord", "ours", "bootstrap"):
                made[name][key] = round(float(np.mean([one[key] for one in found])), 4)
    return made


def main() -> None:
    """Simulate every world and print one line."""
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    worlds = {name: simulate(world, studies, bootstraps=200) for name, world in WORLDS.items()}
    print(json.dumps({"studies": studies, "margin": MARGIN, "worlds": worlds}, ensure_ascii=False))


if __name__ == "__main__":
    main()
