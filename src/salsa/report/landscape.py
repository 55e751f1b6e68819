"""A landscape as the page shows it: curves along a line, heat maps of a plane, rewards of single replies."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from salsa.report.figures import Figure, error_bar, histogram, layout


def all_figures(landscape: Mapping[str, Any]) -> dict[str, Figure]:
    """Element id → figure."""
    draw = _heat_map if len(landscape["places"][0]["at"]) == 2 else _line
    maps = {f"landscape-{n}": draw(landscape, name) for n, name in enumerate(landscape["columns"])}
    scores = [
        name
        for name in landscape["columns"]
        if name not in ("length", "loss") and not name.startswith("kl_to_")
    ]
    of_replies = lambda name: {m: np.array(own[name]) for m, own in landscape["replies"].items()}
    return maps | {
        f"replies-{name}": histogram(of_replies(name), f"{name} of single replies", name)
        for name in scores
    }


def title(column: str) -> str:
    """A column's name in words."""
    if column.startswith("kl_to_"):
        return f"KL to {column.removeprefix('kl_to_')} (nats per response)"
    return {"length": "length (tokens)", "loss": "SFT loss (nats per token)"}.get(column, column)


def _line(landscape: Mapping[str, Any], name: str) -> Figure:
    """The column against α; error bars are those of the paired difference to the first model."""
    places = sorted(landscape["places"], key=lambda place: place["at"])
    means = [place["columns"][name]["mean"] for place in places]
    paired = [place["minus_first"][name] for place in places]
    bars = [
        {"mean": mean, "low": mean + e["low"] - e["mean"], "high": mean + e["high"] - e["mean"]}
        for mean, e in zip(means, paired, strict=True)
    ]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "showlegend": False,
        "x": [place["at"][0] for place in places],
        "y": means,
        "error_y": error_bar(bars),
        "line": {"color": "slot-2", "width": 2},
    }
    first, second = landscape["models"][:2]
    return {"data": [trace], "layout": layout(title(name), f"α (0 = {first}, 1 = {second})", "")}


def _heat_map(landscape: Mapping[str, Any], name: str) -> Figure:
    """The column over the plane, the models marked."""
    count = len(landscape["models"])
    grid = landscape["places"]
    cells = {tuple(place["at"]): place["columns"][name]["mean"] for place in grid}
    ys = [y for _, y in cells]
    rows = [y for y in dict.fromkeys(sorted(ys)) if ys.count(y) > 2]  # models may lie off the grid
    columns = sorted(
        {x for x, y in cells if y in rows and sum((x, r) in cells for r in rows) == len(rows)}
    )
    values = [[cells[x, y] for x in columns] for y in rows]
    marks = [place["at"] for place in grid[:count]]
    heat = {"type": "heatmap", "x": columns, "y": rows, "z": values, "colorscale": "Viridis"}
    models = {
        "type": "scatter",
        "mode": "markers+text",
        "showlegend": False,
        "x": [x for x, _ in marks],
        "y": [y for _, y in marks],
        "text": landscape["models"],
        "textposition": "top center",
        "textfont": {"color": "#ffffff"},
        "marker": {"color": "#ffffff", "size": 9, "line": {"color": "#000000", "width": 1}},
    }
    return {"data": [heat, models], "layout": layout(title(name), "x", "y")}
