"""A sweep: its points, what they share, what they add up to; the work itself is another test's."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from salsa.analysis.paths import START
from salsa.analysis.policies import read_policies
from salsa.analysis.sweep import as_latex, effects_of, plan_lines, points_of, run_sweep
from salsa.artifacts import digest_of, locked
from salsa.config.sweep import SweepConfig
from salsa.errors import ConfigError, DataError
from salsa.pipeline import remaining
from salsa.stages.directory import stage_path

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


def test_points_that_differ_in_where_a_landscape_looks_are_two(tmp_path):
    grid = {"landscape.alphas": [[0, 1], [0, 0.5, 1]]}
    values = {"grid": grid, "cluster": None, "margins": {}, "until": "landscape"}
    points = config(tmp_path, **values).points()
    assert [len(recipe.landscape.alphas) for _, recipe in points.values()] == [2, 3]


STUDY = sorted((RECIPES / "study").glob("*.yaml"))
PRETRAINED = [file for file in STUDY if file.stem.startswith("smollm2")]


@pytest.mark.parametrize("file", sorted({*STUDY} - {*PRETRAINED}), ids=lambda f: f.stem)
def test_the_studys_sweeps_are_sound(file):
    recipes = [recipe for _, recipe in SweepConfig.load(file).points().values()]
    pairs = {recipe.sft.seeds: recipe.sft for recipe in recipes}
    models = [
        (seed, sft.of_model(i).epochs) for sft in pairs.values() for i, seed in enumerate(sft.seeds)
    ]
    assert len(pairs) >= 8, "clusters"
    assert len(models) == len(set(models)), "disjoint"
    assert not {0, 1, 2} & {seed for seed, _ in models}, "new"


def test_sweeps_of_the_pretrained_model_share_all_that_is_trained_before_rl():
    recipes = [r for file in PRETRAINED for _, r in SweepConfig.load(file).points().values()]
    shared = {
        (r.model, r.sft, r.preferences, r.reward, r.rl.prompts, r.eval.prompts) for r in recipes
    }
    assert len(PRETRAINED) >= 3 and len(shared) == 1
    for recipe in recipes:  # a pair's arms start from its first model, or from its soup
        first = recipe.rl.arms["ppo"].init
        assert recipe.eval.kl_to == (first, "base") and recipe.rl.arms["ppo"].reference == first


def test_an_override_holds_in_every_point(tmp_path):
    settings = {"rl.learning_rate": 1e-6, "eval.prompts": {"path": "held.jsonl", "limit": 9}}
    config(tmp_path, settings=settings | {"rl.arms": ARMS})
    given = ["eval.prompts.limit=7", "rl.learning_rate=3e-5", "model.precision=fp32"]
    for _, recipe in SweepConfig.load(tmp_path / "sweep.yaml", given).points().values():
        assert (recipe.eval.prompts.path, recipe.eval.prompts.limit) == ("held.jsonl", 7)
        assert (recipe.rl.learning_rate, recipe.model.precision) == (3e-5, "fp32")


def test_an_override_sets_a_section_again_that_the_settings_set_in_part(tmp_path):
    settings = {"eval.prompts": "held.jsonl", "eval.prompts.limit": 9, "rl.arms": ARMS}
    with pytest.raises(ConfigError, match="eval.prompts is 'held.jsonl', not a section"):
        config(tmp_path, settings=settings).points()
    made = SweepConfig.load(tmp_path / "sweep.yaml", ["eval.prompts={path: held.jsonl}"])
    assert [*made.settings] == ["eval.prompts.limit", "rl.arms", "eval.prompts"]
    assert all(recipe.eval.prompts.limit is None for _, recipe in made.points().values())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rl.kl_coef=0.2", "the axis rl.kl_coef of .*sweep.yaml sets it, point by point"),
        ("sft.seeds=[0]", "the axis pair of"),
        ("sft={seeds: [0]}", "the axis pair of"),
        ("sft.seeds.first=1", "the axis pair of"),
        ("rl.kl_coef", "write key=value"),
        ("rl.seeds=[", "the value is not YAML"),
    ],
)
def test_an_override_that_cannot_hold_is_refused(tmp_path, override, told):
    config(tmp_path)
    with pytest.raises(ConfigError, match=told):
        SweepConfig.load(tmp_path / "sweep.yaml", [override])
    assert SweepConfig.load(tmp_path / "sweep.yaml", ["sft.seed=1", "rl.kl=k3"])  # other keys


def test_a_date_is_refused_as_any_wrong_value(tmp_path):
    config(tmp_path)
    made = SweepConfig.load(tmp_path / "sweep.yaml", ["rl.num_updates=2024-01-01"])
    with pytest.raises(ConfigError, match="rl.num_updates"):
        made.points()


def test_a_planted_effect_is_found_over_the_clusters(tmp_path):
    made = config(tmp_path, recipe=str(RECIPES / "study" / ".." / "quickstart.yaml"))
    names = list(made.points())
    assert len(names) == 12 and names[0] == "pair-0_kl_coef-0.1"
    effects = {n: (8.0 if n.endswith("0.1") else 0.0) + 0.5 * int(n[5]) - 1.25 for n in names}
    called: list[str] = []
    out = run_sweep(made, tmp_path / "out", worker(effects, called))
    assert called == names
    summary = json.loads((out / "sweep.json").read_text())
    assert summary["recipe"] == str(RECIPES / "quickstart.yaml")
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
    lines = plan_lines(points_of(made, out), out, "report", lambda recipe, *_: {recipe.name: "rl"})
    assert lines[0] == "pair-0_kl_coef-0.1: finished" and lines[1].endswith("more jobs")
    assert "12 points, 10 to do" in lines[-2]


def test_a_dry_run_counts_what_points_share_once(tmp_path):
    """Two pairs at two β: 4 SFT models, 2 reward models, 2 soups; 2 arms x 1 seed at each point; SFT evaluated once."""
    grid = {"pair": dict(list(PAIRS.items())[:2]), "rl.kl_coef": [0.1, 0.3]}
    settings = {"rl.arms": ARMS, "rl.seeds": [0]}
    made, out = config(tmp_path, grid=grid, settings=settings), tmp_path / "out"
    line = plan_lines(points_of(made, out), out, "report", remaining)[-2]
    assert line.startswith("4 points, 4 to do, 28 jobs: ")
    for count in ("4 sft", "2 preferences", "2 reward", "2 soup", "8 rl", "10 eval"):
        assert count in line
    assert not out.exists()
    for number, seconds in enumerate((60.0, 120.0)):
        for stage in (
            "sft[0]",
            "preferences",
            "reward",
            "soup",
            "rl ppo seed 0",
            "eval ppo seed 0",
        ):
            record = out / "stages" / f"{stage}-{number}" / "stage.json"
            record.parent.mkdir(parents=True)
            record.write_text(json.dumps({"stage": stage, "seconds": seconds}))
    line = plan_lines(points_of(made, out), out, "report", remaining)[-2]
    assert line.endswith("about 0.7 h one after another")  # 28 jobs of a minute and a half


def test_sweeps_share_stages_and_do_not_write_there_at_once(tmp_path):
    runs = tmp_path / "runs"
    stages = runs / "shared" / "stages"
    for name in ("one", "two"):
        made = config(tmp_path, name=name, stages="shared")
        run_sweep(made, runs / name, worker(dict.fromkeys(made.points(), 1.0), []), only="pair-0*")
        assert (runs / name / "stages").resolve() == stages.resolve()
    with locked(stages / ".lock", stages), pytest.raises(ConfigError, match="shared"):
        run_sweep(made, runs / "two", worker({}, []))


def test_stages_that_are_anothers_are_not_filled(tmp_path):
    made = config(tmp_path, name="one", stages="shared")
    (tmp_path / "runs" / "one" / "stages").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"one/stages: holds the stages of .*one, and the sweep's lie in"
    ):
        run_sweep(made, tmp_path / "runs" / "one", worker({}, []))
    (tmp_path / "runs" / "one" / "stages").rmdir()
    (tmp_path / "runs" / "one" / "stages").symlink_to(tmp_path / "gone")  # its target was deleted
    effects = dict.fromkeys(made.points(), 1.0)
    run_sweep(made, tmp_path / "runs" / "one", worker(effects, []), only="pair-0*")


def test_a_table_for_latex_has_no_character_that_latex_lacks():
    table = as_latex(
        [{"at": "α=0.5", "arm": "a_b", "effect": -0.0123, "low": None, "note": "{±3 %}~^\\"}]
    )
    assert table.isascii() and r"$\alpha$=0.5 & a\_b & -0.0123 & -- & \{$\pm$3 \%\}" in table


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


def test_a_landscape_gives_an_effect_per_place_and_column():
    e = {"mean": 0.1, "low": 0.0, "high": 0.3}
    place = lambda *at: {"at": list(at), "minus_first": {"proxy": e, "loss": e}}
    rows = effects_of(
        {"models": ["sft[0]", "sft[1]"], "places": [place(0.0), place(1.0), place(0.5)]}
    )
    named = [(row["subject"], row["baseline"], row["measure"], row["effect"]) for row in rows]
    assert named[2:] == [("α=0.5", "α=0", "proxy", 0.1), ("α=0.5", "α=0", "log-likelihood", -0.1)]
    assert (rows[1]["low"], rows[1]["high"]) == (-0.3, 0.0), "a lower loss is more likelihood"
    assert rows[0]["at"] == "between sft[0], sft[1]" and len(rows) == 4
    plane = effects_of({"models": ["a", "b", "c"], "places": [place(0.0, 0.0), place(1.0, 0.5)]})
    assert plane[0]["subject"] == "x=1, y=0.5"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {"rl.kl_coef": [0.1, 0.1]}, "cluster": None, "margins": {}}, "grid.rl.kl_coef has a value twice"),
        ({"grid": {"engine.jobs": [1, 2]}, "cluster": None, "margins": {}}, "an axis changes nothing"),
        ({"grid": {"x": {"a b": {"rl.kl_coef": 0.1}, "a-b": {"rl.kl_coef": 0.2}}}, "cluster": None, "margins": {}},
         "pairs: two points would both be called a-b, as letters, digits"),
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


def finished_run(recipe, out: Path, *, better: float, gold: str = "g", prompts: int = 40) -> Path:
    """A run as its stages lie on disk: proxy = 2·√KL, salsa `better` above it, and at twice the KL of ppo."""
    stages, arms = [], {}

    def stage(label, rows=None, inputs=None, curve=()):
        digest = digest_of([label, rows, inputs])
        stages.append({"stage": label, "digest": digest})
        path = stage_path(out, label, digest)
        path.mkdir(exist_ok=True)
        (path / "stage.json").write_text(json.dumps({"inputs": inputs or {}}))
        for name, lines in (("samples", rows), ("metrics", curve)):
            if lines:
                (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))

    for name in ("sft", *recipe.rl.arms):
        spent = {"sft": 0.0, "ppo": 0.1 / recipe.rl.kl_coef}.get(name, 0.2 / recipe.rl.kl_coef)
        score = 2 * math.sqrt(spent) + (better if name == "salsa" else 0)
        own = spent if name in ("sft", "ppo") else spent + 1  # the soup is a nat away
        row = {"proxy": score, "gold": -score, "kl_to_sft[0]": spent, "kl_reference": own}
        row |= {"length": 3, "ended": True}
        scored = {"score proxy": str(recipe.sft.seeds), "score gold": gold}
        for seed in recipe.rl.seeds:
            rows = [{"prompt": f"{i}", "response": "a"} | row for i in range(prompts)]
            stage(f"eval {name} seed {seed}", rows, scored)
            way = [{"step": 1, "score": 0.5, "gold": 0.1, "kl": 0.2, "kl_to_sft[0]": 0.3}]
            if name != "sft":
                stage(f"rl {name} seed {seed}", inputs={"β": recipe.rl.kl_coef}, curve=way)
        arms[name] = {"init": "sft[0]", "reference": "sft[0]"}
    extra = {"scores": ["proxy", "gold"], "kl_to": ["sft[0]"], "stages": stages, "arms": arms}
    (out / "report.json").write_text(json.dumps(result(1.0) | extra))
    return out


def frontier_config(tmp_path: Path, **values) -> SweepConfig:
    settings = {"rl.arms": ARMS, "eval.kl_to": ["sft[0]"]}
    margins = {"proxy": 0.5, "proxy win rate": 3.0}
    return config(tmp_path, settings=settings, margins=margins, **values)


def test_runs_have_frontiers_and_verdicts_at_equal_kl(tmp_path):
    made = frontier_config(tmp_path)
    gaps = [0.9, 1.0, 1.1, 0.95, 1.05, 1.0]

    def run(recipe, *, out, until, jobs):
        return finished_run(recipe, out, better=gaps[int(recipe.name[5])])

    out = run_sweep(made, tmp_path / "out", run)
    summary = json.loads((out / "sweep.json").read_text())
    assert summary["notes"] == []
    verdicts = {
        (v["at"], v["rl.kl_coef"]): v for v in summary["verdicts"] if v["measure"] == "proxy"
    }
    for at, where in (
        ("equal KL to sft[0]", "kl_coef=0.1"),
        ("equal KL to sft[0]", "kl_coef=0.3"),
    ):
        assert verdicts[at, where]["verdict"] == "holds"
        assert verdicts[at, where]["clusters"] == 6
    assert verdicts["equal KL to sft[0]", "kl_coef=0.1"]["effect"] == pytest.approx(1.0)
    assert verdicts["equal KL to sft[0], average", "all"]["verdict"] == "holds"
    to_sft, to_own = summary["frontiers"]
    assert (to_sft["title"], to_own["title"]) == ("KL to sft[0]", "KL to own reference")
    assert to_sft["clusters"] == [f"pair-{i}" for i in range(6)]
    assert [p["beta"] for p in to_sft["arms"]["ppo"]["points"]] == [None, 0.3, 0.1]
    assert [p["kl"]["mean"] for p in to_sft["arms"]["salsa"]["points"]] == pytest.approx(
        [0, 2 / 3, 2]
    )
    assert [p["beta"] for p in to_own["arms"]["salsa"]["points"]] == [0.3, 0.1], "not measured"
    assert to_sft["arms"]["ppo"]["training"][0] == {
        "beta": 0.3, "step": 1, "kl": 0.3, "proxy": 0.5, "gold": 0.1
    }  # fmt: skip
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    (row,) = [
        r
        for r in rows
        if (r["pair"], r["rl.kl_coef"], r["at"], r["measure"])
        == ("pair-0", "kl_coef=0.1", "equal KL to sft[0]", "gold")
    ]
    assert float(row["effect"]) == pytest.approx(-0.9)
    page = (out / "sweep.html").read_text()
    assert "Reward against KL" in page and '"frontier-0-gold"' in page
    assert "they part in" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe: {"prompts": 30 if recipe.rl.kl_coef == 0.3 else 40}, "answered other prompts (30)"),
        (lambda recipe: {"gold": str(recipe.rl.kl_coef)}, "gold of pair-0_kl_coef-0.3, ppo seed 0 is another reward"),
        (lambda recipe: {"prompts": 12}, "12 held-out prompts are too few to resample"),
    ],
)  # fmt: skip
def test_what_is_no_frontier_is_told_and_the_rest_is_written(tmp_path, capsys, change, message):
    made = frontier_config(tmp_path)

    def run(recipe, *, out, until, jobs):
        return finished_run(recipe, out, better=1.0, **change(recipe))

    out = run_sweep(made, tmp_path / "out", run, only="pair-[01]*")
    summary = json.loads((out / "sweep.json").read_text())
    (note,) = summary["notes"]
    assert message in note and "\n" not in note and note in capsys.readouterr().err
    assert summary["frontiers"] == [] and len(summary["rows"]) == 8 and summary["verdicts"]
    assert message.split(" (")[0] in (out / "sweep.html").read_text()


def test_another_axis_has_frontiers_of_its_own(tmp_path):
    grid = {"pair": PAIRS, "rl.kl_coef": [0.1, 0.3], "rl.num_updates": [10, 20]}
    made = frontier_config(tmp_path, grid=grid)
    assert made.beta_axes == ["rl.kl_coef"]

    def run(recipe, *, out, until, jobs):
        return finished_run(recipe, out, better=0.05 * recipe.rl.num_updates)

    out = run_sweep(made, tmp_path / "out", run, only="pair-[01]*")
    summary = json.loads((out / "sweep.json").read_text())
    effects = {
        v["rl.num_updates"]: v["effect"]
        for v in summary["verdicts"]
        if (v["at"], v["rl.kl_coef"], v["measure"])
        == ("equal KL to sft[0]", "kl_coef=0.1", "proxy")
    }
    assert effects == {
        "num_updates=10": pytest.approx(0.5),
        "num_updates=20": pytest.approx(1.0),
    }
    assert summary["frontiers"][0]["axes"] == {"rl.num_updates": "num_updates=10"}


def test_a_cluster_with_points_to_do_is_left_out_of_the_frontiers(tmp_path):
    made = frontier_config(tmp_path)

    def run(recipe, *, out, until, jobs):
        return finished_run(recipe, out, better=1.0)

    run_sweep(made, tmp_path / "out", run, only="pair-[02]*")
    out = run_sweep(made, tmp_path / "out", run, only="pair-1*0.1")
    summary = json.loads((out / "sweep.json").read_text())
    assert summary["frontiers"][0]["clusters"] == ["pair-0", "pair-2"]
    assert summary["frontiers"][0]["incomplete"] == ["pair-1"] and len(summary["points"]) == 5
    assert "Not finished, and left out: pair-1." in (out / "sweep.html").read_text()


def test_axes_that_vary_beta(tmp_path):
    named = {"low": {"rl.arms.ppo.kl_coef": 0.1}, "high": {"rl.arms.ppo.kl_coef": 0.2}}
    mixed = {"a": {"rl.kl_coef": 0.1}, "b": {"rl.kl_coef": 0.2, "rl.num_updates": 5}}
    grid = {"pair": PAIRS, "strength": named, "both": mixed}
    assert config(tmp_path, grid=grid).beta_axes == ["strength"]


def test_an_arm_starts_where_its_init_model_was_evaluated(tmp_path):
    """ppo at sft[0], which is its reference; salsa there too, its KL to the soup not measured; the last not at all."""
    arms = ARMS | {"soups": {"init": "soup", "reference": "soup"}}
    settings = {"rl.arms": arms, "eval.kl_to": ["sft[0]"]}
    made = config(tmp_path, settings=settings)
    point = points_of(made, tmp_path)[0]
    point.path.mkdir(parents=True)
    (point.path / "stages").mkdir()
    finished_run(point.recipe, point.path, better=1.0)
    report = json.loads(point.result.read_text())
    found = read_policies(point.recipe, point.path, report, point="a", cluster="p")
    starts = {p.arm: p for p in found if p.beta == START and p.seed == 0}
    assert set(starts) == {"ppo", "salsa"}
    assert starts["ppo"].columns["kl_own"] == pytest.approx(0)
    assert "kl_own" not in starts["salsa"].columns
    trained = {p.arm: p for p in found if p.beta == 0.1 and p.seed == 1}
    assert set(trained) == {"ppo", "salsa", "soups"}
    assert trained["salsa"].columns["kl_own"][0] == pytest.approx(3.0)
    assert trained["salsa"].columns["kl_to_sft[0]"][0] == pytest.approx(2.0)
    assert trained["salsa"].curve[0]["kl_to_sft[0]"] == 0.3 and not starts["ppo"].curve
    assert trained["salsa"].rewards == {"proxy": "(0, 1)", "gold": "g"}
    (report["stages"]).clear()
    with pytest.raises(DataError, match="the samples of eval sft seed 0 are not there"):
        read_policies(point.recipe, point.path, report, point="a", cluster="p")
