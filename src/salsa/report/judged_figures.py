"""Figures of judged benchmarks: ratings by category as bars and radar, and verdicts against length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from salsa.report.figures import Figure, colour, error_bar, layout

Ratings = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Arm → category → mean rating and its interval."""
BINS = 8
"""Length differences are shown in so many groups of equal size."""


def all_figures(
    summary: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Element id → figure; the ids of one benchmark begin with its `slug`."""
    arms, figures = list(summary["arms"]), {}
    arm_of = {m["label"]: name for name, arm in summary["arms"].items() for m in arm["seeds"]}
    sides = lambda row: [arm_of.get(row[side], row[side]) for side in ("candidate", "baseline")]
    judged = [row for row in verdicts if row["lengths"] and row["outcome"] is not None]
    for name, bench in summary["benchmarks"].items():
        rated = bench["singles"]["arms"] if bench["singles"] else {}
        ratings = {arm: one["by_category"] for arm, one in rated.items()}
        if any(ratings.values()):
            bars = [_bars(arm, groups, colour(arm, arms)) for arm, groups in ratings.items()]
            axes = layout("rating by category", "", "1 to 10")
            figures[f"{slug(name)}-bars"] = {"data": bars, "layout": axes}
            figures[f"{slug(name)}-radar"] = category_radar(ratings, arms)
        others = set(arms) - {summary["baseline"]}
        shown = [pair for pair in bench["pairs"] if pair["baseline"] not in others]
        if any(len(pair["by_category"]) > 1 for pair in shown):
            figures[f"{slug(name)}-rates"] = rates_by_category(shown, arms)
        for number, pair in enumerate(bench["pairs"]):
            names = [pair["candidate"], pair["baseline"]]
            own = [row for row in judged if row["bench"] == name and sides(row) == names]
            if own:
                title, slot = f"{names[0]} against {names[1]}: length", colour(names[0], arms)
                figures[f"{slug(name)}-length-{number}"] = length_against_verdict(own, title, slot)
    return figures


def slug(name: str) -> str:
    """A benchmark's name as the beginning of an element's id."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _bars(name: str, estimates: Mapping[str, Mapping[str, float]], slot: str) -> dict[str, Any]:
    """A bar per category, with its 95 % interval."""
    return {
        "type": "bar",
        "name": name,
        "x": list(estimates),
        "y": [e["mean"] for e in estimates.values()],
        "error_y": error_bar(list(estimates.values())),
        "marker": {"color": slot},
    }


def category_radar(ratings: Ratings, arms: Sequence[str]) -> Figure:
    """Mean rating by category as a radar, an arm a colour, closed."""
    data = []
    for arm, groups in ratings.items():
        names = [*groups, next(iter(groups))]
        means = [groups[name]["mean"] for name in names]
        line = {"color": colour(arm, arms), "width": 2}
        data.append({"type": "scatterpolar", "name": arm, "theta": names, "r": means, "line": line})
    polar = {"polar": {"radialaxis": {"range": [0, 10]}, "domain": {"y": [0, 0.86]}}}
    return {"data": data, "layout": layout("rating by category", "", "") | polar}


def rates_by_category(pairs: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> Figure:
    """Win rate by category of every pair against the baseline, with 95 % intervals."""
    data = []
    for pair in pairs:
        rates = {c: rate | {"mean": rate["rate"]} for c, rate in pair["by_category"].items()}
        name = f"{pair['candidate']} against {pair['baseline']}"
        data.append(_bars(name, rates, colour(pair["candidate"], arms)))
    return {"data": data, "layout": layout("win rate by category", "", "win rate")}


def length_against_verdict(rows: Sequence[Mapping[str, Any]], title: str, slot: str) -> Figure:
    """The candidate's rate where its answer is shorter … longer; flat at any height is a judge without that taste."""
    difference = np.array([row["lengths"][0] - row["lengths"][1] for row in rows], dtype=float)
    outcome = np.array([row["outcome"] for row in rows])
    order = np.argsort(difference, kind="stable")
    groups = [group for group in np.array_split(order, min(BINS, len(order))) if len(group)]
    rate = [outcome[group] for group in groups]
    half = [1.96 * g.std(ddof=1) / len(g) ** 0.5 if len(g) > 1 else 0.0 for g in rate]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "showlegend": False,
            "hoverinfo": "skip",
            "opacity": 0.25,
            "x": difference.tolist(),
            "y": outcome.tolist(),
            "marker": {"color": slot, "size": 5},
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "showlegend": False,
            "x": [float(np.median(difference[group])) for group in groups],
            "y": [float(g.mean()) for g in rate],
            "error_y": {"type": "data", "array": [float(h) for h in half], "thickness": 1.2},
            "line": {"color": slot, "width": 2},
        },
    ]
    return {"data": data, "layout": layout(title, "characters longer", "candidate wins")}
