"""A sweep's page: a plot an axis, and the verdicts over the clusters."""

from collections.abc import Mapping
from typing import Any

from salsa.report.figures import Figure, colour, error_bar, layout
from salsa.report.page import render_template

SHOWN = 6
"""Plots per axis at most: the first so many (measure, at)."""


def page(summary: Mapping[str, Any]) -> str:
    """`sweep.html` from `sweep.json`."""
    return render_template(
        "sweep.html", figures_of(summary), report={"name": summary["name"]}, sweep=summary
    )


def figures_of(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Element id → figure: the effect against the values of every axis that has several, a subject a colour."""
    rows, made = summary["rows"], {}
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    kinds = list(dict.fromkeys((row["measure"], row["at"]) for row in rows))
    verdicts = {(v["measure"], v["at"]) for v in summary["verdicts"]}
    kinds = [kind for kind in kinds if kind in verdicts] or kinds
    for number, (axis, values) in enumerate(summary["axes"].items()):
        if len(values) < 2:
            continue
        for index, (measure, at) in enumerate(kinds[:SHOWN]):
            data = []
            for subject in subjects:
                own = [
                    r
                    for r in rows
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
                        "marker": {"color": colour(subject, subjects), "size": 8},
                    }
                )
            made[f"sweep-{number}-{index}"] = {
                "data": data,
                "layout": layout(f"{measure}, {at}", axis, "minus the baseline"),
            }
    return made
