"""One self-contained HTML page: no network, phone and desktop, light and dark. Model text is always escaped."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from salsa.artifacts import RunDirectory, Stage, read_jsonl, write_atomic
from salsa.config import Recipe
from salsa.evaluate.summary import summarise
from salsa.report import figures
from salsa.stages import rl_label

COMPLETIONS = 24
"""Prompts shown side by side, drawn at random with a fixed seed."""


def write_report(recipe: Recipe, run: RunDirectory, samples: Mapping[str, Sequence[Stage]]) -> None:
    """Write `report.json` and `report.html` into the run directory."""
    summary = summarise(recipe, run, samples)
    rows = {
        name: [read_jsonl(stage.path / "samples.jsonl") for stage in stages]
        for name, stages in samples.items()
    }
    curves = learning_curves(recipe, run)
    write_atomic(run.path / "report.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_atomic(run.path / "report.html", render(summary, rows, curves, recipe.to_yaml()))


def render(
    summary: Mapping[str, Any],
    rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    recipe_yaml: str,
) -> str:
    """The page.

    Args:
        summary: `report.json`.
        rows: arm → seed → samples.
        curves: arm → seed → the RL stage's metrics.
        recipe_yaml: the resolved recipe.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    plots = figures.all_figures(summary, rows, curves)
    return environment.get_template("page.html").render(
        report=summary,
        headline=headline(summary),
        against=against_baseline(summary),
        completions=completions(rows),
        recipe_yaml=recipe_yaml,
        figures=Markup(_script_json(plots)),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        total_minutes=sum(summary["times"].values()) / 60,
    )


def headline(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per arm and score that compares it with the baseline, intervals and verdict included."""
    sentences = []
    for (name, score), pair in against_baseline(summary).items():
        if name == "sft":
            continue
        words = {
            "better": f"beats {summary['baseline']}",
            "worse": f"loses to {summary['baseline']}",
            "not resolved": f"against {summary['baseline']} is not resolved",
        }
        sentences.append(
            f"{name} {words[pair['verdict']]} on {score}: win rate {pair['rate']:.1%} "
            f"[{pair['low']:.1%}, {pair['high']:.1%}]."
        )
    return sentences


def against_baseline(summary: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(arm, score) → its comparison with the baseline, the arm being the candidate."""
    found = {}
    for pair in summary["pairs"]:
        if pair["baseline"] == summary["baseline"]:
            found[pair["candidate"], pair["score"]] = pair
        elif pair["candidate"] == summary["baseline"]:
            found[pair["baseline"], pair["score"]] = _swapped(pair)
    return found


def completions(rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Some prompts with the reply of each arm's first seed."""
    first = {name: seeds[0] for name, seeds in rows.items()}
    count = len(next(iter(first.values())))
    chosen = sorted(random.Random(0).sample(range(count), min(COMPLETIONS, count)))
    return [
        {
            "prompt": next(iter(first.values()))[i]["prompt"],
            "replies": [{"arm": name} | dict(samples[i]) for name, samples in first.items()],
        }
        for i in chosen
    ]


def learning_curves(recipe: Recipe, run: RunDirectory) -> dict[str, list[list[dict]]]:
    """Arm → seed → metrics of its RL stage."""
    stages = {stage.label: stage for stage in run.finished}
    return {
        name: [stages[rl_label(name, seed)].metrics for seed in recipe.rl.seeds]
        for name in recipe.rl.arms
    }


def _swapped(pair: Mapping[str, Any]) -> dict[str, Any]:
    verdict = {"better": "worse", "worse": "better"}.get(pair["verdict"], pair["verdict"])
    difference = pair["difference"]
    return dict(pair) | {
        "candidate": pair["baseline"],
        "baseline": pair["candidate"],
        "rate": 1 - pair["rate"],
        "low": 1 - pair["high"],
        "high": 1 - pair["low"],
        "wins": pair["losses"],
        "losses": pair["wins"],
        "verdict": verdict,
        "difference": {
            "mean": -difference["mean"],
            "stderr": difference["stderr"],
            "low": -difference["high"],
            "high": -difference["low"],
        },
    }


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return (
        json.dumps(value)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
