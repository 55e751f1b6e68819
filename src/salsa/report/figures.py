"""Plotly figures as plain dictionaries; colours are slots that the page fills for light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]
Row = Mapping[str, Any]
Runs = Mapping[str, Sequence[Sequence[Row]]]
"""Arm → seed → its samples, or the metrics of its training."""

POINTS = 120
"""Points of a learning curve at most."""
CURVES = {
    "score": "proxy reward",
    "kl": "KL to own reference (nats per response)",
    "length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
}


def all_figures(summary: Row, rows: Runs, curves: Runs) -> dict[str, Figure]:
    """Element id → figure."""
    arms = list(summary["arms"])
    held_out = summary["scores"][1:]
    panels = {"score": CURVES["score"]} | {s: f"{s} (not trained on)" for s in held_out} | CURVES
    figures = {
        f"curve-{name}": curve(name, title, curves, arms)
        for name, title in panels.items()
        if any(logged_by_all(name, seeds) for seeds in curves.values())
    }
    return figures | {
        f"histogram-{score}": histogram(
            {arm: np.array([row[score] for seed in rows[arm] for row in seed]) for arm in arms},
            score,
            score,
        )
        for score in summary["scores"]
    }


def colour(arm: str, arms: Sequence[str]) -> str:
    """The colour slot of a model; `slot-0`, grey, is the first one's: in a run's report the SFT model's."""
    return f"slot-{arms.index(arm)}"


def curve(name: str, title: str, curves: Runs, arms: Sequence[str]) -> Figure:
    """Mean over seeds as a strong line, each seed as a faint one."""
    data = []
    for arm, seeds in curves.items():
        if not logged_by_all(name, seeds):
            continue
        own = [thinned(seed, POINTS) for seed in shared_updates(seeds, name)]
        steps = [row["step"] for row in own[0]]
        values = np.array([[row[name] for row in seed] for seed in own])
        if len(seeds) > 1:
            data.append(_seeds(steps, values, colour(arm, arms)))
        data.append(_line(steps, values.mean(axis=0), colour(arm, arms), width=2.5, name=arm))
    return {"data": data, "layout": layout(title, "update", "")}


def logged_by_all(name: str, seeds: Sequence[Sequence[Row]]) -> bool:
    """Whether each seed's first update logged it: DPO logs other metrics, a short run none, a reused one fewer."""
    return all(name in row for seed in seeds for row in (seed[:1] or [{}]))


def histogram(values: Mapping[str, np.ndarray], title: str, x: str) -> Figure:
    """Shares per bin of each model's values as outlines, so that models can be told apart where they overlap."""
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=24)
    data = []
    for name, own in values.items():
        shares = np.histogram(own, bins=edges)[0] / len(own)
        slot = colour(name, list(values))
        line = _line(edges, [*shares, shares[-1]], slot, width=2, name=name)
        line["line"]["shape"] = "hv"
        data.append(line)
    return {"data": data, "layout": layout(title, x, "share of replies")}


def _seeds(steps: Sequence[int], values: np.ndarray, slot: str) -> dict[str, Any]:
    """Faint lines of all seeds as one trace, a gap between two: a trace a seed takes ten times as long to draw."""
    x = [*steps, None] * len(values)
    y = [y for seed in values for y in [*map(short, seed), None]]
    return _line([], [], slot, width=1) | {"x": x, "y": y, "opacity": 0.3}


def _line(
    x: Iterable[float], y: Iterable[float], slot: str, *, width: float, name: str = ""
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [short(v) for v in x],
        "y": [short(v) for v in y],
        "name": name,
        "showlegend": bool(name),
        "hoverinfo": "all" if name else "skip",
        "opacity": 1.0,
        "line": {"color": slot, "width": width},
    }


def short(value: float) -> float:
    """Five significant digits: a plot shows no more, and a hundred runs must fit a page."""
    return float(f"{value:.5g}")


def shared_updates(seeds: Sequence[Sequence[Row]], column: str) -> list[list[Row]]:
    """Of every seed the updates in which all seeds logged `column`: `rl.stop` ends each by itself."""
    updates = [
        update for update in zip(*seeds, strict=False) if all(column in row for row in update)
    ]
    return [list(rows) for rows in zip(*updates, strict=True)] or [[] for _ in seeds]


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def error_bar(estimates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Plotly's error bars from intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [e["high"] - e["mean"] for e in estimates],
        "arrayminus": [e["mean"] - e["low"] for e in estimates],
        "thickness": 1.5,
    }


def layout(title: str, x: str, y: str) -> dict[str, Any]:
    """Title and axis names; the page adds fonts and colours."""
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
    }
