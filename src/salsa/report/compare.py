"""`salsa report A B C`: several runs on one page: settings that differ, scores, win rates, curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import to_json, write_atomic
from salsa.errors import ConfigError
from salsa.evaluate.results import pairs_of
from salsa.report import figures
from salsa.report.page import render_template, usage_rows
from salsa.run import Run

Summaries = Mapping[str, Mapping[str, Any]]
"""Name of a run → its `report.json`."""


def compare_runs(directories: Sequence[Path], out: Path, *, force: bool = False) -> None:
    """Write the page `out`, and beside it the same as JSON.

    Raises:
        ConfigError: fewer than two runs, `out` is no .html, or it or the JSON is there and `force` is off.
        CheckpointError: a run has no report yet.
    """
    if out.suffix != ".html":
        raise ConfigError(f"{out}: the page is HTML, and JSON goes beside it. End --out in .html.")
    for file in (out, out.with_suffix(".json")):
        if file.exists() and not force:
            raise ConfigError(f"{file}: exists. Name another with --out, or --force to replace it.")
    if len(set(directories)) < 2:
        raise ConfigError("report: give two or more run directories to compare, or one recipe.")
    runs = {name: Run(path) for name, path in zip(_names(directories), directories, strict=True)}
    reports = {name: run.report for name, run in runs.items()}
    tables = {name: _tables(runs[name], reports[name]) for name in runs}
    paired, why_not = across(tables, reports)
    comparison = {
        "runs": {name: str(run.path) for name, run in runs.items()},
        "settings": settings_that_differ(
            {name: run.recipe.model_dump(mode="json") for name, run in runs.items()}
        ),
        "scores": score_rows(reports),
        "win_rates": win_rate_rows(reports),
        "between_runs": paired,
    }
    usage = {name: _total(report) for name, report in reports.items()}
    curves = {
        f"{name} {arm}": [run.metrics(arm, seed) for seed in run.seeds]
        for name, run in runs.items()
        for arm in run.arms
    }
    order = [f"{name} {arm}" for name, report in reports.items() for arm in report["arms"]]
    html = render_template(
        "compare.html",
        curve_figures(curves, order, reports),
        report={"name": " · ".join(runs)},
        comparison=comparison,
        measures=_measures(reports),
        usage=usage,
        why_not=why_not,
        order=order,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out.with_suffix(".json"), to_json(comparison))
    write_atomic(out, html)


def settings_that_differ(recipes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a setting, by its dotted key, of those that are not the same in all runs; None where a run has none."""
    flat = {name: _flat(recipe) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = []
    for key in keys:
        values = {name: settings.get(key) for name, settings in flat.items()}
        if key != "name" and len({json.dumps(value) for value in values.values()}) > 1:
            rows.append({"key": key, "values": values})
    return rows


def score_rows(reports: Summaries) -> list[dict[str, Any]]:
    """A row a run and arm: means with their intervals, of every measure that it has."""
    return [
        {"run": name, "arm": arm, "mean": of_arm["mean"]}
        for name, report in reports.items()
        for arm, of_arm in report["arms"].items()
    ]


def win_rate_rows(reports: Summaries) -> list[dict[str, Any]]:
    """A row a run, score and pair of arms, as each run's own report has it."""
    return [
        {"run": name} | {key: value for key, value in pair.items() if key != "by_seed"}
        for name, report in reports.items()
        for pair in report["pairs"]
    ]


def across(
    tables: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], reports: Summaries
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every arm of the later runs against the arm of that name in the first; and why some are not compared.

    Only runs that answered the same prompts with as many seeds, scored by the same functions or reward model; the
    intervals are those of a run's own report.
    """
    first, *others = tables
    rows, why_not = [], []
    for name in others:
        reasons = _unlike(tables[first], tables[name], reports[first], reports[name])
        if reasons:
            why_not.append(f"{name} and {first} are not compared reply by reply: {reasons}.")
            continue
        for arm in [arm for arm in tables[name] if arm in tables[first]]:
            pair = {first: tables[first][arm], name: tables[name][arm]}
            for score in _shared_scores(reports[first], reports[name]):
                (row,) = pairs_of(score, pair, [first, name])
                rows.append({"arm": arm} | {k: v for k, v in row.items() if k != "by_seed"})
    return rows, why_not


def curve_figures(
    curves: figures.Runs, order: Sequence[str], reports: Summaries
) -> dict[str, figures.Figure]:
    """Element id → learning curves of all runs and arms; an arm that logged nothing is left out."""
    logged = {name: seeds for name, seeds in curves.items() if all(seeds)}
    held_out = dict.fromkeys(s for report in reports.values() for s in report["scores"][1:])
    titles = figures.CURVES | {score: f"{score} (not trained on)" for score in held_out}
    return {
        f"curve-{name}": figures.curve(name, title, logged, order)
        for name, title in titles.items()
        if any(figures.logged_by_all(name, seeds) for seeds in logged.values())
    }


def _tables(run: Run, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arm → column → values [seeds, prompts], and the prompts themselves under `prompt`."""
    made = {}
    for arm in report["arms"]:
        rows = [run.samples(arm, seed) for seed in run.seeds]
        made[arm] = {
            column: np.array([[row[column] for row in seed] for seed in rows])
            for column in ("prompt", *report["scores"])
        }
    return made


def _unlike(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    report: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> str:
    mine, prompts = (next(iter(table.values()))["prompt"] for table in (one, other))
    if mine.shape != prompts.shape or not (mine == prompts).all():
        return "other held-out prompts, or another number of seeds"
    return "" if _shared_scores(report, theirs) else "no score that is the same in both"


def _shared_scores(report: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Scores that mean the same in both: functions that are equal, and a reward model of equal bytes."""
    evals = [r["recipe"].get("eval", {}) for r in (report, other)]
    functions = [one.get("scores", {}) | one.get("reward_models", {}) for one in evals]
    shared = [name for name in functions[0] if functions[0][name] == functions[1].get(name)]
    outputs = [
        {s["stage"]: s["output"] for s in r["stages"] if s["stage"].startswith("reward")}
        for r in (report, other)
    ]
    settings = [r["recipe"].get("reward") for r in (report, other)]
    same_model = outputs[0] == outputs[1] and (outputs[0] or settings[0] == settings[1])
    return (["proxy"] if same_model else []) + shared


def _measures(reports: Summaries) -> list[str]:
    """Columns of the table of scores, those of the first run first."""
    wanted = [
        [*report["scores"], *(f"kl_to_{model}" for model in report["kl_to"]), "length"]
        for report in reports.values()
    ]
    return list(dict.fromkeys(name for names in wanted for name in names))


def _total(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = usage_rows(report)
    costs = [row["cost"] for row in rows]
    return {
        "seconds": sum(report["times"].values()),
        "tokens": sum(row["sampled"] or 0 for row in rows) if rows else None,
        "cost": sum(costs) if rows and None not in costs else None,
    }


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where two would be called the same."""
    short = [path.resolve().name for path in directories]
    return short if len(set(short)) == len(short) else [str(path) for path in directories]


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in _flat(inner, f"{where}.{name}" if where else str(name)).items()
        }
    return {where: value}
