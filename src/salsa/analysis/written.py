"""From finished stages to a run's forecast and landscape; heavy imports wait until there is something to write.

Both record what they were `made_from`, so that a report shows them beside the models that they are about only.
"""

import json
from collections.abc import Mapping
from typing import Any

from salsa.artifacts import read_jsonl
from salsa.config import ForecastConfig, LandscapeConfig, Recipe
from salsa.errors import ConfigError
from salsa.runtime.tracking import say
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph, Node
from salsa.stages.nodes import Sampled


def forecast_of(recipe: Recipe, graph: Graph, candidates: Mapping[str, Sampled]) -> dict[str, Any]:
    """What every candidate reference is worth at the optimum: the content of `forecast.json`."""
    from salsa.analysis.forecast import default_betas, forecast, read_replies

    replies = {
        name: read_replies(
            name,
            recipe.eval.kl_to,
            graph[candidate.replies].path,
            graph[candidate.scores].path,
            {yardstick: graph[node].path for yardstick, node in candidate.logprobs.items()},
        )
        for name, candidate in candidates.items()
    }
    config, kl_coef = recipe.forecast or ForecastConfig(), recipe.rl.kl_coef
    found = forecast(replies, config.betas or default_betas(kl_coef), kl_coef)
    needed = (node for candidate in candidates.values() for node in candidate.all)
    return found | {"made_from": graph.made_from(needed)}


def write_forecast(recipe: Recipe, graph: Graph, candidates: Mapping[str, Sampled]) -> None:
    """`forecast.json` and `forecast.html` in the run directory."""
    from salsa.report import page

    page.write_forecast(recipe.name, forecast_of(recipe, graph, candidates), graph.run)
    say(f"forecast: {graph.run.path / 'forecast.html'}")


def write_landscape(recipe: Recipe, graph: Graph, node: Node | None) -> None:
    """`landscape.json` and `landscape.html` in the run directory.

    Raises:
        ConfigError: there are no two models to look between.
    """
    if node is None:
        raise ConfigError(
            "landscape: there is one SFT model and nothing beside it. Set landscape.models, or add a seed to sft.seeds."
        )
    graph.finish([node])
    from salsa.analysis.places import landscape
    from salsa.report import page

    config = recipe.landscape or LandscapeConfig()
    rows = read_jsonl(graph[node].path / "places.jsonl")
    found = landscape(rows, config.models, config.num_samples)
    found["made_from"] = graph.made_from([node])
    page.write_landscape(recipe.name, found, graph.run)
    say(f"landscape: {graph.run.path / 'landscape.html'}")


def written(run: RunDirectory, name: str) -> dict[str, Any] | None:
    """What `<name>.json` in the run directory says; None where there is none, or other models were measured.

    Args:
        run: with the stages that the report shows finished.
        name: `forecast` or `landscape`.
    """
    file = run.path / f"{name}.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        say(f"{file}: is no JSON and left out of the report. Run salsa {name} again.")
        return None
    before = found.get("made_from", {})
    if changed := [
        s.label
        for s in run.finished
        if before.get(s.label, s.record["output"]) != s.record["output"]
    ]:
        say(
            f"{file}: made from another {changed[0]} and left out of the report. Run salsa {name} again."
        )
        return None
    return found
