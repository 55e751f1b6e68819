"""KL-Hack: does a high β make the responses short, is it the soup's doing, and what prevents it?

    python benchmarks/klhack.py [--out runs/klhack] [--plot docs/klhack.png]     (the plot: pip install matplotlib)

The quickstart with β = 30 and three arms: `ppo` starts at its reference, one SFT model; `salsa` starts there and is
pulled towards the soup, as in the paper; `inside` starts at the soup it is pulled towards. Three settings: steps as
large as the quickstart's, larger steps, larger steps with four times the episodes. Stages that the directory holds are
reused. Prints one JSON line: means over seeds of update 1, of updates 1–5, 6–10, …, and which runs raised the alarm.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import say

from salsa import Recipe, run_recipe
from salsa.artifacts import read_jsonl

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
ARMS = {
    "ppo": {"init": "sft[0]", "reference": "sft[0]"},
    "salsa": {"init": "sft[0]", "reference": "soup"},
    "inside": {"init": "soup", "reference": "soup"},
}
UPDATES, BETA = 30, 30
LARGE = {"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "value_clip_range": 100}
SETTINGS: dict[str, dict[str, float]] = {
    "the quickstart's steps": {},
    "larger steps": LARGE,
    "larger steps, 128 episodes": {**LARGE, "rollout_size": 128},
}
FIGURES = ("length", "kl", "score")
SPANS = ((0, 1), *((start, start + 5) for start in range(0, UPDATES, 5)))


def train(setting: dict[str, float], out: Path) -> dict[str, list[Path]]:
    """Run the arms until RL; each arm's stages, a seed each."""
    keys = {"kl_coef": BETA, "num_updates": UPDATES, **setting}
    overrides = [f"rl.{key}={json.dumps(value)}" for key, value in keys.items()]
    recipe = Recipe.load(RECIPE, [f"rl.arms={json.dumps(ARMS)}", *overrides])
    run_recipe(recipe, out=out, until="rl", force=True)  # another setting of the same directory
    wanted = {key: getattr(recipe.rl, key) for key in (*keys, *LARGE, "rollout_size")}
    found: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for record in sorted(out.glob("stages/rl-*/stage.json")):
        stage = json.loads(record.read_text())
        arm = stage["stage"].split()[1]
        if arm in found and wanted.items() <= stage["config"].items():
            found[arm].append(record.parent)
    assert all(len(stages) == len(recipe.rl.seeds) for stages in found.values()), found
    return found


def summary(stages: list[Path]) -> dict[str, Any]:
    """Means over seeds and spans of updates, and the alarms."""
    runs = [read_jsonl(stage / "metrics.jsonl") for stage in stages]
    figures = {
        figure: [
            round(statistics.mean(row[figure] for rows in runs for row in rows[a:b]), 2)
            for a, b in SPANS
        ]
        for figure in FIGURES
    }
    alarms = [stage.name for stage in stages if (stage / "alarms.log").exists()]
    return figures | {"alarms": alarms}


def plot(found: dict[str, dict[str, list[Path]]], file: str) -> None:
    """Length and KL of every run, a column a setting; a thick line is the seeds' mean."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, len(found), figsize=(11, 5), sharex=True, sharey="row", layout="constrained"
    )
    for column, (setting, arms) in enumerate(found.items()):
        panels[0, column].set_title(setting, fontsize=10)
        panels[1, column].set_xlabel("update")
        for color, (arm, stages) in zip(("C7", "C1", "C0"), arms.items(), strict=True):
            runs = [read_jsonl(stage / "metrics.jsonl") for stage in stages]
            for panel, name in zip(panels[:, column], ("length", "kl"), strict=True):
                lines = [[row[name] for row in rows] for rows in runs]
                x = range(1, UPDATES + 1)
                for line in lines:
                    panel.plot(x, line, color=color, lw=0.6, alpha=0.4)
                mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
                panel.plot(x, mean, color=color, lw=2, label=arm)
                panel.grid(alpha=0.3, lw=0.4)
    panels[0, 0].set_ylabel("response length, tokens")
    panels[1, 0].set_ylabel("KL to the reference, nats")
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/klhack"))
    parser.add_argument("--plot")
    args = parser.parse_args()
    found, results = {}, {}
    for name, setting in SETTINGS.items():
        found[name] = train(setting, args.out)
        results[name] = {arm: summary(stages) for arm, stages in found[name].items()}
        say(f"{name}: {json.dumps(results[name])}")
    if args.plot:
        plot(found, args.plot)
    print(json.dumps({"benchmark": "klhack", "kl_coef": BETA, "updates": UPDATES, **results}))


if __name__ == "__main__":
    main()
