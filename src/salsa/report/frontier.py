"""Reward against KL: where every arm ended, the way it took there, and any KL that a reader picks on that way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from salsa.report.figures import (
    Figure,
    colour,
    error_bar,
    layout,
    shared_updates,
    short,
    thinned,
)

Row = Mapping[str, Any]
Curves = Mapping[str, Sequence[Sequence[Row]]]

OWN = "own reference"
POINTS = 60
"""Points of a seed's way at most: more do not show, and a hundred runs must fit a page."""


@dataclass(frozen=True)
class Yardstick:
    """A model that the KL is measured to."""

    name: str
    logged: str
    """Its column of `metrics.jsonl`."""
    evaluated: str
    """Its column of `report.json`."""


def yardsticks(summary: Mapping[str, Any], curves: Curves) -> list[Yardstick]:
    """The models of `eval.kl_to`, and last each arm's own reference where training logged the KL to it."""
    found = [Yardstick(name, f"kl_to_{name}", f"kl_to_{name}") for name in summary["kl_to"]]
    if any(_has(rows, "kl") for seeds in curves.values() for rows in seeds[:1]):
        found.append(Yardstick(OWN, "kl", "kl_reference"))
    return found


def all_figures(summary: Mapping[str, Any], curves: Curves) -> dict[str, Figure]:
    """Element id → figure: every score against the KL to every yardstick."""
    return {
        f"frontier-{number}-{score}": _frontier(score, yardstick, summary, curves)
        for score in summary["scores"]
        for number, yardstick in enumerate(yardsticks(summary, curves))
    }


def series(summary: Mapping[str, Any], curves: Curves) -> dict[str, Any] | None:
    """What the page needs to read every arm's rewards at a KL: the training curves of each arm and seed.

    Returns:
        None where nothing was trained; else `baseline`, `scores`, `yardsticks` (those that training logged), `arms`
        (`name`, `slot` of its colour, `seeds`, and `curves` [yardstick][seed] with `step`, `kl` and `values`
        [score], None where a score was not logged) and `t`, Student's 97.5 % quantiles for 1, 2, … degrees of freedom.
    """
    names = list(summary["arms"])
    known = {
        f"frontier-{number}-": y
        for number, y in enumerate(yardsticks(summary, curves))
        if any(_has(rows, y.logged) for seeds in curves.values() for rows in seeds)
    }
    arms: list[dict[str, Any]] = []
    for arm, seeds in curves.items():
        ways = [[_way(rows, y, summary["scores"]) for rows in seeds] for y in known.values()]
        if any(way["step"] for of_seed in ways for way in of_seed):
            numbers = [one["seed"] for one in summary["arms"][arm]["seeds"]]
            arms.append({"name": arm, "slot": names.index(arm), "seeds": numbers, "curves": ways})
    if not arms:
        return None
    most = max(len(arm["seeds"]) for arm in arms)
    return {
        "baseline": summary["baseline"],
        "scores": list(summary["scores"]),
        "yardsticks": [{"name": y.name, "plots": plots} for plots, y in known.items()],
        "arms": arms,
        "t": [short(float(stats.t.ppf(0.975, df))) for df in range(1, most)],
    }


def _way(rows: Sequence[Row], yardstick: Yardstick, scores: Sequence[str]) -> dict[str, Any]:
    """One seed's training by one yardstick, at most `POINTS` of its updates."""
    own = thinned([row for row in rows if yardstick.logged in row], POINTS)
    return {
        "step": [row["step"] for row in own],
        "kl": [short(row[yardstick.logged]) for row in own],
        "values": [
            [short(row[name]) for row in own] if _has(own, name) else None
            for name in map(_logged, scores)
        ],
    }


def _frontier(
    score: str, yardstick: Yardstick, summary: Mapping[str, Any], curves: Curves
) -> Figure:
    """Large: an arm on held-out prompts, with intervals; rings: its seeds; lines: its training, mean over seeds."""
    data, arms, kl = [], list(summary["arms"]), yardstick.evaluated
    for arm, record in summary["arms"].items():
        mean = record["mean"]
        if kl not in mean:
            continue
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
    for arm, seeds in curves.items():
        ways = [_way(rows, yardstick, [score]) for rows in shared_updates(seeds, yardstick.logged)]
        if not ways[0]["step"] or any(way["values"][0] is None for way in ways):
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "showlegend": False,
                "x": [short(x) for x in np.mean([way["kl"] for way in ways], axis=0)],
                "y": [short(y) for y in np.mean([way["values"][0] for way in ways], axis=0)],
                "text": [f"{arm}, update {step}" for step in ways[0]["step"]],
                "line": {"color": colour(arm, arms), "width": 1.5},
                "opacity": 0.6,
            }
        )
    title = f"KL to {yardstick.name} (nats per response)"
    return {"data": data, "layout": layout(score, title, score)}


def _logged(score: str) -> str:
    """A score's column of `metrics.jsonl`."""
    return "score" if score == "proxy" else score


def _has(rows: Sequence[Row], column: str) -> bool:
    """Whether the first update logged it; DPO logs other metrics than RL."""
    return bool(rows) and column in rows[0]
