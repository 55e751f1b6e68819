"""SALSA on one screen: which stage feeds which.

    base ─► SFT × N ─► soup ─┐ reference
              │              ├─► RL per arm × seed ─► evaluation ─► report
              └─► preferences ─► reward ─┘

`stages_of` names every stage and loads nothing; `run_recipe` finishes them. A stage is a directory named by the digest
of what decides its result: a finished one is reused, an interrupted one goes on from its last checkpoint.
"""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from salsa.analysis.written import forecast_of, write_forecast, write_landscape, written
from salsa.artifacts import FileHashes
from salsa.config import ForecastConfig, LandscapeConfig, Recipe
from salsa.errors import ConfigError
from salsa.resolve import Models
from salsa.runtime.launch import leading, led
from salsa.runtime.store import Store
from salsa.runtime.trackers import tracked
from salsa.runtime.tracking import say, showing_jobs
from salsa.stages import nodes
from salsa.stages.directory import RunDirectory, report_key
from salsa.stages.graph import Graph, Node
from salsa.stages.placing import executor_of, request_of

Until = Literal["sft", "reward", "forecast", "landscape", "rl", "eval", "report"]


@dataclass(frozen=True)
class Stages:
    """The nodes of a recipe's stages."""

    sft: list[Node]
    reward: list[Node]
    """Empty where the rewards are functions."""
    policies: dict[str, list[Node]]
    """Arm → seed → policy."""
    forecast: dict[str, nodes.Sampled]
    """Candidate reference → its replies, scored and weighed."""
    landscape: Node | None
    """None where there are no two models to look between."""
    samples: dict[str, list[Node]]
    """Arm, and `sft` for the model that arms are measured to → seed → evaluated samples."""


def stages_of(recipe: Recipe, hashes: FileHashes) -> Stages:
    """Which stage feeds which; nothing is loaded or run."""
    base = nodes.base(recipe, hashes)
    sft = [nodes.sft(recipe, base, index, hashes) for index in range(recipe.sft.count)]
    models = Models(recipe, base, sft, hashes)
    preferences = nodes.preferences(recipe, sft)
    reward = nodes.reward(recipe, models, preferences)
    policies = {
        arm: [nodes.policy(recipe, arm, s, models, reward, preferences) for s in recipe.rl.seeds]
        for arm in recipe.rl.arms
    }
    compared = {"sft": [models[recipe.eval.shown]] * len(recipe.rl.seeds)} | policies
    samples = {
        arm: [nodes.samples(recipe, arm, k, one, models, reward) for k, one in enumerate(of_arm)]
        for arm, of_arm in compared.items()
    }
    asked = recipe.forecast or ForecastConfig()
    forecast = {
        name: nodes.sampled(recipe, name, models, reward, asked) for name in recipe.candidates()
    }
    between = recipe.landscape or (LandscapeConfig() if recipe.sft.count > 1 else None)
    landscape = nodes.landscape(recipe, models, reward, between) if between else None
    return Stages(sft, [reward] if reward else [], policies, forecast, landscape, samples)


def run_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    until: Until = "report",
    force: bool = False,
    jobs: int | None = None,
    verify: bool = False,
) -> Path:
    """Run a recipe from the base model to the report, or `until` an earlier stage; returns the run directory.

    Args:
        recipe: what to run.
        out: the run directory; `runs/<name>` if not given.
        until: what to finish, with what it needs and no more.
        force: replace another recipe's run; its finished stages are reused where they apply.
        jobs: independent stages that run at once; the recipe's if not given. Under torchrun one stage runs at a time,
            and all processes share an RL job.
        verify: hash all that is used again, also where size and time are as recorded.

    Raises:
        SalsaError: bad input, or work that failed; finished stages are kept.
    """
    with leading() as leads:
        if leads:
            return _run(recipe, out, until, force, jobs, verify)
    return out or Path("runs") / recipe.name


def _run(
    recipe: Recipe, out: Path | None, until: Until, force: bool, jobs: int | None, verify: bool
) -> Path:
    if led() > 1 and ((jobs or recipe.engine.jobs or 1) > 1 or recipe.engine.executor != "local"):
        raise ConfigError(
            f"engine: jobs and executor under torchrun: its {led()} processes do one stage at a time, here. Remove one "
            "of the two."
        )
    store = Store(recipe.engine.artifacts) if recipe.engine.artifacts else None
    directory = RunDirectory(out or Path("runs") / recipe.name, verify=verify, store=store)
    if store is not None:
        store.check()
    with directory.opened(recipe.to_yaml(), force=force, decisive=Recipe.decisive_text) as run:
        if not force:
            run.check_precision(recipe.model.precision)
        stages = stages_of(recipe, run.hashes)
        executor = executor_of(recipe.engine, jobs, run.path)
        trackers = tracked(run.path, recipe.track, recipe.name, recipe.model_dump(mode="json"))
        with trackers, closing(executor) if executor else nullcontext(), showing_jobs() as view:
            graph = Graph(
                run,
                precision=recipe.model.precision,
                threads=recipe.engine.threads,
                executor=executor,
                request=lambda job: request_of(job, recipe, executor),
                retries=recipe.engine.retries,
                processes=recipe.engine.processes,
                timeout=recipe.engine.timeout,
                before_work=lambda: nodes.check_inputs(recipe),
                view=view,
            )
            _finish(recipe, graph, stages, until)
    return directory.path


def remaining(recipe: Recipe, run: RunDirectory, until: Until = "report") -> dict[str, str]:
    """Digest → label of the stages that are left to run, without running any; equal digests are one stage."""
    wanted = _wanted(stages_of(recipe, run.hashes), recipe, until)
    return Graph(run, precision=recipe.model.precision).remaining(wanted)


def _wanted(stages: Stages, recipe: Recipe, until: Until) -> list[Node]:
    """What is finished for `until`; what it needs comes with it."""
    named = {
        "sft": stages.sft,
        "reward": stages.reward,
        "forecast": [node for one in stages.forecast.values() for node in one.all],
        "landscape": [stages.landscape] if stages.landscape is not None else [],
        "rl": [*chain(*stages.policies.values())],
        "eval": [*chain(*stages.samples.values())],
    }
    forecast = ["forecast"] if recipe.forecast is not None else []
    groups = ["sft", "reward", *forecast, "rl", "eval"] if until == "report" else [until]
    return [node for group in groups for node in named[group]]


def _finish(recipe: Recipe, graph: Graph, stages: Stages, until: Until) -> None:
    if until == "reward" and not stages.reward:
        raise ConfigError(
            "reward.functions: these are the reward, so there is no model to train. Use `salsa rl`."
        )
    graph.finish(_wanted(stages, recipe, until))
    if until == "forecast":
        return write_forecast(recipe, graph, stages.forecast)
    if until == "landscape":
        return write_landscape(recipe, graph, stages.landscape)
    if until != "report":
        return
    landscape = written(graph.run, "landscape")
    forecast = written(graph.run, "forecast") if recipe.forecast is None else None
    key, current = report_key(graph.run, [one for one in (forecast, landscape) if one])
    if not current:
        from salsa.doctor.examine import diagnosed
        from salsa.evaluate.results import results_of
        from salsa.report.page import write_report

        samples = {arm: [graph[node] for node in of_arm] for arm, of_arm in stages.samples.items()}
        results = results_of(recipe, graph.run.finished, samples)
        if recipe.forecast is not None:
            forecast = forecast_of(recipe, graph, stages.forecast)
        doctor = diagnosed(graph.run)
        write_report(
            results, graph.run, key=key, forecast=forecast, landscape=landscape, doctor=doctor
        )
    say(f"report: {graph.run.path / 'report.html'}")
