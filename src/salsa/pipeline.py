"""SALSA on one screen: which stage feeds which.

    base ─► SFT × N ─► soup ─┐ reference
              │              ├─► PPO per arm × seed ─► evaluation ─► report
              └─► reward ────┘

Every stage is a directory named by the digest of what goes into it: a finished one is reused, an interrupted one goes
on from its last checkpoint (`salsa.artifacts`, `salsa.stages`).
"""

from pathlib import Path
from typing import Literal

from salsa.anchors import Anchors
from salsa.artifacts import RunDirectory
from salsa.config import Recipe
from salsa.report.page import write_report
from salsa.runtime.local import prepare_process
from salsa.runtime.tracking import quiet_libraries, say
from salsa.stages import Stages

Until = Literal["sft", "reward", "rl", "eval", "report"]


def run_recipe(
    recipe: Recipe, *, out: Path | None = None, until: Until = "report", force: bool = False
) -> Path:
    """Run a recipe from the base model to the report, or `until` an earlier stage; returns the run directory.

    Raises:
        SalsaError: bad input, or work that failed; finished stages are kept.
    """
    directory = RunDirectory(out or Path("runs") / recipe.name)
    with directory.opened(recipe.to_yaml(), force=force) as run:
        prepare_process(recipe.engine.threads)
        quiet_libraries()
        _run(recipe, run, until)
    return directory.path


def _run(recipe: Recipe, run: RunDirectory, until: Until) -> None:
    stages, arms, seeds = Stages(recipe, run), recipe.rl.arms, recipe.rl.seeds
    stages.check_inputs()

    sft = [stages.sft(index) for index in range(recipe.sft.count)]
    anchors = Anchors(run, stages.base, sft, recipe.soup)
    if until == "sft":
        return

    reward = stages.reward(anchors, sft)
    if until == "reward":
        return

    policies = {arm: [stages.rl(arm, seed, anchors, reward) for seed in seeds] for arm in arms}
    if until == "rl":
        return

    compared = {"sft": [anchors[recipe.eval.anchor]] * len(seeds)} | policies
    samples = {
        arm: [stages.evaluate(arm, k, policy, anchors, reward) for k, policy in enumerate(of_arm)]
        for arm, of_arm in compared.items()
    }
    if until == "eval":
        return

    write_report(recipe, run, samples)
    say(f"report: {run.path / 'report.html'}")
