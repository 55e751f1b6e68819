"""The alarms of a run's training: as a list, and as marks on the learning curves."""

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from salsa.alarms import Alarms
from salsa.report.figures import Figure, colour, short

NEEDS = ("score", "kl", "kl_stderr", "length", "entropy")
"""Columns without which `salsa.alarms` has nothing to watch: DPO logs others."""

PANELS = {"KL-Hack": "length", "negative KL": "kl", "entropy collapse": "entropy"}
"""Alarm → the curve that it is about; reward hacking is about the held-out score it names."""

WIDTH = 38
"""Characters in a line of the text over a mark: what a phone's plot has room for."""


@dataclass(frozen=True)
class Alarm:
    """One alarm, at the update where its stage raised it first."""

    arm: str
    seed: int
    row: int
    """Which of the arm's seeds, counted from 0."""
    step: int
    name: str
    message: str


def alarms_of(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    seeds: Mapping[str, Sequence[int]],
    held_out: Sequence[str],
) -> list[Alarm]:
    """What training said aloud, told again from its metrics: alarms are a function of them.

    Args:
        curves: arm → seed → metrics of its training.
        seeds: arm → the seeds' numbers.
        held_out: scores that were watched and not trained on.
    """
    found = []
    for arm, of_arm in curves.items():
        for row, (seed, metrics) in enumerate(zip(seeds[arm], of_arm, strict=True)):
            if not _watched(metrics):
                continue
            alarms = Alarms(name for name in held_out if name in metrics[0])
            for update in metrics:
                known = set(alarms.raised)
                alarms.observe(update)
                for name in [n for n in alarms.raised if n not in known]:
                    message = alarms.raised[name].partition(": ")[2]
                    step = int(update["step"])
                    found.append(Alarm(arm, seed, row, step, name, message))
    return found


def watched(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> bool:
    """Whether there was anything to raise an alarm about."""
    return any(_watched(metrics) for of_arm in curves.values() for metrics in of_arm)


def mark(
    plots: dict[str, Figure],
    alarms: Iterable[Alarm],
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    arms: Sequence[str],
) -> None:
    """Add a mark to the curve that each alarm is about, and to the reward's, at its update and its seed's value."""
    marks: dict[str, list[tuple[Alarm, float]]] = {}
    for alarm in alarms:
        (update,) = [r for r in curves[alarm.arm][alarm.row] if r["step"] == alarm.step]
        hacked = alarm.name.removeprefix("reward hacking (").removesuffix(")")
        for panel in dict.fromkeys(["score", PANELS.get(alarm.name, hacked)]):
            if f"curve-{panel}" in plots:
                marks.setdefault(f"curve-{panel}", []).append((alarm, update[panel]))
    for place, of_panel in marks.items():
        plots[place]["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [alarm.step for alarm, _ in of_panel],
                "y": [short(value) for _, value in of_panel],
                "hovertext": [_hover(alarm) for alarm, _ in of_panel],
                "hoverinfo": "text",
                "marker": {
                    "symbol": "triangle-up",
                    "size": 12,
                    "color": [colour(alarm.arm, arms) for alarm, _ in of_panel],
                    "line": {"color": "slot-ink", "width": 1.5},
                },
            }
        )


def _watched(metrics: Sequence[Mapping[str, Any]]) -> bool:
    return bool(metrics) and all(name in metrics[0] for name in NEEDS)


def _hover(alarm: Alarm) -> str:
    text = f"{alarm.arm} seed {alarm.seed}: {alarm.message}"
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, WIDTH))
