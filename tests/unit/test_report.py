"""The page: model text is text, an unresolved interval says so, arms are compared the right way round."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from salsa.artifacts import read_jsonl
from salsa.evaluate.results import summarise
from salsa.report import frontier
from salsa.report import page as page_module
from salsa.report.figures import all_figures, shared_updates
from salsa.report.page import against_baseline, headline, render, script_json
from salsa.report.pairs import agreement, matrix, seed_tables
from salsa.report.sweep import page as sweep_page
from salsa.stages.directory import RunDirectory
from tests.many_runs import many_runs

ATTACK = "<script>alert('owned')</script></script><img src=x onerror=alert(1)>"


def estimate(mean, half=0.1):
    return {"mean": mean, "stderr": half / 2, "low": mean - half, "high": mean + half}


def pair(candidate, baseline, rate, half, score="proxy"):
    low, high = rate - half, rate + half
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "not resolved"
    return {
        "score": score, "candidate": candidate, "baseline": baseline, "rate": rate, "stderr": half / 2, "low": low,
        "high": high, "wins": 6, "losses": 4, "ties": 0, "n": 10, "dropped": 0, "verdict": verdict,
        "difference": estimate(rate - 0.5), "resolution": 0.11,
    }  # fmt: skip


@pytest.fixture
def summary():
    names = ("proxy", "kl_to_sft[0]", "kl_reference", "length", "eos_rate")
    arm = lambda trained: {
        "init": "sft[0]", "reference": "soup", "trained": trained,
        "seeds": [{"seed": 0, "label": "arm-seed-0", "policy": "abc"} | dict.fromkeys(names, 0.5)],
        "mean": {n: estimate(0.5) for n in names},
    }  # fmt: skip
    return {
        "name": "test", "num_seeds": 1, "notes": ["a <b>note</b>"], "scores": ["proxy"], "baseline": "ppo",
        "kl_to": ["sft[0]"], "num_prompts": 2, "arms": {"sft": arm(False), "ppo": arm(True), "salsa": arm(True)},
        "pairs": [pair("ppo", "sft", 0.8, 0.1), pair("salsa", "ppo", 0.52, 0.1), pair("salsa", "sft", 0.8, 0.1)],
        "ended": [], "benchmarks": {}, "judge": None, "recipe": {}, "versions": {"salsa-rlhf": "0.1.0"},
        "stages": [{"stage": "sft[0]", "digest": "d" * 64, "output": "e" * 64}], "times": {"sft[0]": 1.5},
    }  # fmt: skip


@pytest.fixture
def page(summary):
    sample = {"prompt": ATTACK, "response": ATTACK, "proxy": 0.1}
    other = {"prompt": "hello", "response": "", "proxy": 0.4}
    rows = {name: [[sample, other]] for name in summary["arms"]}
    curves = {
        name: [[{"step": 1, "score": 0.1, "kl": 0.0, "length": 3.0, "entropy": 1.0}]]
        for name in ("ppo", "salsa")
    }
    return render(summary, rows, curves, f"name: {ATTACK}")


def test_an_arm_that_logged_nothing_has_no_curve(summary):
    rows = {name: [[{"prompt": "a", "response": "b", "proxy": 0.1}]] for name in summary["arms"]}
    short, logged = [[]], [[{"step": 1, "score": 0.1, "kl": 0.0, "length": 3.0, "entropy": 1.0}]]
    plots = all_figures(summary, rows, {"ppo": short, "salsa": logged})
    assert [line["name"] for line in plots["curve-score"]["data"]] == ["salsa"]
    assert "curve-" not in "".join(all_figures(summary, rows, {"ppo": short}))
    assert render(summary, rows, {"ppo": short, "salsa": logged}, "name: a")


def test_seeds_that_stopped_early_are_drawn_as_far_as_all_came(summary):
    """`rl.stop` ends each seed by itself, and logs the KL to other models in its own last update."""
    rows = {name: [[{"prompt": "a", "response": "b", "proxy": 0.1}]] for name in summary["arms"]}
    update = lambda step, seed: {
        "step": step,
        "score": step + seed,
        "kl": 0.1 * step,
        "length": 3.0,
    }
    seeds = [
        [update(step, seed) for step in range(1, last + 1)] for seed, last in enumerate((4, 2))
    ]
    for of_seed in seeds:
        of_seed[0]["kl_to_base"] = of_seed[-1]["kl_to_base"] = 1.0
    plots = all_figures(summary, rows, {"ppo": seeds})
    (mean,) = [line for line in plots["curve-score"]["data"] if line["name"] == "ppo"]
    assert (mean["x"], mean["y"]) == ([1, 2], [1.5, 2.5])
    assert shared_updates(seeds, "kl_to_base") == [[seeds[0][0]], [seeds[1][0]]]
    assert shared_updates([[], seeds[0]], "score") == [[], []]
    (line,) = [
        line
        for figure in frontier.all_figures(summary, {"ppo": seeds}).values()
        for line in figure["data"]
        if line["mode"] == "lines" and "kl" in figure["layout"]["xaxis"]["title"]["text"].lower()
    ][:1]
    assert len(line["x"]) == len(line["y"]) <= 2


def test_the_page_is_written_before_what_says_that_it_is_there(tmp_path, monkeypatch):
    """report.json holds the key of a finished report: a kill between the two must not leave it beside an old page."""
    written = []
    monkeypatch.setattr(
        page_module, "write_atomic", lambda path, text: written.append((path.name, text))
    )
    page_module._write(
        RunDirectory(tmp_path), "report", {"low": -math.inf, "rows": (1.0, math.nan)}, "<html>"
    )
    assert [name for name, _ in written] == ["report.html", "report.json"]
    assert json.loads(written[1][1], parse_constant=pytest.fail) == {
        "low": None,
        "rows": [1.0, None],
    }


def test_model_text_is_escaped_everywhere(page):
    assert ATTACK not in page
    assert "&lt;script&gt;alert(&#39;owned&#39;)" in page
    assert "<img src=x" not in page
    assert len(re.findall(r"<script[ >]", page)) == page.count("</script>") == 7


def test_page_loads_nothing_from_a_network(page):
    own = page[: page.index("<script>")]  # what follows is plotly.js and its figures
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'" in own  # nor could it
    assert "://" not in own and not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", own)


def test_an_interval_with_one_half_is_not_resolved(page, summary):
    assert "not resolved" in page
    assert headline(summary) == [
        "salsa against ppo is not resolved on proxy: win rate 52.0% [42.0%, 62.0%]."
    ]


def test_matrix_and_what_n_resolves(page):
    assert (
        page.count("n resolves ±11.0") == 2 + 6
    )  # beside two rates of the table and all of the matrix
    assert "wins of ↓ against →" in page and "--rate: 0.52" in page and "--rate: 0.48" in page


def test_pairs_are_turned_towards_the_baseline(summary):
    found = against_baseline(summary)
    assert found["sft", "proxy"]["rate"] == pytest.approx(0.2)
    assert found["sft", "proxy"]["verdict"] == "worse"
    assert (found["sft", "proxy"]["low"], found["sft", "proxy"]["high"]) == pytest.approx(
        (0.1, 0.3)
    )
    assert found["salsa", "proxy"]["rate"] == 0.52


def test_every_pair_in_every_seed_agrees_with_scipys_paired_t(tmp_path):
    results, _ = many_runs(tmp_path, num_seeds=3)
    summary = summarise(results)
    tables = seed_tables(summary["pairs"])
    assert {score: len(pairs) for score, pairs in tables.items()} == {"proxy": 6, "gold": 6}
    pair = next(p for p in tables["proxy"] if (p["candidate"], p["baseline"]) == ("arm-1", "arm-0"))
    assert len(pair["by_seed"]) == 3
    assert agreement(pair) == "3 of 3"
    turned = matrix([pair])["arm-0", "arm-1"]["by_seed"]
    for seed, (one, other_way) in enumerate(zip(pair["by_seed"], turned, strict=True)):
        own, other = (
            np.array([row["proxy"] for row in read_jsonl(results.samples[arm][seed].path / "samples.jsonl")])
            for arm in ("arm-1", "arm-0")
        )  # fmt: skip
        test = stats.ttest_rel(own, other).confidence_interval()
        d = one["difference"]
        assert (d["low"], d["high"]) == pytest.approx((test.low, test.high), rel=1e-5)
        assert d["mean"] == pytest.approx((own - other).mean(), rel=1e-5)
        assert one["rate"] == pytest.approx((own > other).mean())
        assert other_way["difference"]["low"] == -d["high"] and other_way["rate"] == 1 - one["rate"]
    one_seed, _ = many_runs(tmp_path / "one", num_seeds=1)
    assert seed_tables(summarise(one_seed)["pairs"]) == {}


def test_what_is_not_finite_is_null_in_a_script():
    assert script_json({"a": [1.5, float("nan")], "b": (float("-inf"), "</script>")}) == (
        '{"a": [1.5, null], "b": [null, "\\u003c/script>"]}'
    )


def test_a_sweep_unfolds_the_clusters_of_a_verdict():
    effect = {"subject": "salsa", "baseline": "ppo", "at": "held-out prompts", "measure": "proxy"}
    rows = [
        effect | {"pair": f"pair-{i}", "rl.kl_coef": beta, "effect": value, "low": value - 1, "high": value + 1}
        for beta, effects in (("0.1", (0.25, -0.5)), ("0.3", (7.0, 8.0)))
        for i, value in enumerate(effects)
    ]  # fmt: skip
    judged = {"effect": -0.125, "low": -1.0, "high": 1.0, "verdict": "not resolved"}
    verdict = effect | {"rl.kl_coef": "0.1"} | judged
    made = sweep_page(
        {
            "name": "test", "recipe": "r", "points": ["a", "b"], "rows": rows, "verdicts": [verdict],
            "frontiers": [], "notes": [],
            "axes": {"pair": ["pair-0", "pair-1"], "rl.kl_coef": ["0.1", "0.3"]},
        }
    )  # fmt: skip
    (details,) = re.findall(r'<details class="clusters">(.*?)</details>', made, flags=re.S)
    assert "1 of 2 above 0" in details
    cells = re.findall(r"<td>(.*?)</td>", details)
    assert cells == [
        "pair-1", "-0.500<small>[-1.500, +0.500]</small>", "pair-0", "+0.250<small>[-0.750, +1.250]</small>",
    ]  # fmt: skip


def test_figures_are_plain_json(page):
    start = page.index("const figures = ") + len("const figures = ")
    figures = json.loads(page[start : page.index(";\n", start)])
    assert {"curve-score", "curve-kl", "frontier-0-proxy", "histogram-proxy"} <= figures.keys()
    names = [trace.get("name") for trace in figures["frontier-0-proxy"]["data"]]
    assert names[::2] == ["sft", "ppo", "salsa"]
