"""Stages are done once, named by what decides them, complete or absent; the graph is lazy."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from salsa.artifacts import Checkpoint, FileHashes
from salsa.config import (
    ForecastConfig,
    LandscapeConfig,
    Recipe,
    RewardFunction,
    RLConfig,
    SFTConfig,
)
from salsa.config.expressions import ReferenceRule, identity_of
from salsa.errors import CheckpointError, ConfigError, SalsaError
from salsa.pipeline import remaining, run_recipe, stages_of
from salsa.rewards import RewardSource
from salsa.runtime.engine import Engine
from salsa.runtime.executors.local import ProcessPool
from salsa.stages import directory as directory_module
from salsa.stages import jobs
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph, Node
from salsa.stages.jobs import RLJob, SFTJob, SoupJob
from salsa.stages.nodes import check_inputs

DONE: list[str] = []


@dataclass(frozen=True)
class Writes:
    """A job that writes a file and says so."""

    needs_engine: ClassVar[bool] = False
    can_be_divided: ClassVar[bool] = False
    label: str
    text: str = "hello"
    inputs: dict = field(default_factory=dict)
    fails: bool = False

    def identity(self):
        return {"config": {"text": self.text}, "inputs": self.inputs}

    def decides(self, name):
        return not name.startswith("watched")

    def execution(self):
        return {"batch": 3}

    def run(self, directory, engine):
        DONE.append(self.label)
        (directory / "resume").mkdir(exist_ok=True)
        (directory / "resume" / "state").write_text("half")
        if self.fails:
            raise RuntimeError("killed")
        (directory / "out.jsonl").write_text(self.text + "".join(sorted(self.inputs.values())))


@dataclass(frozen=True)
class Computes(Writes):
    """A job whose arithmetic is part of its identity."""

    needs_engine: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def nothing_done():
    DONE.clear()


def finish(path, *jobs, precision="fp32", verify=False):
    """Finish independent jobs in the run at `path`; their stages."""
    run = RunDirectory(path, verify=verify)
    with run.opened("recipe"):
        Graph(run, precision=precision).finish([Node(j.label, (), lambda j=j: j) for j in jobs])
    return run.finished


def test_a_finished_stage_is_reused_and_a_changed_one_redone(tmp_path):
    first, other, third = finish(
        tmp_path / "run", Writes("a[0]"), Writes("a[0]", "x"), Writes("a[0]", inputs={"i": "2"})
    )
    (again,) = finish(tmp_path / "run", Writes("a[0]"))
    assert (first.reused, again.reused, len(DONE)) == (False, True, 3)
    assert first.path == again.path and len({first.path, other.path, third.path}) == 3
    record = json.loads((third.path / "stage.json").read_text())
    assert record["inputs"] == {"i": "2"} and record["config"] == {"text": "hello"}
    assert record["versions"]["torch"] and record["seconds"] >= 0 and record["machine"]["cores"]
    assert record["execution"] == {"batch": 3}


def test_what_fails_leaves_no_finished_stage_and_keeps_its_resume_state(tmp_path):
    with pytest.raises(RuntimeError):
        finish(tmp_path / "run", Writes("a", fails=True))
    (partial,) = (tmp_path / "run" / "stages").iterdir()
    assert partial.suffix == ".partial" and (partial / "resume" / "state").read_text() == "half"
    (stage,) = finish(tmp_path / "run", Writes("a"))
    assert not (stage.path / "resume").exists()
    assert [p.suffix for p in (tmp_path / "run" / "stages").iterdir()] == [""]


@pytest.mark.parametrize("moment", ["finish_directory", "rmtree"])
def test_a_kill_at_the_end_of_a_stage_repeats_nothing(moment, tmp_path, monkeypatch):
    """Between the record and the rename, and between the rename and dropping `resume/`."""
    with monkeypatch.context() as patch:
        where = directory_module if moment == "finish_directory" else directory_module.shutil
        patch.setattr(where, moment, lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(tmp_path / "run", Writes("a"))
    (stage,) = finish(tmp_path / "run", Writes("a"))
    assert stage.reused and DONE == ["a"] and (stage.path / "out.jsonl").exists()
    assert not (stage.path / "resume").exists()
    assert [p.suffix for p in (tmp_path / "run" / "stages").iterdir()] == [""]


def test_a_finished_stage_whose_bytes_changed_is_not_used(tmp_path):
    (stage,) = finish(tmp_path / "run", Writes("a"))
    (stage.path / "out.jsonl").write_text("HELLO!")
    with pytest.raises(CheckpointError, match=r"a-\w+: changed since it was made .* Delete that"):
        finish(tmp_path / "run", Writes("a"))


def test_verify_hashes_also_what_looks_unchanged(tmp_path):
    """Same size, same time: only --verify sees it."""
    import os

    (stage,) = finish(tmp_path / "run", Writes("a"))
    file = stage.path / "out.jsonl"
    before = file.stat()
    finish(tmp_path / "run", Writes("a"))
    file.write_text("jello")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    finish(tmp_path / "run", Writes("a"))
    with pytest.raises(CheckpointError, match="changed since it was made"):
        finish(tmp_path / "run", Writes("a"), verify=True)


def test_another_recipe_does_not_overwrite(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.opened("rl: {beta: 1}\n"):
        for name in ("report.html", "landscape.json", "forecast.html"):
            (run.path / name).write_text("of beta 1")
    with (
        pytest.raises(ConfigError, match=r"another recipe \(rl.beta: 1 → 2, and 1 more\)"),
        run.opened("rl: {beta: 2}\nseed: 1", decisive=yaml.safe_load),
    ):
        pass
    with pytest.raises(ConfigError, match="of another version of salsa"), run.opened("no recipe"):
        pass
    assert (run.path / "recipe.yaml").read_text() == "rl: {beta: 1}\n"
    assert (run.path / "report.html").exists()
    with run.opened("rl: {beta: 2}\n", force=True):
        assert (run.path / "recipe.yaml").read_text() == "rl: {beta: 2}\n"
        for name in ("report.html", "landscape.json", "forecast.html"):
            assert not (run.path / name).exists()  # a stop now leaves no report of beta 1


def test_a_recipe_that_is_only_computed_otherwise_is_the_same(tmp_path):
    run = RunDirectory(tmp_path / "run")
    decisive = lambda text: text.splitlines()[0]
    with run.opened("beta: 1\nthreads: 1\n", decisive=decisive):
        (run.path / "report.html").write_text("of beta 1")
    with run.opened("beta: 1\nthreads: 2\n", decisive=decisive):
        assert (run.path / "recipe.yaml").read_text() == "beta: 1\nthreads: 2\n"
        assert (run.path / "report.html").exists()


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="files that are not a run's"),
        RunDirectory(tmp_path).opened("recipe"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="is a file"),
        RunDirectory(tmp_path / "thesis.tex").opened("recipe"),
    ):
        pass


def test_a_directory_in_use_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path\n"
        "from salsa.stages.directory import RunDirectory; from salsa.errors import ConfigError\n"
        "try:\n    with RunDirectory(Path(sys.argv[1])).opened('recipe'): pass\n"
        "except ConfigError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with run.opened("recipe"):
        output = subprocess.run(command, capture_output=True, text=True).stdout
    assert "in use by another salsa process" in output
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


# the graph


def chain(names, made=None):
    """Nodes of which each needs the one before."""
    nodes = []
    for name in names:

        def make(*needs, name=name):
            if made is not None:
                made.append(name)
            return Writes(name, inputs={str(i): c.digest for i, c in enumerate(needs)})

        nodes.append(Node(name, tuple(nodes[-1:]), make))
    return nodes


def test_needs_are_finished_first_and_nothing_else_is(tmp_path):
    made = []
    nodes = chain("abcd", made)
    run = RunDirectory(tmp_path / "run")
    with run.opened("recipe"):
        graph = Graph(run)
        graph.finish([nodes[1]])
        assert DONE == made == ["a", "b"]
        graph.finish([nodes[2], nodes[1]])
    assert DONE == ["a", "b", "c"] and graph[nodes[2]].path.name.startswith("c-")
    assert [stage.label for stage in run.finished] == ["a", "b", "c"]


def test_what_is_left_is_counted_without_running_it(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.opened("recipe"):
        nodes = chain("abc")
        Graph(run).finish(nodes[:1])
    left = Graph(run).remaining(nodes)
    other = Graph(run).remaining(chain("abcd"))
    assert DONE == ["a"] and list(left.values()) == ["b", "c"]
    assert list(other.values()) == ["b", "c", "d"]
    assert left.items() <= other.items(), "what both need has one digest"
    beside = Node("ema", (nodes[1],), jobs.moved_reference)
    nodes.append(Node("e", (beside,), lambda made: Writes("e", inputs={"of": made.digest})))
    assert list(Graph(run).remaining(nodes[-1:]).values()) == ["b", "e"]
    with pytest.raises(CheckpointError, match="moving reference is missing"):
        Graph(run).remaining([Node("ema", (nodes[0],), jobs.moved_reference)])


def test_work_is_prepared_only_if_there_is_any(tmp_path):
    calls = []
    for _ in range(2):
        run = RunDirectory(tmp_path / "run")
        with run.opened("recipe"):
            Graph(run, before_work=lambda: calls.append(1)).finish(chain("ab"))
    assert calls == [1]


def test_several_processes_finish_what_one_does(tmp_path):
    outputs = []
    for name, pool in (("one", None), ("two", ProcessPool(2))):
        run = RunDirectory(tmp_path / name)
        with run.opened("recipe"):
            graph = Graph(run, executor=pool)
            graph.finish([*chain("abc"), *chain("xyz")])
        if pool is not None:
            pool.close()
        outputs.append({stage.label: stage.record["output"] for stage in run.finished})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 6


def test_an_error_in_a_process_is_raised_here(tmp_path):
    pool = ProcessPool(2)
    run = RunDirectory(tmp_path / "run")
    node = Node("a", (), lambda: Writes("a", fails=True))
    with run.opened("recipe"), pytest.raises(RuntimeError, match="killed"):
        Graph(run, executor=pool).finish([node])
    pool.close()
    assert [p.suffix for p in (run.path / "stages").iterdir()] == [".partial"]


# arithmetic


def test_arithmetic_is_part_of_the_identity_of_what_computes(tmp_path):
    run = RunDirectory(tmp_path / "run")
    fp32, bf16 = (run.place(Computes("a"), p).final for p in ("fp32", "bf16"))
    assert fp32 != bf16
    assert run.place(Writes("a"), "fp32").final == run.place(Writes("a"), "bf16").final


def test_auto_reuses_what_was_finished_in_any_arithmetic(tmp_path):
    for precision in ("fp32", "bf16"):
        path = tmp_path / precision
        (done,) = finish(path, Computes("a"), precision=precision)
        (again,) = finish(path, Computes("a"), precision="auto")
        assert done.path == again.path and again.reused
        assert done.record["precision"] == precision and done.record["precision_reason"]


def test_a_stage_never_changes_its_arithmetic(tmp_path):
    with pytest.raises(RuntimeError):
        finish(tmp_path / "run", Computes("a", fails=True), precision="bf16")
    with pytest.raises(
        ConfigError,
        match=r"a was begun in bf16, and model.precision=fp32. Set model.precision=bf16",
    ):
        finish(tmp_path / "run", Computes("a"), precision="fp32")
    (stage,) = finish(tmp_path / "run", Computes("a"), precision="bf16")
    assert not stage.reused


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_auto_goes_on_in_the_arithmetic_that_a_stage_was_begun_in(begun, tmp_path):
    """What is faster is measured anew every time, and may come out the other way."""
    with pytest.raises(RuntimeError):
        finish(tmp_path / "run", Computes("a", fails=True), precision=begun)
    (stage,) = finish(tmp_path / "run", Computes("a"), precision="auto")
    assert stage.record["precision"] == begun
    assert not list((tmp_path / "run" / "stages").glob("*.partial"))


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_auto_goes_on_in_the_arithmetic_that_a_run_was_begun_in(begun, tmp_path):
    """Else a noisy machine, or another one, puts half of the arms into another arithmetic."""
    finish(tmp_path / "run", Computes("a"), Writes("b"), precision=begun)
    with pytest.raises(RuntimeError):
        finish(tmp_path / "run", Computes("c", fails=True), precision=begun)
    stages = finish(tmp_path / "run", *(Computes(label) for label in "acd"), precision="auto")
    assert [stage.record.get("precision") for stage in stages] == [begun] * 3
    assert stages[-1].record["precision_reason"] == "as the run was begun"


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_auto_goes_on_in_the_arithmetic_of_a_run_killed_in_its_first_stage(begun, tmp_path):
    with pytest.raises(RuntimeError):
        finish(tmp_path / "run", Computes("a", fails=True), precision=begun)
    stages = finish(tmp_path / "run", Computes("a"), Computes("b"), precision="auto")
    assert [stage.record["precision"] for stage in stages] == [begun, begun]


@pytest.mark.parametrize("words", ["warning: slow", None])
def test_a_slow_arithmetic_is_said_once_where_the_run_computes(words, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Engine, "emulation_warning", lambda self: words)
    monkeypatch.setattr("salsa.stages.graph.say", said.append)
    finish(tmp_path / "run", Computes("a"), Computes("b"), precision="bf16")
    assert said[0] == "precision: bf16 (as asked for)"
    assert [line for line in said if "slow" in line] == ([words] if words else [])


def test_a_finished_run_is_not_computed_anew_in_another_arithmetic_by_accident(tmp_path):
    finish(tmp_path / "run", Computes("a"), Writes("b"), precision="bf16")
    run = RunDirectory(tmp_path / "run")
    run.check_precision("bf16")
    run.check_precision("auto")
    with pytest.raises(
        ConfigError, match=r"run: a was computed in bf16, model.precision=fp32 would do"
    ):
        run.check_precision("fp32")


# what is only logged


def test_a_stage_that_logged_other_things_is_reused_and_of_several_the_nearest(tmp_path, capsys):
    inputs = {"i": "1", "watched a": "2"}
    (none,) = finish(tmp_path / "run", Computes("rl", inputs={"i": "1"}))
    (one,) = finish(tmp_path / "run", Computes("rl", inputs=inputs))
    assert one.path == none.path and one.reused and DONE == ["rl"]
    assert "rl: reused; trained when watched a was not logged" in capsys.readouterr().err
    # made by hand, for the graph never trains it again: a second one, that logged more
    folder = none.path.with_name("rl-" + "f" * 12)
    shutil.copytree(none.path, folder)
    record = none.record | {"digest": "f" * 64, "inputs": inputs | {"watched b": "3"}}
    (folder / "stage.json").write_text(json.dumps(record))
    (nearest,) = finish(tmp_path / "run", Computes("rl", inputs=inputs))
    assert nearest.path == folder and nearest.reused
    assert "rl: reused\n" in capsys.readouterr().err
    (fewest,) = finish(tmp_path / "run", Computes("rl", inputs={"i": "1"}))
    assert fewest.path == none.path, "the very same comes before all others"


@pytest.mark.parametrize(
    "other",
    [
        Computes("rl seed 0", inputs={"i": "2", "watched a": "2"}),
        Computes("rl seed 0", "another text", inputs={"i": "1", "watched a": "2"}),
        Computes("rl seed", inputs={"i": "1", "watched a": "2"}),
    ],
)
def test_a_stage_with_another_result_is_not(other, tmp_path):
    finish(tmp_path / "run", Computes("rl seed 0", inputs={"i": "1"}))
    (stage,) = finish(tmp_path / "run", other)
    assert not stage.reused and len(DONE) == 2


def test_nor_one_in_another_arithmetic(tmp_path):
    finish(tmp_path / "run", Computes("rl", inputs={"i": "1"}), precision="bf16")
    asked = Computes("rl", inputs={"i": "1", "watched a": "2"})
    (stage,) = finish(tmp_path / "run", asked, precision="fp32")
    assert not stage.reused and stage.record["precision"] == "fp32"


def test_the_very_same_stage_comes_before_a_newer_one_that_logged_other_things(tmp_path):
    """`auto` would take either arithmetic."""
    asked, other = ({"i": "1", f"watched {name}": "2"} for name in "ab")
    (same,) = finish(tmp_path / "run", Computes("rl", inputs=asked), precision="bf16")
    (newer,) = finish(tmp_path / "run", Computes("rl", inputs=other), precision="fp32")
    record = newer.record | {"started": "9999"}
    (newer.path / "stage.json").write_text(json.dumps(record))
    (stage,) = finish(tmp_path / "run", Computes("rl", inputs=asked), precision="auto")
    assert stage.path == same.path


def test_rl_is_decided_by_all_but_the_kl_to_other_models_and_scores_that_choose_nothing():
    job = replace(
        BEFORE["rl"], kl_to={"base": TWO}, monitors={"gold": RewardSource(checkpoint=TWO)}
    )
    undecisive = {name for name in job.identity()["inputs"] if not job.decides(name)}
    assert undecisive == {"kl_to base", "score gold"}
    chosen = RLConfig(kl_coef=0.1, select={"metric": "gold"})
    assert replace(job, config=chosen).decides("score gold")
    for kind in ("soup", "sft"):
        assert all(map(BEFORE[kind].decides, BEFORE[kind].identity()["inputs"]))


# identities of the real jobs

ONE, TWO, THREE = (Checkpoint(Path(name), name * 64) for name in "123")
BEFORE = {
    "soup": SoupJob("soup", (ONE, TWO), THREE, options={"weights": [0.5, 0.5]}),
    "sft": SFTJob("sft[0]", ONE, SFTConfig(dataset="x"), SFTConfig(dataset="x").dataset, 0),
    "rl": RLJob(
        "rl", ONE, ReferenceRule((ONE,)), RewardSource(checkpoint=TWO), RLConfig(kl_coef=0.1),
        SFTConfig(dataset="x").dataset, 0,
    ),
}  # fmt: skip
DECIDES = {
    "soup": [
        {"ingredients": (ONE, THREE)}, {"ingredients": (TWO, ONE)}, {"base": ONE}, {"base": None},
        {"as_near_as": ONE}, {"options": {"weights": [0.25, 0.75]}}, {"options": {"score": "salsa.demo:gold"}},
    ],
    "sft": [{"base": TWO}, {"seed": 1}, {"config": SFTConfig(dataset="x", epochs=2)}],
    "rl": [
        {"init": TWO}, {"reference": ReferenceRule((TWO,))}, {"reference": ReferenceRule((ONE,), ema=0.1)},
        {"reward": RewardSource(checkpoint=ONE)}, {"seed": 1}, {"config": RLConfig(kl_coef=0.2)},
        {"reward": RewardSource((RewardFunction(call="salsa.demo:gold"),))},
        {"monitors": {"gold": RewardSource((RewardFunction(call="salsa.demo:gold"),))}},
        {"monitors": {"gold": RewardSource(checkpoint=TWO)}}, {"kl_to": {"base": TWO}},
    ],
}  # fmt: skip
COMPUTES = {
    "sft": [{"config": SFTConfig(dataset="x", microbatch_size=4, checkpoint_every=7)}],
    "rl": [
        {"config": RLConfig(kl_coef=0.1, **{key: value})}
        for key, value in {
            "microbatch_tokens": 64, "gradient_checkpointing": True, "checkpoint_every": 3,
            "keep_checkpoints": 5,
        }.items()
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", BEFORE)
def test_all_that_decides_a_result_is_in_its_identity(kind):
    job, seen = BEFORE[kind], [BEFORE[kind].identity()]
    for change in DECIDES[kind]:
        identity = replace(job, **change).identity()
        assert identity not in seen, change
        seen.append(identity)
    for change in COMPUTES.get(kind, []):
        changed = replace(job, **change)
        assert changed.identity() == seen[0] and changed.execution() != job.execution(), change


def small_recipe(folder: Path, **sections) -> Recipe:
    """One arm, a callable for a reward; its data are there."""
    prompts, replies = folder / "prompts.jsonl", folder / "sft.jsonl"
    prompts.write_text('{"prompt": "How are you?"}\n' * 4)
    replies.write_text('{"prompt": "How are you?", "completion": "Well."}\n' * 4)
    arm = {"init": "sft[0]", "reference": "sft[0]"}
    values = {
        "name": "small", "model": {"path": "embedded"}, "sft": {"dataset": str(replies)},
        "reward": {"functions": [{"call": "salsa.demo:gold"}]},
        "rl": {"arms": {"ppo": arm}, "prompts": str(prompts), "kl_coef": 0.1},
        "eval": {"prompts": str(prompts), "baseline": "ppo"},
    }  # fmt: skip
    return Recipe.model_validate(values | sections)


def test_what_only_looks_at_further_models_does_not_change_what_rl_logs(tmp_path):
    """A forecast or landscape of sft[1] gave RL a KL to it, and so another digest."""
    recipe = small_recipe(tmp_path)
    needs = lambda one: [n.label for n in stages_of(one, FileHashes()).policies["ppo"][0].needs]
    looking = {
        "forecast": ForecastConfig(references=("sft[0]", "sft[1]")),
        "landscape": LandscapeConfig(),
    }
    assert needs(recipe) == needs(recipe.model_copy(update=looking)) == ["sft[0]", "base"]


@pytest.mark.parametrize(
    "change",
    [
        {"soup": {"method": "greedy", "score": "nowhere:score"}},
        {"forecast": {"prompts": "nowhere.jsonl"}},
        {"landscape": {"prompts": "nowhere.jsonl"}},
        {"landscape": {"validation": "nowhere.jsonl"}},
    ],
)
def test_what_is_not_there_is_told_before_any_work(change, tmp_path):
    check_inputs(small_recipe(tmp_path))
    with pytest.raises(SalsaError, match="nowhere"):
        check_inputs(small_recipe(tmp_path, **change))


def test_a_reward_model_that_could_not_score_is_refused_before_any_work(make_checkpoint, tmp_path):
    policy = str(make_checkpoint("llama").path)
    recipe = small_recipe(tmp_path, reward={"paths": [policy]})
    with pytest.raises(CheckpointError, match=f"{policy}: is no reward model"):
        check_inputs(recipe)
    values = small_recipe(tmp_path).model_dump(mode="json")
    values["eval"]["reward_models"] = {"second": policy}
    with pytest.raises(CheckpointError, match=f"{policy}: is no reward model"):
        check_inputs(Recipe.model_validate(values))


@pytest.mark.parametrize(
    ("reward", "label"),
    [({}, "reward"), ({"seeds": [0, 1]}, "reward soup"), ({"paths": ["a/b", "c/d"]}, "reward soup"),
     ({"paths": ["a/b"]}, None)],
)  # fmt: skip
def test_the_reward_model_is_found_under_the_label_that_its_stage_has(reward, label, tmp_path):
    pairs = {} if "paths" in reward else {"preferences": {"dataset": "pairs.jsonl"}}
    recipe = small_recipe(tmp_path, reward=reward, **pairs)
    (node,) = stages_of(recipe, FileHashes()).reward
    assert recipe.reward.stage == label and node.label == (label or "a/b")


def test_what_is_left_is_what_until_needs(tmp_path):
    recipe = small_recipe(tmp_path)
    kinds = lambda until: sorted(remaining(recipe, RunDirectory(tmp_path / "run"), until).values())
    sft, rl = ["sft[0]", "sft[1]"], [f"rl ppo seed {seed}" for seed in recipe.rl.seeds]
    assert kinds("sft") == sft and kinds("reward") == []
    assert kinds("rl") == [*rl, "sft[0]"]
    assert len(kinds("eval")) == 1 + 2 * len(rl) + 2
    assert set(kinds("report")) == {*kinds("eval"), "sft[1]"}
    assert "landscape" in kinds("landscape") and not set(rl) & set(kinds("landscape"))


@pytest.mark.parametrize(("init", "needed"), [("base", []), ("sft[1]", ["sft[1]"])])
def test_a_reward_model_trains_no_sft_model_but_the_one_it_starts_from(init, needed, tmp_path):
    """`salsa reward` trained them all first, hours with SmolLM2."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    pairs = {"dataset": str(tmp_path / "pairs.jsonl")}
    recipe = small_recipe(tmp_path, reward={"init": init}, preferences=pairs)
    left = remaining(recipe, RunDirectory(tmp_path / "run"), "reward").values()
    assert list(left) == [*needed, "preferences", "reward"]


def test_there_is_no_reward_model_to_train_where_rewards_are_functions(tmp_path):
    with pytest.raises(ConfigError, match="reward.functions: .* Use `salsa rl`"):
        run_recipe(small_recipe(tmp_path), out=tmp_path / "run", until="reward")


def test_identity_of_a_plain_reference_is_its_digest():
    assert identity_of(ReferenceRule((ONE,))) == ONE.digest
    assert identity_of(ReferenceRule((ONE,), pulls=False)) != ONE.digest


def test_a_changed_score_function_is_another_soup(monkeypatch):
    """The name in the options stays; what counts is the module's content."""
    job = replace(BEFORE["soup"], options={"method": "greedy", "score": "salsa.demo:gold"})
    seen = []
    for content in ("one", "two"):
        monkeypatch.setattr(jobs, "fingerprint", lambda source, content=content: content)
        seen.append(job.identity())
    assert seen[0] != seen[1]
