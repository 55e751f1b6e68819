"""A forecast as the page and the terminal show it: frontiers without RL, and what equal things cost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa.report.figures import Figure, colour, error_bar, layout

TITLES = {
    "kl_own": "KL to own reference",
    "value": "value",
    "length": "length",
    "beta": "β",
}


def all_figures(forecast: Mapping[str, Any]) -> dict[str, Figure]:
    """Element id → figure: every score against the KL to every yardstick."""
    columns = ["kl_own", *(f"kl_to_{model}" for model in forecast["kl_to"])]
    return {
        f"forecast-{number}-{score}": _frontier(forecast, score, column)
        for score in forecast["scores"]
        for number, column in enumerate(columns)
    }


def title(column: str) -> str:
    """A column's name in words."""
    if column.startswith("kl_to_"):
        return f"KL to {column.removeprefix('kl_to_')}"
    return TITLES.get(column, column)


def table(forecast: Mapping[str, Any]) -> dict[str, Any]:
    """Titles of the columns, and a row for every comparison: candidate, what is equal, and the differences."""
    columns = [*forecast["scores"], *(f"kl_to_{m}" for m in forecast["kl_to"])]
    columns += ["kl_own", "length", "value"]
    rows = []
    for one in forecast["comparisons"]:
        cells = [
            None if column == one["matched_by"] else one["differences"][column]
            for column in columns
        ]
        equal = f"equal {title(one['matched_by'])}"
        rows.append({"candidate": one["candidate"], "equal": equal, **one, "cells": cells})
    return {"titles": [title(column) for column in columns], "rows": rows}


def sentences(forecast: Mapping[str, Any]) -> list[str]:
    """What every candidate is worth in the optimised score at equal KL, by each yardstick."""
    score, lines = forecast["scores"][0], []
    for one in forecast["comparisons"]:
        e = one["differences"][score]
        if not one["matched_by"].startswith("kl_"):
            continue
        word = "more" if e["low"] > 0 else "less" if e["high"] < 0 else "not resolved"
        lines.append(
            f"{one['candidate']} against {forecast['baseline']} at equal {title(one['matched_by'])} "
            f"({one['level']:.3g}): {score} {e['mean']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}], {word}."
        )
    return lines


def caveats(forecast: Mapping[str, Any]) -> list[str]:
    """What the forecast could not know."""
    wanted, beta = forecast["wanted_beta"], forecast["beta"]
    if beta <= wanted * 1.001:
        return []
    return [
        f"{forecast['num_samples']} replies a prompt are too few to know the optimum at β {wanted:g}: the comparison "
        f"is made at β {beta:.3g}. About {forecast['samples_for_wanted_beta']:,} replies a prompt would do."
    ]


def lines(forecast: Mapping[str, Any]) -> list[str]:
    """The forecast for a terminal."""
    own = table(forecast)
    head = ["candidate", "at", *own["titles"]]
    body = [
        [row["candidate"], f"{row['equal']} {row['level']:.3g}"]
        + [
            "=" if e is None else f"{e['mean']:+.3f}±{(e['high'] - e['low']) / 2:.3f}"
            for e in row["cells"]
        ]
        for row in own["rows"]
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    shown = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in [head, *body]
    ]
    return [
        f"{forecast['num_prompts']} prompts x {forecast['num_samples']} replies; each minus {forecast['baseline']}; "
        "95 % over prompts",
        *(line.rstrip() for line in shown),
        *caveats(forecast),
    ]


def read_lines(run: Path) -> list[str]:
    """As `lines`, of the forecast in a run directory."""
    return lines(json.loads((run / "forecast.json").read_text(encoding="utf-8")))


def _frontier(forecast: Mapping[str, Any], score: str, column: str) -> Figure:
    """A line per reference, a point per β that has samples enough; dotted: best of n, by its bound on the KL."""
    names, data = forecast["references"], []
    for name in names:
        rows = [row for row in forecast["frontiers"][name] if "columns" in row]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [row["columns"][column]["mean"] for row in rows],
                "y": [row["columns"][score]["mean"] for row in rows],
                "error_y": error_bar([row["columns"][score] for row in rows]),
                "text": [
                    f"β {row['beta']:.3g}, effective samples {row['ess']:.0f}" for row in rows
                ],
                "line": {"color": colour(name, names), "width": 2},
                "marker": {"size": 4},
            }
        )
        if column == "kl_own":
            best = forecast["best_of"][name]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "showlegend": False,
                    "x": [row["kl_bound"] for row in best],
                    "y": [row["columns"][score]["mean"] for row in best],
                    "text": [f"{name}, best of {row['n']}" for row in best],
                    "line": {"color": colour(name, names), "width": 1, "dash": "dot"},
                    "marker": {"size": 4, "symbol": "circle-open"},
                }
            )
    return {
        "data": data,
        "layout": layout(f"{score} at the optimum", f"{title(column)} (nats per response)", score),
    }
