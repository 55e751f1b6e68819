"""Plotly figures as plain dictionaries; colours are slots that the page fills for light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]
CURVES = {
    "score": "proxy reward",
    "kl": "KL to own reference (nats per response)",
    "length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
}


def all_figures(
    summary: Mapping[str, Any], rows: Mapping[str, Any], curves: Mapping[str, Any]
) -> dict[str, Figure]:
    """Element id → figure."""
    arms = list(summary["arms"])
    held_out = summary["scores"][1:]
    panels = {"score": CURVES["score"]} | {s: f"{s} (not trained on)" for s in held_out} | CURVES
    figures = {
        f"curve-{name}": _curve(name, title, curves, arms)
        for name, title in panels.items()
        if any(name in row for seeds in curves.values() for row in seeds[0][:1])
    }
    for score in summary["scores"]:
        for number, model in enumerate(summary["kl_to"]):
            figures[f"frontier-{number}-{score}"] = _frontier(score, model, summary, arms)
        figures[f"histogram-{score}"] = _histogram(score, rows, arms)
    return figures


def colour(arm: str, arms: Sequence[str]) -> str:
    """The arm's colour slot: `slot-0` is the SFT model's grey."""
    return f"slot-{arms.index(arm)}"


def _curve(
    name: str, title: str, curves: Mapping[str, Sequence[Sequence[Mapping]]], arms: Sequence[str]
) -> Figure:
    """Mean over seeds as a strong line, each seed as a faint one."""
    data = []
    for arm, seeds in curves.items():
        if name not in seeds[0][0]:  # DPO logs other metrics
            continue
        steps = [row["step"] for row in seeds[0]]
        values = np.array([[row[name] for row in seed] for seed in seeds])
        for seed in values:
            data.append(_line(steps, seed, colour(arm, arms), width=1, opacity=0.3))
        data.append(_line(steps, values.mean(axis=0), colour(arm, arms), width=2.5, name=arm))
    return {"data": data, "layout": layout(title, "update", "")}


def _frontier(score: str, model: str, summary: Mapping[str, Any], arms: Sequence[str]) -> Figure:
    """A score against the KL to a model."""
    data, kl = [], f"kl_to_{model}"
    for arm, record in summary["arms"].items():
        mean = record["mean"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": arm,
                "x": [mean[kl]["mean"]],
                "y": [mean[score]["mean"]],
                "error_x": error_bar([mean[kl]]),
                "error_y": error_bar([mean[score]]),
                "marker": {"color": colour(arm, arms), "size": 13},
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [seed[kl] for seed in record["seeds"]],
                "y": [seed[score] for seed in record["seeds"]],
                "text": [f"{arm} seed {seed['seed']}" for seed in record["seeds"]],
                "marker": {"color": colour(arm, arms), "size": 7, "symbol": "circle-open"},
            }
        )
    return {
        "data": data,
        "layout": layout(score, f"KL to {model} (nats per response)", score),
    }


def _histogram(
    score: str, rows: Mapping[str, Sequence[Sequence[Mapping]]], arms: Sequence[str]
) -> Figure:
    """Shares per bin as outlines, so that arms can be told apart where they overlap."""
    values = {
        arm: np.array([row[score] for seed in seeds for row in seed]) for arm, seeds in rows.items()
    }
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=24)
    data = []
    for arm, own in values.items():
        shares = np.histogram(own, bins=edges)[0] / len(own)
        line = _line(edges, [*shares, shares[-1]], colour(arm, arms), width=2, name=arm)
        line["line"]["shape"] = "hv"
        data.append(line)
    return {"data": data, "layout": layout(score, score, "share of replies")}


def _line(
    x: Iterable[float],
    y: Iterable[float],
    slot: str,
    *,
    width: float,
    name: str = "",
    opacity: float = 1.0,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [float(v) for v in x],
        "y": [float(v) for v in y],
        "name": name,
        "showlegend": bool(name),
        "hoverinfo": "all" if name else "skip",
        "opacity": opacity,
        "line": {"color": slot, "width": width},
    }


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
