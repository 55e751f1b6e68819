"""From samples to `report.json`: every arm × seed, every pair of arms, with intervals over prompts and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, read_jsonl, versions
from salsa.config import PreferencesConfig, Recipe, RLConfig
from salsa.evaluate.significance import holm
from salsa.evaluate.winrate import two_level_mean, two_level_win_rate
from salsa.runtime.tracking import round_metric
from salsa.stages.directory import Stage

Samples = Mapping[str, Sequence[Checkpoint]]
"""Arm → seed → the directory of `samples.jsonl`."""


def summarise(recipe: Recipe, stages: Sequence[Stage], samples: Samples) -> dict[str, Any]:
    """The content of `report.json`. All that may differ between two equal runs lies under `times`."""
    scores = ["proxy", *recipe.eval.scores]
    kl = [f"kl_to_{name}" for name in recipe.eval.kl_to]
    measured = [*scores, *kl, "kl_reference", "length", "ended"]
    by_arm = {name: tables(of_arm, measured) for name, of_arm in samples.items()}
    policies = {
        stage.path: stage.record["inputs"]["policy"]
        for stage in stages
        if "policy" in stage.record["inputs"]
    }
    return {
        "name": recipe.name,
        "method": "SALSA, arXiv 2411.01798",
        "notes": notes(recipe) + _arithmetic(stages),
        "scores": scores,
        "baseline": recipe.eval.baseline,
        "kl_to": list(recipe.eval.kl_to),
        "num_prompts": next(iter(by_arm.values()))["proxy"].shape[1],
        "arms": {
            name: _arm(recipe, name, [policies[s.path] for s in samples[name]], table)
            for name, table in by_arm.items()
        },
        "pairs": [
            pair
            for score in scores
            for pair in pairs_of_score(score, by_arm, _baseline_first(by_arm, recipe.eval.baseline))
        ],
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "stages": [
            {"stage": s.label, "digest": s.digest, "output": s.record["output"]} for s in stages
        ],
        "times": {s.label: s.record["seconds"] for s in stages},
    }


def notes(recipe: Recipe) -> list[str]:
    """What a reader must know before believing a number."""
    sentences = []
    if (preferences := recipe.preferences) is not None and preferences.labeller is not None:
        sentences.append(_synthetic(preferences, recipe.sft.count))
    num_seeds = len(recipe.rl.seeds)
    if num_seeds == 1:
        sentences.append(
            "One RL seed: the intervals cover prompts only and say nothing about another seed."
        )
    elif num_seeds < 4:
        sentences.append(
            f"{num_seeds} RL seeds: the intervals are those of Student's t over prompts or over seeds, whichever is "
            "wider, and with so few seeds they are wide. More seeds narrow them faster than more prompts."
        )
    sentences.append(
        f"{_betas(recipe)} The same β is another constraint once the "
        f"reference moves, so compare arms at equal KL to {recipe.eval.shown} (the reward–KL plot), "
        "not by reward alone."
    )
    sentences.append(
        "The proxy is what the policies were trained to raise. A proxy that rises while a held-out "
        "score does not is reward hacking, not improvement."
    )
    return sentences


def _betas(recipe: Recipe) -> str:
    """Which β the RL arms used."""
    configs = {name: recipe.rl.config_of(name) for name in recipe.rl.arms}
    betas = {name: c.kl_coef for name, c in configs.items() if isinstance(c, RLConfig)}
    if len(set(betas.values())) > 1:
        return "β: " + ", ".join(f"{name} {beta:g}" for name, beta in betas.items()) + "."
    return f"Every arm used the same β = {next(iter(betas.values()), recipe.rl.kl_coef):g}."


def _arithmetic(stages: Sequence[Stage]) -> list[str]:
    """A note if stages of one run were computed differently."""
    computed: dict[str, list[str]] = {}
    for stage in stages:
        if (precision := stage.record.get("precision")) is not None:
            computed.setdefault(precision, []).append(stage.label)
    if len(computed) < 2:
        return []
    parts = "; ".join(f"{precision}: {', '.join(labels)}" for precision, labels in computed.items())
    return [
        f"Stages of this run were computed in different arithmetic ({parts}). Their difference is part of every "
        "comparison across that line."
    ]


def _synthetic(preferences: PreferencesConfig, num_models: int) -> str:
    assert preferences.labeller is not None
    return (
        f"The preferences are synthetic. Two replies per prompt were sampled from the {num_models} SFT "
        f"models and scored by {preferences.labeller.call}; reply a was labelled better with probability "
        f"sigmoid((score a − score b) / {preferences.noise:g}). No person compared them."
    )


def tables(samples: Sequence[Checkpoint], measured: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric → array [seeds, prompts]."""
    rows = [read_jsonl(one.path / "samples.jsonl") for one in samples]
    return {
        name: np.array([[float(row[name]) for row in seed] for seed in rows]) for name in measured
    }


def _arm(
    recipe: Recipe, name: str, policies: Sequence[str], table: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    arm = recipe.rl.arms.get(name)
    public = {"ended": "eos_rate"}
    return {
        "init": arm.init if arm else recipe.eval.shown,
        "reference": arm.reference if arm else recipe.eval.shown,
        "trained": arm is not None,
        "seeds": [
            {"seed": seed, "policy": policies[row]}
            | {
                public.get(key, key): round_metric(values[row].mean())
                for key, values in table.items()
            }
            for row, seed in enumerate(recipe.rl.seeds)
        ],
        "mean": {
            public.get(key, key): rounded(two_level_mean(values)) for key, values in table.items()
        },
    }


def pairs_of_score(
    score: str, by_arm: Mapping[str, Mapping[str, np.ndarray]], arms: Sequence[str]
) -> list[dict[str, Any]]:
    """Every pair of arms by one score, with p-values that Holm corrected for the number of pairs.

    Args:
        score: which figure decides.
        by_arm: arm → figure → values [seeds, prompts].
        arms: in every pair the earlier is the baseline.
    """
    rows = [
        _pair(score, candidate, baseline, by_arm) for baseline, candidate in combinations(arms, 2)
    ]
    adjusted = holm([pair["p_value"] for pair in rows])
    return [pair | {"p_holm": round_metric(p)} for pair, p in zip(rows, adjusted, strict=True)]


def _pair(
    score: str, candidate: str, baseline: str, by_arm: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    first, second = by_arm[candidate][score], by_arm[baseline][score]
    result = two_level_win_rate(first, second)
    return {
        "score": score,
        "candidate": candidate,
        "baseline": baseline,
        **rounded(result),
        "verdict": result.verdict,
        "resolution": round_metric(result.resolution),
        "difference": rounded(two_level_mean(first - second)),
    }


def _baseline_first(names: Mapping[str, Any], baseline: str) -> list[str]:
    rest = [name for name in names if name not in (baseline, "sft")]
    return ["sft", baseline, *rest]


def rounded(estimate: Any) -> dict[str, Any]:
    """The fields of an estimate, shortened to what compares runs."""
    return {
        key: round_metric(value) if isinstance(value, float) else value
        for key, value in asdict(estimate).items()
    }
