"""A sweep: its points, what they share, what they add up to; the work itself is another test's."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from salsa.analysis.sweep import effects_of, plan_lines, points_of, run_sweep
from salsa.config.sweep import SweepConfig
from salsa.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
PAIRS = {f"pair-{i}": {"sft.seeds": [2 * i, 2 * i + 1]} for i in range(6)}
ARMS = {"ppo": {"init": "sft[0]", "reference": "sft[0]"}, "salsa": {"init": "sft[0]", "reference": "soup"}}  # fmt: skip


def config(tmp_path: Path, **values) -> SweepConfig:
    given = {
        "name": "pairs", "recipe": str(RECIPES / "quickstart.yaml"),
        "settings": {"rl.arms": ARMS}, "grid": {"pair": PAIRS, "rl.kl_coef": [0.1, 0.3]},
        "cluster": "pair", "margins": {"proxy win rate": 3.0},
    }  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(given | values))
    return SweepConfig.load(file)


def result(effect: float) -> dict:
    """A run's report in which salsa's win rate is `effect` points over one half."""
    rate, difference = 0.5 + effect / 100, {"mean": effect / 10, "low": -1.0, "high": 1.0}
    pair = {
        "score": "proxy", "candidate": "salsa", "baseline": "ppo", "rate": rate, "low": rate - 0.1,
        "high": rate + 0.1, "difference": difference,
    }  # fmt: skip
    return {"baseline": "ppo", "pairs": [pair, pair | {"candidate": "ppo", "baseline": "sft"}]}


def worker(effects: dict[str, float], called: list[str]):
    def run(recipe, *, out, until, jobs):
        called.append(recipe.name)
        assert (out / "stages").resolve() == (out.parent.parent / "stages").resolve()
        (out / f"{until}.json").write_text(json.dumps(result(effects[recipe.name])))
        return out

    return run


@pytest.mark.parametrize("file", sorted((RECIPES / "study").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_studys_sweeps_are_sound(file):
    recipes = [recipe for _, recipe in SweepConfig.load(file).points().values()]
    pairs = {recipe.sft.seeds for recipe in recipes}
    seeds = [seed for pair in pairs for seed in pair]
    assert len(pairs) >= 8, "clusters"
    assert len(seeds) == len(set(seeds)) and not {0, 1, 2} & set(seeds), "disjoint and new"


def test_a_planted_effect_is_found_over_the_clusters(tmp_path):
    made = config(tmp_path)
    names = list(made.points())
    assert len(names) == 12 and names[0] == "pair-0_kl_coef-0.1"
    effects = {n: (8.0 if n.endswith("0.1") else 0.0) + 0.5 * int(n[5]) - 1.25 for n in names}
    called: list[str] = []
    out = run_sweep(made, tmp_path / "out", worker(effects, called))
    assert called == names
    summary = json.loads((out / "sweep.json").read_text())
    verdicts = {v["rl.kl_coef"]: v for v in summary["verdicts"]}
    assert verdicts["kl_coef=0.1"]["verdict"] == "holds"
    assert verdicts["kl_coef=0.1"]["effect"] == pytest.approx(8.0)
    assert verdicts["kl_coef=0.3"]["verdict"] == "practically equal"
    assert verdicts["kl_coef=0.3"]["clusters"] == 6
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert len(rows) == 24 and {row["measure"] for row in rows} == {"proxy win rate", "proxy"}
    assert rows[0]["pair"] == "pair-0" and float(rows[0]["effect"]) == effects[names[0]]
    assert "holds" in (out / "sweep.md").read_text()
    tex = (out / "sweep.tex").read_text()
    assert r"kl\_coef=0.1" in tex and tex.count("\\\\") == 3
    assert "practically equal" in (out / "sweep.html").read_text()


def test_a_subset_is_finished_first_and_counted(tmp_path):
    made, called = config(tmp_path), []
    effects = dict.fromkeys(made.points(), 1.0)
    out = run_sweep(made, tmp_path / "out", worker(effects, called), only="pair-[01]_*0.1")
    assert called == ["pair-0_kl_coef-0.1", "pair-1_kl_coef-0.1"]
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 2
    lines = plan_lines(points_of(made, out))
    assert lines[0] == "pair-0_kl_coef-0.1: finished" and lines[1].endswith("to do")
    assert "12 points, 10 to do" in lines[-2]


def test_a_forecast_gives_an_effect_per_comparison_and_column():
    e = {"mean": 0.1, "low": 0.0, "high": 0.2}
    rows = effects_of(
        {
            "baseline": "sft[0]",
            "comparisons": [
                {"candidate": "soup", "matched_by": "kl_own", "differences": {"proxy": e, "kl_own": e}}
            ],
        }
    )  # fmt: skip
    (row,) = rows
    assert (row["subject"], row["at"], row["measure"]) == ("soup", "equal kl_own", "proxy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {"rl.kl_coef": [0.1, 0.1]}, "cluster": None, "margins": {}}, "grid.rl.kl_coef has a value twice"),
        ({"grid": {"engine.jobs": [1, 2]}, "cluster": None, "margins": {}}, "an axis changes nothing"),
        ({"grid": {"rl.kl_koef": [1]}, "cluster": None, "margins": {}}, "Did you mean 'kl_coef'?"),
        ({"grid": {"rl.kl_coef": []}, "cluster": None, "margins": {}}, "grid.rl.kl_coef has no values"),
        ({"cluster": None}, "verdicts need both cluster and margins"),
        ({"cluster": "pears"}, "cluster='pears' is no axis of the grid (pair, rl.kl_coef)"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: no such recipe"),
        ({"axes": {}}, "unknown key 'axes'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line(tmp_path, values, message):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **values).points()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_point_matches(tmp_path):
    with pytest.raises(ConfigError, match=r"--only x\*: no point matches"):
        points_of(config(tmp_path), tmp_path, "x*")
