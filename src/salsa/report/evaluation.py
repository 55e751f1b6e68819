"""The report of `salsa eval`: matrices with intervals, ratings, biases, and every verdict to read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from salsa.artifacts import write_atomic
from salsa.evaluate.results import Results, summarise, verdict_rows
from salsa.report import judged_figures
from salsa.report.figures import Figure, colour
from salsa.report.page import render_page, script_json
from salsa.report.pairs import matrices, matrix, sentence
from salsa.stages.directory import RunDirectory


def write_evaluation(results: Results, run: RunDirectory) -> None:
    """Write `report.json` and `report.html` into the evaluation's directory."""
    summary = summarise(results)
    verdicts = [row for bench in results.benches for row in verdict_rows(bench)]
    write_atomic(run.path / "report.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_atomic(run.path / "report.html", render(summary, verdicts, results.spec.to_yaml()))


def render(
    summary: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]], spec_yaml: str
) -> str:
    """The page.

    Args:
        summary: `report.json`.
        verdicts: `results.verdict_rows` of every benchmark.
        spec_yaml: what was asked for.
    """
    arms, benches = summary["arms"], summary["benchmarks"]
    return render_page(
        "evaluation.html",
        _figures(summary, verdicts),
        report=summary,
        headline=headline(summary),
        matrices={name: matrix(bench["pairs"]) for name, bench in benches.items()},
        baselines={
            name: others
            for name, bench in benches.items()
            if (others := sorted({p["baseline"] for p in bench["pairs"]} - set(arms)))
        },
        slugs={name: _slug(name) for name in benches},
        by_reward=matrices(summary["samples"]["pairs"]) if summary["samples"] else {},
        num_verdicts=len(verdicts),
        verdicts=Markup(script_json(packed(verdicts))),
        spec_yaml=spec_yaml,
    )


def headline(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per benchmark, reward and arm that met the baseline."""
    sentences = []
    for name, bench in summary["benchmarks"].items():
        outside = {p["baseline"] for p in bench["pairs"]} - set(summary["arms"])
        for pair in bench["pairs"]:
            if pair["baseline"] in {summary["baseline"], *outside}:
                sentences.append(sentence(pair, name))
    if summary["samples"]:
        for pair in summary["samples"]["pairs"]:
            if pair["baseline"] == summary["baseline"]:
                sentences.append(sentence(pair, pair["score"]))
    return sentences


def packed(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows whose texts are numbers into one list: an answer is shown in many comparisons and stored once."""
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

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


def _figures(
    summary: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    arms, figures = summary["arms"], {}
    for name, bench in summary["benchmarks"].items():
        slug, singles = _slug(name), bench["singles"]
        if singles and any(one["by_category"] for one in singles["arms"].values()):
            figures[f"{slug}-bars"] = judged_figures.category_bars(singles, arms)
            figures[f"{slug}-radar"] = judged_figures.category_radar(singles, arms)
        shown = [
            p
            for p in bench["pairs"]
            if p["baseline"] not in arms or p["baseline"] == summary["baseline"]
        ]
        if any(len(pair["by_category"]) > 1 for pair in shown):
            figures[f"{slug}-rates"] = judged_figures.rates_by_category(shown, arms)
        for number, pair in enumerate(bench["pairs"]):
            own = [row for row in verdicts if row["bench"] == name and _same(row, pair, summary)]
            if any(row["lengths"] and row["outcome"] is not None for row in own):
                title = f"{pair['candidate']} against {pair['baseline']}: length"
                figures[f"{slug}-length-{number}"] = judged_figures.length_against_verdict(
                    own, title, colour(pair["candidate"], arms)
                )
    return figures


def _same(row: Mapping[str, Any], pair: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    def arm(label: str) -> str:
        return summary["models"][label]["arm"] if label in summary["models"] else label

    return (arm(row["candidate"]), arm(row["baseline"])) == (pair["candidate"], pair["baseline"])


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
