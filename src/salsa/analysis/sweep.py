"""One recipe × a grid: every point a run directory, all on the same stages, so that what points share is made once.

runs/<name>/stages/                 the stages of all points; a link where sweeps share them (`stages:`)
runs/<name>/points/<point>/         recipe.yaml, report.html, forecast.html, …; its `stages` is a link to those
runs/<name>/sweep.json, .csv, .md, .tex, sweep.html     effects by point, frontiers, and verdicts over the clusters
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

from salsa.analysis.frontier import frontier
from salsa.analysis.paths import Policy
from salsa.analysis.policies import read_policies
from salsa.analysis.verdicts import judge
from salsa.artifacts import finite, locked, to_json, write_atomic
from salsa.config.recipe import Recipe
from salsa.config.sweep import SweepConfig
from salsa.errors import ConfigError, DataError, accessing
from salsa.planner import plan
from salsa.runtime.tracking import round_metric, say
from salsa.stages.directory import RunDirectory

RESULT = {name: f"{name}.json" for name in ("forecast", "landscape", "report")}
AVERAGE = "all"
"""What a row has on the axes of β where it is no single one."""
COLUMNS = ("subject", "baseline", "at", "measure", "effect", "low", "high")


@dataclass(frozen=True)
class Point:
    """One recipe of the grid."""

    name: str
    axes: dict[str, str]
    recipe: Recipe
    path: Path
    result: Path
    """Where its numbers are once it is finished."""


def points_of(config: SweepConfig, out: Path, only: str = "*") -> list[Point]:
    """The points of a sweep whose names match the pattern `only`.

    Raises:
        ConfigError: a point's recipe is wrong, two are equal, or none matches.
    """
    every = config.points()
    points = [
        Point(
            name, axes, recipe, out / "points" / name, out / "points" / name / RESULT[config.until]
        )
        for name, (axes, recipe) in every.items()
        if fnmatch(name, only)
    ]
    if not points:
        raise ConfigError(f"--only {only}: no point matches. They are: {', '.join(every)}.")
    return points


def run_sweep(
    config: SweepConfig,
    out: Path,
    run: Callable[..., Path],
    *,
    only: str = "*",
    jobs: int | None = None,
) -> Path:
    """Finish the points one after another, then write what they add up to; returns `out`. Resumable.

    Args:
        config: recipe and grid.
        out: the sweep's directory.
        run: `pipeline.run_recipe`.
        only: pattern of the points' names; the tables hold every finished point whatever it is.
        jobs: stages that run at once within a point.

    Raises:
        SalsaError: bad input, or work that failed; finished stages are kept.
    """
    points = points_of(config, out, only)
    stages = keeper_of_stages(config, out) / "stages"
    with accessing(out, "write"):
        stages.mkdir(parents=True, exist_ok=True)
        _link(out, stages)
    with locked(out / ".lock", out), locked(stages / ".lock", stages):
        for number, point in enumerate(points, start=1):
            say(f"point {number} of {len(points)}: {point.name}")
            _link(point.path, out / "stages")
            run(point.recipe, out=point.path, until=config.until, jobs=jobs)
        write_tables(config, [p for p in points_of(config, out) if p.result.exists()], out)
    return out


def keeper_of_stages(config: SweepConfig, out: Path) -> Path:
    """The directory whose `stages` a sweep in `out` fills: its own, or the one that it shares with others."""
    return out.parent / config.stages if config.stages else out


def plan_lines(
    points: Sequence[Point],
    keeper: Path,
    until: str,
    remaining: Callable[[Recipe, RunDirectory, Any], dict[str, str]],
) -> list[str]:
    """Points and jobs that are left, hours by what finished jobs of each kind took, memory of one job.

    Args:
        points: of the sweep.
        keeper: whose `stages` the sweep fills; nothing is written there.
        until: the sweep's last stage.
        remaining: `pipeline.remaining`.
    """
    run = RunDirectory(keeper)
    lines, left = [], dict[str, str]()
    for point in points:
        jobs = remaining(point.recipe, run, until)
        state = "finished" if point.result.exists() else f"{len(jobs.keys() - left)} more jobs"
        left |= jobs
        lines.append(f"{point.name}: {state}")
    to_do = sum(not point.result.exists() for point in points)
    memory = plan(points[0].recipe).splitlines()[-1]
    hours = _hours(Counter(map(_kind, left.values())), keeper)
    return [
        *lines,
        f"{len(points)} points, {to_do} to do, {len(left)} jobs: {hours}",
        f"each: {memory}",
    ]


def _kind(label: str) -> str:
    """`rl` of `rl salsa seed 0`, `sft` of `sft[0]`: jobs that take about as long."""
    return re.split(r"\W", label)[0]


def _hours(left: Mapping[str, int], keeper: Path) -> str:
    """How long jobs take, one after another, by the mean of the finished ones of their kind."""
    records = [
        json.loads(f.read_text(encoding="utf-8")) for f in keeper.glob("stages/*/stage.json")
    ]
    took: dict[str, list[float]] = {}
    for record in records:
        took.setdefault(_kind(record["stage"]), []).append(record["seconds"])
    counts = ", ".join(f"{count} {kind}" for kind, count in left.items())
    if not left:
        return "nothing is left"
    if unknown := sorted(left.keys() - took):
        return f"{counts}; hours are known once one of each is finished (none yet: {', '.join(unknown)})"
    hours = sum(count * fmean(took[kind]) for kind, count in left.items()) / 3600
    return f"{counts}; about {hours:.1f} h one after another"


def write_tables(config: SweepConfig, points: Sequence[Point], out: Path) -> None:
    """`sweep.json`, `.csv`, `.md`, `.tex` and `sweep.html`."""
    from salsa.report.sweep import page

    rows = [
        point.axes | effect
        for point in points
        for effect in effects_of(json.loads(point.result.read_text(encoding="utf-8")))
    ]
    frontiers, matched, notes = (
        frontiers_of(config, points) if config.until == "report" else ([], [], [])
    )
    for note in notes:
        say(note)
    rows += matched
    verdicts = verdicts_of(config, rows)
    summary = {
        "name": config.name,
        "recipe": os.path.normpath(config.recipe),
        "axes": {axis: list(dict.fromkeys(p.axes[axis] for p in points)) for axis in config.grid},
        "points": [point.name for point in points],
        "rows": rows,
        "verdicts": verdicts,
        "frontiers": frontiers,
        "notes": notes,
    }
    columns = [*config.grid, *COLUMNS]
    write_atomic(out / "sweep.json", to_json(summary))
    write_atomic(out / "sweep.csv", as_csv(columns, rows))
    shown = verdicts or rows
    write_atomic(out / "sweep.md", as_markdown(shown))
    write_atomic(out / "sweep.tex", as_latex(shown))
    write_atomic(out / "sweep.html", page(summary))


def effects_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What one point found, an effect a row.

    Of a forecast its comparisons, of a landscape every place against its first model, of a run every arm against the
    baseline.
    """
    if "comparisons" in result:
        return [
            _effect(one["candidate"], result["baseline"], f"equal {one['matched_by']}", name, e)
            for one in result["comparisons"]
            for name, e in one["differences"].items()
            if name != one["matched_by"]
        ]
    if "places" in result:
        return _effects_of_places(result)
    rows = []
    for pair in result["pairs"]:
        if pair["baseline"] == result["baseline"]:
            score, names = pair["score"], (pair["candidate"], pair["baseline"], "held-out prompts")
            points = {key: 100 * (pair[key] - 0.5) for key in ("low", "high")}
            rate = points | {"mean": 100 * (pair["rate"] - 0.5)}
            rows.append(_effect(*names, f"{score} win rate", rate))
            rows.append(_effect(*names, score, pair["difference"]))
    return rows


def _effects_of_places(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every place against the first model; of the loss its negative, so that more is better in every verdict."""
    axes = ("x", "y") if len(result["models"]) > 2 else ("α",)
    first, *others = (
        ", ".join(f"{axis}={x:g}" for axis, x in zip(axes, place["at"], strict=True))
        for place in result["places"]
    )
    between, rows = f"between {', '.join(result['models'])}", []
    for here, place in zip(others, result["places"][1:], strict=True):
        for name, e in place["minus_first"].items():
            if name == "loss":
                name, e = (
                    "log-likelihood",
                    {"mean": -e["mean"], "low": -e["high"], "high": -e["low"]},
                )
            rows.append(_effect(here, first, between, name, e))
    return rows


def frontiers_of(
    config: SweepConfig, points: Sequence[Point]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The frontiers of finished runs over β, an effect a row at equal KL, and why a frontier is missing.

    Points that differ on another axis than the clusters' and β's have frontiers of their own. The row of a level that
    is the baseline's KL at some β stands at that β; one that is averaged over the KL at `AVERAGE`.
    """
    betas = config.beta_axes
    fixed = [axis for axis in config.grid if axis not in (*betas, config.cluster)]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(point.axes[axis] for axis in fixed), []).append(point)
    frontiers, rows, notes = [], [], []
    for chosen, group in groups.items():
        axes = dict(zip(fixed, chosen, strict=True))
        where = "".join(f" at {axis}={value}" for axis, value in axes.items())
        try:
            made, effects = _frontiers(config, group, betas)
        except DataError as error:
            notes.append(f"no frontiers{where}: {str(error).removeprefix('frontier: ')}")
            continue
        frontiers += [{"axes": axes} | one for one in made]
        rows += effects
    return frontiers, rows, notes


def _frontiers(
    config: SweepConfig, points: Sequence[Point], betas: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The frontiers of one group, one a yardstick, and the rows of them all."""
    policies: list[Policy] = []
    places: dict[tuple[str, float | None], dict[str, str]] = {}
    for point in points:
        report = json.loads(point.result.read_text(encoding="utf-8"))
        cluster = point.axes[config.cluster] if config.cluster else ""
        new = read_policies(point.recipe, point.path, report, point=point.name, cluster=cluster)
        policies += new
        for policy in new:
            if policy.arm == report["baseline"]:
                places.setdefault((cluster, policy.beta), point.axes)
                places.setdefault((cluster, None), point.axes | dict.fromkeys(betas, AVERAGE))
    recipe = points[0].recipe
    yardsticks = [*(f"kl_to_{model}" for model in recipe.eval.kl_to), "kl_own"]
    frontiers, rows = [], []
    for yardstick in yardsticks:
        if not any(yardstick in policy.columns for policy in policies):
            continue
        made = frontier(policies, recipe.eval.baseline, yardstick)
        for row in made.pop("rows"):
            names = (row["subject"], row["baseline"], row["at"], row["measure"])
            rows.append(
                places[row["cluster"], row["beta"]] | _effect(*names, row | {"mean": row["effect"]})
            )
        frontiers.append(made)
    return frontiers, rows


def verdicts_of(config: SweepConfig, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for every effect that has a margin, over the values of the cluster axis."""
    others = [axis for axis in config.grid if axis != config.cluster]
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["measure"] in config.margins:
            key = tuple(row[k] for k in (*others, "subject", "baseline", "at", "measure"))
            groups.setdefault(key, []).append(row["effect"])
    verdicts = []
    for key, effects in groups.items():
        named = dict(zip((*others, "subject", "baseline", "at", "measure"), key, strict=True))
        made = asdict(judge(effects, margin=config.margins[named["measure"]]))
        verdicts.append(named | finite({name: _rounded(value) for name, value in made.items()}))
    return verdicts


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """All rows, one effect a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a README."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A `tabular` for a paper."""
    names = list(rows[0]) if rows else []
    lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
    special = str.maketrans(
        {c: f"\\{c}" for c in "_%&#${}"}
        | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        | {"α": r"$\alpha$", "β": r"$\beta$", "±": r"$\pm$", "–": "--"}
    )
    body = "".join(" & ".join(c.translate(special) for c in cells) + " \\\\\n" for cells in lines)
    return f"\\begin{{tabular}}{{{'l' * len(names)}}}\n{body}\\end{{tabular}}\n"


def read_lines(out: Path) -> list[str]:
    """The verdicts of a sweep for a terminal, and where the rest is."""
    summary = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    lines = [
        f"{v['subject']} against {v['baseline']}, {v['at']}, {v['measure']}: {v['verdict']} "
        f"({_cell(v['effect'])} [{_cell(v['low'])}, {_cell(v['high'])}], {v['clusters']} clusters, "
        f"margin {v['margin']:g}, clusters needed {_cell(v['clusters_needed'])})"
        for v in summary["verdicts"]
    ]
    return [*lines, f"sweep: {out / 'sweep.html'}"]


def _effect(
    subject: str, baseline: str, at: str, measure: str, estimate: Mapping[str, float]
) -> dict[str, Any]:
    values = (estimate["mean"], estimate["low"], estimate["high"])
    return dict(
        zip(COLUMNS, (subject, baseline, at, measure, *map(round_metric, values)), strict=True)
    )


def _rounded(value: Any) -> Any:
    return round_metric(value) if isinstance(value, float) else value


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "–" if value is None else str(value)


def _link(run: Path, stages: Path) -> None:
    """`run/stages` is a link to `stages`; ConfigError if it is something else."""
    run.mkdir(parents=True, exist_ok=True)
    link = run / "stages"
    if link.is_symlink() and not link.exists():
        link.unlink()  # what it led to is gone
    if not link.exists():
        link.symlink_to(os.path.relpath(stages, run), target_is_directory=True)
    if not link.samefile(stages):
        raise ConfigError(
            f"{link}: holds the stages of {link.resolve().parent}, and the sweep's lie in {stages}. Give --out another "
            "directory, or the `stages` that it was begun with."
        )
