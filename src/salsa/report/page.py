"""One self-contained HTML page: no network, phone and desktop, light and dark. Model text is always escaped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from salsa.analysis.gap import gaps
from salsa.artifacts import finite, read_jsonl, to_json, write_atomic
from salsa.evaluate.results import Results, summarise, verdict_rows
from salsa.report import alarms, figures, frontier, judged_figures
from salsa.report import forecast as forecast_view
from salsa.report import landscape as landscape_view
from salsa.report.pairs import Pair, agreement, matrices, matrix, of_verdict, seed_tables, sentence
from salsa.report.replies import side_by_side
from salsa.stages.directory import RunDirectory


def write_report(
    results: Results,
    run: RunDirectory,
    *,
    key: str | None = None,
    forecast: Mapping[str, Any] | None = None,
    landscape: Mapping[str, Any] | None = None,
    doctor: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.json` and `report.html` into the run directory; `landscape` is the content of `landscape.json`.

    `key` is as of `stages.directory.report_key`, `forecast` as of `analysis.forecast.forecast`, if the recipe asks,
    `doctor` as of `doctor.findings.Diagnosis.as_json`.
    """
    summary = summarise(results) | {"forecast": None, "landscape": landscape, "doctor": doctor}
    if forecast:
        summary["forecast"] = {**forecast, "trained": gaps(forecast, summary)}
    if key:
        summary["key"] = key
    rows = {
        name: [read_jsonl(one.path / "samples.jsonl") for one in of_arm]
        for name, of_arm in results.samples.items()
    }
    verdicts = [row for bench in results.benches for row in verdict_rows(bench)]
    recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    html = render(summary, rows, results.curves, recipe, verdicts)
    _write(run, "report", summary, html)


def write_forecast(name: str, forecast: Mapping[str, Any], run: RunDirectory) -> None:
    """Write `forecast.json` and `forecast.html` into the run directory."""
    plots, parts = forecast_view.all_figures(forecast), _forecast_parts(forecast)
    html = render_template("forecast_page.html", plots, report={"name": name}, **parts)
    _write(run, "forecast", forecast, html)


def write_landscape(name: str, landscape: Mapping[str, Any], run: RunDirectory) -> None:
    """Write `landscape.json` and `landscape.html` into the run directory."""
    plots, parts = landscape_view.all_figures(landscape), {"landscape": landscape}
    html = render_template("landscape.html", plots, report={"name": name}, **parts)
    _write(run, "landscape", landscape, html)


def _write(run: RunDirectory, name: str, record: Mapping[str, Any], html: str) -> None:
    write_atomic(run.path / f"{name}.html", html)
    # after the page, for it has the key by which a report is known to be there
    write_atomic(run.path / f"{name}.json", to_json(record))


def render(
    summary: Mapping[str, Any],
    rows: figures.Runs,
    curves: figures.Runs,
    recipe_yaml: str,
    verdicts: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page.

    Args:
        summary: `report.json`.
        rows: arm → seed → samples.
        curves: arm → seed → metrics of its training.
        recipe_yaml: what was asked for.
        verdicts: `results.verdict_rows` of every benchmark.
    """
    arms, benches = list(summary["arms"]), summary["benchmarks"]
    forecast, landscape = summary.get("forecast"), summary.get("landscape")
    plots = (
        figures.all_figures(summary, rows, curves)
        | frontier.all_figures(summary, curves)
        | judged_figures.all_figures(summary, verdicts)
    )
    seeds = {arm: [one["seed"] for one in of["seeds"]] for arm, of in summary["arms"].items()}
    raised = alarms.alarms_of(curves, seeds, summary["scores"][1:])
    alarms.mark(plots, raised, curves, arms)
    series = frontier.series(summary, curves)
    if forecast:
        plots |= forecast_view.all_figures(forecast)
    if landscape:
        plots |= landscape_view.all_figures(landscape)
    replies = side_by_side(rows, summary["scores"], seeds[arms[0]])
    return render_template(
        "page.html",
        plots,
        report=summary,
        headline=headline(summary),
        against=against_baseline(summary),
        matrices=matrices(summary["pairs"]),
        seed_tables=seed_tables(summary["pairs"]),
        judged={name: matrix(bench["pairs"]) for name, bench in benches.items()},
        outside={
            name: sorted({p["baseline"] for p in bench["pairs"]} - set(arms))
            for name, bench in benches.items()
        },
        replies=replies,
        replies_json=Markup(script_json(replies)),
        landscape=landscape,
        doctor=summary.get("doctor"),
        curves=bool(curves),
        seeds=seeds[arms[0]],
        alarms=raised,
        watched=alarms.watched(curves),
        yardsticks=frontier.yardsticks(summary, curves),
        series=series,
        series_json=Markup(script_json(series)),
        num_verdicts=len(verdicts),
        verdicts=Markup(script_json(packed(verdicts))),
        recipe_yaml=recipe_yaml,
        usage=usage_rows(summary),
        total_minutes=sum(summary["times"].values()) / 60,
        **(_forecast_parts(forecast) if forecast else {"forecast": None}),
    )


def render_template(template: str, plots: Mapping[str, figures.Figure], **values: Any) -> str:
    """A template of this directory with its figures and plotly itself inside; text is escaped."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    environment.filters |= {"agreement": agreement, "of_verdict": of_verdict}
    environment.filters["slug"] = judged_figures.slug
    return environment.get_template(template).render(
        figures=Markup(script_json(plots)),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        **values,
    )


def _forecast_parts(forecast: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "forecast": forecast,
        "table": forecast_view.table(forecast),
        "sentences": forecast_view.sentences(forecast),
        "caveats": forecast_view.caveats(forecast),
    }


def usage_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each trained arm and one for all other stages: seconds, tokens, and cost if an hour has a price."""
    times, usage = summary["times"], summary.get("usage") or {}
    price = summary["recipe"].get("engine", {}).get("price_per_hour")
    of_arms = {stage for arm in usage.values() for stage in arm["stages"]}
    rows = [
        {
            "name": name,
            "seconds": sum(times.get(stage, 0) for stage in arm["stages"]),
            "sampled": arm["tokens"]["rollout"],
            "trained": arm["tokens"]["update"],
        }
        for name, arm in usage.items()
    ]
    if rows:
        shared = sum(seconds for stage, seconds in times.items() if stage not in of_arms)
        rows.append(
            {"name": "all other stages", "seconds": shared, "sampled": None, "trained": None}
        )
    return [
        row | {"cost": None if price is None else row["seconds"] / 3600 * price} for row in rows
    ]


def headline(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per benchmark, score and trained arm that met the baseline, interval and verdict included."""
    sentences = []
    for name, bench in summary["benchmarks"].items():
        for pair in bench["pairs"]:  # the baseline is an arm, or one from outside
            if pair["baseline"] == summary["baseline"] or pair["baseline"] not in summary["arms"]:
                sentences.append(sentence(pair, name))
    for (arm, score), pair in against_baseline(summary).items():
        if summary["arms"][arm]["trained"] is not False:
            sentences.append(sentence(pair, score))
    return sentences


def against_baseline(summary: Mapping[str, Any]) -> dict[tuple[str, str], Pair]:
    """(arm, score) → its comparison with the baseline, the arm being the candidate."""
    return {
        (row, score): pair
        for score, cells in matrices(summary["pairs"]).items()
        for (row, column), pair in cells.items()
        if column == summary["baseline"]
    }


def packed(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows whose texts are numbers into one list: an answer is shown in many comparisons and stored once."""
    numbers: dict[str, int] = {}
    number = lambda text: numbers.setdefault(text, len(numbers))
    rows = [
        {key: value for key, value in row.items() if key != "lengths"}
        | {
            "asked": [number(text) for text in row["asked"]],
            "answers": [[number(text) for text in texts] for texts in row["answers"]],
            "judgments": [number(text) for text in row["judgments"]],
        }
        for row in verdicts
    ]
    return {"texts": list(numbers), "rows": rows}


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; what is not finite, which JSON has no word for, is null."""
    text = json.dumps(finite(value)).replace("<", "\\u003c")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
