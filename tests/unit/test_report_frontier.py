"""The frontier of a run: what it draws, what the page's slider reads, and that many runs stay small."""

import pytest
from scipy import stats

from salsa.evaluate.results import summarise
from salsa.report import figures, frontier
from tests.many_runs import many_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    results, _ = many_runs(tmp_path_factory.mktemp("runs"), num_seeds=3, num_updates=200)
    return summarise(results), results.curves


def test_a_way_is_the_logged_updates_thinned(made):
    series = frontier.series(*made)
    assert series["baseline"] == "arm-0" and series["scores"] == ["proxy", "gold"]
    assert [y["name"] for y in series["yardsticks"]] == ["sft[0]", "own reference"]
    assert [arm["name"] for arm in series["arms"]] == ["arm-0", "arm-1", "arm-2"]
    assert [arm["slot"] for arm in series["arms"]] == [1, 2, 3]
    logged, own = series["arms"][1]["curves"]
    assert logged[0]["step"] == [*range(1, 200, 5), 200]  # as often as training measured it
    assert len(own[0]["step"]) == frontier.POINTS
    assert own[0]["step"][0] == 1 and own[0]["step"][-1] == 200
    rows = {row["step"]: row for row in made[1]["arm-1"][2]}
    for step, kl, proxy, gold in zip(
        logged[2]["step"], logged[2]["kl"], *logged[2]["values"], strict=True
    ):
        row = rows[step]
        assert (kl, proxy, gold) == pytest.approx(
            (row["kl"], row["score"], row["gold"]), rel=1e-4, abs=1e-4
        )


def test_quantiles_are_students(made):
    assert frontier.series(*made)["t"] == pytest.approx(stats.t.ppf(0.975, [1, 2]), rel=1e-4)


def test_every_score_is_drawn_against_every_yardstick(made):
    summary, curves = made
    plots = frontier.all_figures(summary, curves)
    assert set(plots) == {
        f"frontier-{number}-{score}" for number in (0, 1) for score in ("proxy", "gold")
    }
    dots, _, *_ = plots["frontier-0-gold"]["data"]
    sft = summary["arms"]["sft"]["mean"]
    assert dots["name"] == "sft"
    assert (dots["x"], dots["y"]) == ([sft["kl_to_sft[0]"]["mean"]], [sft["gold"]["mean"]])
    *_, way = plots["frontier-0-proxy"]["data"]
    assert way["line"]["color"] == "slot-3" and way["text"][-1] == "arm-2, update 200"
    assert way["y"][-1] == pytest.approx(10**0.5 + 0.1, rel=1e-4)  # mean of seeds 0, 1, 2


def test_what_was_not_logged_is_left_out(made):
    summary, curves = made
    dpo = [[{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]] * 3
    series = frontier.series(summary, {"arm-0": dpo, "arm-1": curves["arm-1"]})
    assert [arm["name"] for arm in series["arms"]] == ["arm-1"]
    assert frontier.series(summary, {"arm-0": dpo}) is None
    assert frontier.series(summary, {}) is None
    no_gold = [
        [{k: v for k, v in row.items() if k != "gold"} for row in seed] for seed in curves["arm-1"]
    ]
    (arm,) = frontier.series(summary, {"arm-1": no_gold})["arms"]
    assert arm["curves"][0][0]["values"][1] is None
    assert len(frontier.all_figures(summary, {"arm-1": no_gold})["frontier-0-gold"]["data"]) == 8


@pytest.mark.parametrize("older", [0, 2])
def test_a_seed_that_is_reused_and_logged_less_costs_only_what_it_did_not_log(older, made):
    """A score or a model was added after it was trained; the other seeds are new."""
    summary, curves = made
    missing = ("gold", "kl_to_sft[0]")
    mixed = [
        [{k: v for k, v in row.items() if k not in missing or seed != older} for row in rows]
        for seed, rows in enumerate(curves["arm-1"])
    ]
    rows = {name: [[{"proxy": 0.0, "gold": 1.0}]] for name in summary["arms"]}
    plots = figures.all_figures(summary, rows, {"arm-1": mixed, "arm-2": curves["arm-2"]})
    shown = lambda name: {trace["name"] for trace in plots[name]["data"]} - {""}
    assert shown("curve-gold") == {"arm-2"} and shown("curve-score") == {"arm-1", "arm-2"}
    alone = figures.all_figures(summary, rows, {"arm-1": mixed})
    assert "curve-gold" not in alone and "curve-score" in alone
    lines = [
        sum("line" in trace for trace in plot["data"])
        for plot in frontier.all_figures(summary, {"arm-1": mixed}).values()
    ]
    assert sum(lines) == 1, "its proxy by its own reference; nothing else did all three seeds log"
    series = frontier.series(summary, {"arm-1": mixed})
    assert [y["name"] for y in series["yardsticks"]] == ["sft[0]", "own reference"]
    to_sft, own = series["arms"][0]["curves"]
    assert [bool(way["step"]) for way in to_sft] == [seed != older for seed in range(3)]
    assert [way["values"][1] is None for way in own] == [seed == older for seed in range(3)]


def test_curves_are_thinned_and_seeds_share_a_trace(made):
    summary, curves = made
    rows = {name: [[{"proxy": 0.0, "gold": 1.0}]] for name in summary["arms"]}
    curve = figures.all_figures(summary, rows, curves)["curve-kl"]
    assert [trace["name"] for trace in curve["data"]] == ["", "arm-0", "", "arm-1", "", "arm-2"]
    faint, strong = curve["data"][:2]
    assert len(strong["x"]) == figures.POINTS and strong["x"][-1] == 200
    assert len(faint["x"]) == len(faint["y"]) == 3 * (figures.POINTS + 1)
    assert faint["y"][figures.POINTS] is None and faint["opacity"] < 0.5
