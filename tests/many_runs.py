"""Results of many made-up runs, written to a run directory as RL and evaluation write them: arms × seeds."""

import json
from pathlib import Path

import numpy as np

from salsa.analysis.forecast import Replies, default_betas, forecast
from salsa.analysis.places import landscape
from salsa.artifacts import Checkpoint, write_jsonl
from salsa.evaluate.results import Arm, Results
from salsa.stages.directory import RunDirectory

WORDS = [
    "the",
    "soup",
    "of",
    "models",
    "follows",
    "a",
    "gentle",
    "path",
    "while",
    "salt",
    "pepper",
    "turns",
    "it",
]


def many_runs(
    folder: Path,
    num_arms: int = 3,
    num_seeds: int = 2,
    num_prompts: int = 20,
    num_updates: int = 40,
    words: int = 6,
) -> tuple[Results, RunDirectory]:
    """An untrained arm `sft`, and `arm-0` (the baseline), `arm-1`, … whose reward grows with the square root of the KL.

    `arm-1` is better than `arm-0` at equal KL by 0.5 in every seed; the entropy of `arm-2` collapses.
    """
    rng = np.random.default_rng(0)
    names = ["sft", *(f"arm-{number}" for number in range(num_arms))]
    prompts = [f"Question {i}: {' '.join(rng.choice(WORDS, 8))}?" for i in range(num_prompts)]
    samples, curves = {}, {}
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        samples[name] = [
            _samples(folder / f"{name}-{seed}", prompts, number, words, rng)
            for seed in range(num_seeds)
        ]
        if name != "sft":
            curves[name] = [_curve(number - 1, seed, num_updates) for seed in range(num_seeds)]
    arms = {
        name: Arm(
            [f"{name}-seed-{seed}" for seed in range(num_seeds)],
            list(range(num_seeds)),
            ["0" * 64] * num_seeds,
            "sft[0]",
            "sft[0]",
            name != "sft",
        )
        for name in names
    }
    (folder / "recipe.yaml").write_text("name: many\n")
    results = Results(
        "many", "arm-0", arms, {}, samples, ("proxy", "gold"), ("sft[0]",), curves=curves
    )
    return results, RunDirectory(folder)


def _curve(arm: int, seed: int, num_updates: int) -> list[dict[str, float]]:
    """KL to sft[0] and to the own reference rises from 0 to 10 nats; deterministic, so that a test can know it."""
    rows = []
    for step in range(1, num_updates + 1):
        kl = 10 * (step - 1) / (num_updates - 1)
        dead = arm == 2 and step > num_updates // 2
        row = {
            "step": step, "score": kl**0.5 + 0.5 * (arm == 1) + 0.1 * seed, "gold": 1.0 + 0.1 * kl,
            "kl": kl, "kl_stderr": 0.1, "length": 20.0 + step, "entropy": 0.1 if dead else 2.0, "clip_fraction": 0.1,
        }  # fmt: skip
        if step % 5 == 1 or step == num_updates:
            row["kl_to_sft[0]"] = kl
        rows.append(row)
    return rows


def _samples(
    folder: Path, prompts: list[str], number: int, words: int, rng: np.random.Generator
) -> Checkpoint:
    folder.mkdir(parents=True)
    rows = []
    for prompt in prompts:
        kl, proxy = abs(rng.normal(4, 1)), rng.normal(number, 1)
        rows.append(
            {
                "prompt": prompt,
                "response": " ".join(rng.choice(WORDS, words)),
                "proxy": proxy,
                "gold": rng.normal(1, 1),
                "kl_to_sft[0]": kl,
                "kl_reference": kl,
                "length": words,
                "ended": True,
            }
        )
    write_jsonl(folder / "samples.jsonl", json.loads(json.dumps(rows)))
    return Checkpoint(folder, "0" * 64)


def a_landscape() -> dict:
    """A landscape between two models, as `salsa landscape` makes it."""
    rng = np.random.default_rng(0)
    values = lambda: rng.normal(size=8).tolist()
    rows = [
        {"at": [alpha], "weights": [1 - alpha, alpha], "columns": {"proxy": values(), "length": values()}, "loss": None}
        for alpha in (0.0, 1.0, 0.5)
    ]  # fmt: skip
    return landscape(rows, ["sft[0]", "sft[1]"], 2)


def a_forecast() -> dict:
    """A forecast of two references, as `salsa forecast` makes it."""
    rng = np.random.default_rng(0)
    draw = lambda: rng.normal(size=(20, 64))
    replies = {
        name: Replies({"proxy": draw(), "gold": draw()}, {"sft[0]": 0.1 * draw()}, 20 + draw())
        for name in ("sft[0]", "soup")
    }
    return forecast(replies, default_betas(2.0), 2.0)
