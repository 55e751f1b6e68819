"""A sweep's page: the verdicts over the clusters, the frontiers, and a plot an axis."""

from collections.abc import Mapping, Sequence
from typing import Any

from salsa.report.figures import Figure, colour, error_bar, layout
from salsa.report.page import render_template

SHOWN = 6
"""Plots per axis at most: the first so many (measure, at)."""


def page(summary: Mapping[str, Any]) -> str:
    """`sweep.html` from `sweep.json`."""
    return render_template(
        "sweep.html",
        figures_of(summary) | frontier_figures(summary),
        report={"name": summary["name"]},
        sweep=summary,
        parted=parted_sentences(summary),
    )


def figures_of(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Element id → figure: the effect against the values of every axis that has several, a subject a colour."""
    rows, made = summary["rows"], {}
    names = names_of(summary)
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    verdicts = {(v["measure"], v["at"]) for v in summary["verdicts"]}
    for number, (axis, values) in enumerate(summary["axes"].items()):
        if len(values) < 2:
            continue
        here = [
            row for row in rows if row[axis] in values
        ]  # an average over β has no place on its axis
        kinds = list(dict.fromkeys((row["measure"], row["at"]) for row in here))
        kinds = [kind for kind in kinds if kind in verdicts] or kinds
        for index, (measure, at) in enumerate(kinds[:SHOWN]):
            data = []
            for subject in subjects:
                own = [
                    r
                    for r in here
                    if (r["subject"], r["measure"], r["at"]) == (subject, measure, at)
                ]
                data.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "name": subject,
                        "x": [row[axis] for row in own],
                        "y": [row["effect"] for row in own],
                        "error_y": error_bar([row | {"mean": row["effect"]} for row in own]),
                        "marker": {"color": colour(subject, names), "size": 8},
                    }
                )
            made[f"sweep-{number}-{index}"] = {
                "data": data,
                "layout": layout(f"{measure}, {at}", axis, "minus the baseline"),
            }
    return made


def names_of(summary: Mapping[str, Any]) -> list[str]:
    """Baselines, candidates and the arms of frontiers, each once: their places are their colours."""
    rows = summary["rows"]
    baselines, subjects = ([row[key] for row in rows] for key in ("baseline", "subject"))
    arms = [arm for one in summary["frontiers"] for arm in one["arms"]]
    return list(dict.fromkeys([*baselines, *subjects, *arms]))


def frontier_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Element id → figure: every score against the KL to every yardstick, over β and (dotted) over training."""
    names, made = names_of(summary), {}
    for number, one in enumerate(summary["frontiers"]):
        where = "".join(f", {axis} {value}" for axis, value in one["axes"].items())
        for score in one["scores"]:
            data: list[dict[str, Any]] = []
            for arm, own in one["arms"].items():
                line = {"color": colour(arm, names), "width": 2}
                data.append(_over_beta(arm, own["points"], score, line))
                for beta in dict.fromkeys(row["beta"] for row in own["training"]):
                    way = [row for row in own["training"] if row["beta"] == beta]
                    data.append(
                        {
                            "type": "scatter",
                            "mode": "lines",
                            "showlegend": False,
                            "opacity": 0.4,
                            "x": [row["kl"] for row in way],
                            "y": [row[score] for row in way],
                            "text": [f"{arm}, β {beta:g}, update {row['step']}" for row in way],
                            "line": line | {"width": 1, "dash": "dot"},
                        }
                    )
            made[f"frontier-{number}-{score}"] = {
                "data": data,
                "layout": layout(f"{score}{where}", f"{one['title']} (nats per response)", score),
            }
    return made


def _over_beta(
    arm: str, points: Sequence[Mapping[str, Any]], score: str, line: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": arm,
        "x": [point["kl"]["mean"] for point in points],
        "y": [point[score]["mean"] for point in points],
        "error_x": error_bar([point["kl"] for point in points]),
        "error_y": error_bar([point[score] for point in points]),
        "text": ["init" if p["beta"] is None else f"β {p['beta']:g}" for p in points],
        "line": line,
        "marker": {"size": 7},
    }


def parted_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Where every arm's held-out scores leave the trained one."""
    lines = []
    for one in summary["frontiers"]:
        for arm, own in one["arms"].items():
            for row in own["parted"]:
                end = row[f"best_{one['scores'][0]}_kl"]
                found = (
                    f"{row['score']} and {one['scores'][0]} do not part"
                    if row["kl"] is None
                    else f"{row['score']} is best at {row['kl']:.3g} nats, {one['scores'][0]} at {end:.3g}: "
                    f"it loses {row['lost']:.3g}"
                )
                lines.append(
                    f"{arm}, {one['title']}: {found} (they part in {row['share']:.0%} of resamples)."
                )
    return lines
