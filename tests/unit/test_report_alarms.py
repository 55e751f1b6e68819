"""Alarms on the curves: those that training raised, at their update, on the curve that they are about."""

import json

import pytest

from salsa.report import alarms
from salsa.report.page import render
from tests.unit.test_report import summary  # noqa: F401


def rows(**columns) -> list[dict]:
    """Metrics of a quiet training of 12 updates, columns replaced."""
    quiet = {"score": 1.0, "kl": 0.5, "kl_stderr": 0.1, "length": 20.0, "entropy": 2.0, "gold": 1.0}
    values = {name: columns.get(name, [value] * 12) for name, value in quiet.items()}
    return [
        {"step": i + 1} | {name: column[i] for name, column in values.items()} for i in range(12)
    ]


COLLAPSED = rows(entropy=[2.0] * 6 + [0.3] * 6)
SHORT = rows(length=[20.0] * 4 + [2.0] * 8)
HACKED = rows(score=[float(i) for i in range(12)], gold=[-float(i) for i in range(12)])
CURVES = {"ppo": [rows(), COLLAPSED], "salsa": [HACKED, SHORT]}


@pytest.fixture
def found():
    return alarms.alarms_of(CURVES, {"ppo": [3, 5], "salsa": [3, 5]}, ["gold"])


def test_each_alarm_is_told_once_with_its_seed_and_update(found):
    assert [(a.arm, a.seed, a.row, a.step, a.name) for a in found] == [
        ("ppo", 5, 1, 7, "entropy collapse"),
        ("salsa", 3, 0, 10, "reward hacking (gold)"),
        ("salsa", 5, 1, 6, "KL-Hack"),  # a mean of three updates: 20, 2, 2
    ]
    assert found[0].message.startswith("entropy collapse at update 7: from 2 to 0.3 nats")


def test_it_is_what_training_wrote_to_alarms_log(found):
    from salsa.alarms import Alarms

    live = Alarms(["gold"])
    told = [message for row in COLLAPSED for message in live.observe(row)]
    assert told == [f"alarm: {found[0].message}"]


def test_marks_lie_on_the_curve_that_the_alarm_is_about(found):
    panels = ("score", "gold", "kl", "length", "entropy")
    plots = {f"curve-{name}": {"data": [], "layout": {}} for name in panels}
    alarms.mark(plots, found, CURVES, ["sft", "ppo", "salsa"])
    (on_score,), (on_entropy,) = plots["curve-score"]["data"], plots["curve-entropy"]["data"]
    assert on_score["x"] == [7, 10, 6] and on_score["y"] == [1.0, 9.0, 1.0]
    assert on_score["marker"]["color"] == ["slot-1", "slot-2", "slot-2"]
    assert (on_entropy["x"], on_entropy["y"]) == ([7], [0.3])
    assert "ppo seed 5: entropy collapse" in on_entropy["hovertext"][0].replace("<br>", " ")
    assert all(len(line) <= alarms.WIDTH for line in on_entropy["hovertext"][0].split("<br>"))
    assert plots["curve-gold"]["data"][0]["x"] == [10]
    assert plots["curve-length"]["data"][0]["x"] == [6]
    assert not plots["curve-kl"]["data"]


def test_dpo_has_none_and_quiet_training_says_so(summary):  # noqa: F811
    dpo = [[{"step": 1, "loss": 0.7}]]
    assert alarms.alarms_of({"dpo": dpo}, {"dpo": [0]}, ["gold"]) == []
    samples = {name: [[{"prompt": "p", "response": "r", "proxy": 0.1}]] for name in summary["arms"]}
    assert "No alarm was raised" in render(summary, samples, {"ppo": [rows()]}, "")
    assert "No alarm was raised" not in render(summary, samples, {"ppo": dpo}, "")
    loud = render(summary, samples, {"ppo": [COLLAPSED]}, "")
    assert "<strong>ppo seed 0</strong>: entropy collapse at update 7" in loud
    start = loud.index("const figures = ") + len("const figures = ")
    figures = json.loads(loud[start : loud.index(";\n", start)])
    assert figures["curve-entropy"]["data"][-1]["marker"]["symbol"] == "triangle-up"
