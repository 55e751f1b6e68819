"""One self-contained HTML page: no network, phone and desktop, light and dark. Model text is always escaped."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from salsa.artifacts import Checkpoint, read_jsonl, write_atomic
from salsa.config import Recipe
from salsa.evaluate.summary import summarise
from salsa.report import figures
from salsa.report.pairs import Pair, matrices, sentence
from salsa.stages.directory import RunDirectory, policy_label

COMPLETIONS = 24
"""Prompts shown side by side, drawn at random with a fixed seed."""


def write_report(
    recipe: Recipe, run: RunDirectory, samples: Mapping[str, Sequence[Checkpoint]], key: str
) -> None:
    """Write `report.json` and `report.html` into the run directory; `key` as of `stages.directory.report_key`."""
    summary = summarise(recipe, run.finished, samples) | {"key": key}
    rows = {
        name: [read_jsonl(one.path / "samples.jsonl") for one in of_arm]
        for name, of_arm in samples.items()
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
    return render_page(
        "page.html",
        figures.all_figures(summary, rows, curves),
        report=summary,
        headline=headline(summary),
        against=against_baseline(summary),
        matrices=matrices(summary["pairs"]),
        completions=completions(rows),
        recipe_yaml=recipe_yaml,
        total_minutes=sum(summary["times"].values()) / 60,
    )


def render_page(template: str, plots: Mapping[str, figures.Figure], **values: Any) -> str:
    """A template of this directory with its figures and plotly itself inside; text is escaped."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    return environment.get_template(template).render(
        figures=Markup(script_json(plots)),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        **values,
    )


def headline(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per arm and score that compares it with the baseline, intervals and verdict included."""
    return [
        sentence(pair, score)
        for (name, score), pair in against_baseline(summary).items()
        if name != "sft"
    ]


def against_baseline(summary: Mapping[str, Any]) -> dict[tuple[str, str], Pair]:
    """(arm, score) → its comparison with the baseline, the arm being the candidate."""
    return {
        (row, score): pair
        for score, cells in matrices(summary["pairs"]).items()
        for (row, column), pair in cells.items()
        if column == summary["baseline"]
    }


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
        name: [stages[policy_label(name, seed)].metrics for seed in recipe.rl.seeds]
        for name in recipe.rl.arms
    }


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return (
        json.dumps(value)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
