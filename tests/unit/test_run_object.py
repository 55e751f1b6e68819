"""`Run`: a run directory in Python, finished or going on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from salsa import Run
from salsa.errors import CheckpointError, ConfigError

RECIPE = """
name: going-on
model: {path: embedded}
sft: {dataset: sft.jsonl, seeds: [0, 1]}
reward: {functions: [{call: "mine:score"}]}
rl:
  arms:
    ppo: {init: "sft[0]", reference: "sft[0]"}
    salsa: {init: "sft[0]", reference: soup}
  prompts: prompts.jsonl
  seeds: [3, 5]
  kl_coef: 0.1
eval: {prompts: prompts.jsonl, baseline: ppo}
"""
DIGESTS = {name: char * 12 for name, char in (("old", "a"), ("new", "b"), ("other", "c"))}


def rows(count, **others):
    return [{"step": i + 1, "score": i / 10} | others for i in range(count)]


def stage(run, name, digest="old", *, state="", **files):
    folder = run.path / "stages" / f"{name}-{DIGESTS[digest]}{state}"
    folder.mkdir()
    for file, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{file}.jsonl").write_text(text)
    if not state:
        (folder / "stage.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    """Two arms, of which one seed of one arm is finished and another is going on."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = Run(tmp_path)
    stage(run, "rl-ppo-seed-3", metrics=rows(4))
    stage(run, "rl-ppo-seed-5", state=".partial", metrics=rows(2))
    stage(run, "eval-ppo-seed-3", samples=[{"response": "hi", "proxy": 0.5}])
    return run


def test_metrics_of_finished_and_unfinished_stages(run):
    assert run.arms == ("ppo", "salsa") and run.seeds == (3, 5)
    assert [len(run.metrics("ppo", seed)) for seed in run.seeds] == [4, 2]
    assert "working on rl-ppo-seed-5" in repr(run)


def test_a_line_that_is_being_written_is_left_out(run):
    file = next(run.path.glob("stages/*.partial")) / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 3, "sco')
    assert run.metrics("ppo", 5) == rows(2)
    with file.open("a") as stream:
        stream.write('re": 0.2}\n')
    assert run.metrics("ppo", 5) == rows(3)


def test_of_two_recipes_stages_the_one_that_the_report_shows(run):
    new = stage(run, "rl-ppo-seed-3", "new", metrics=rows(7))
    os.utime(new, (1, 1))
    assert len(run.metrics("ppo", 3)) == 4, "the newest, without a report"
    shown = [{"stage": "rl ppo seed 3", "digest": DIGESTS["new"] + "0" * 52}]
    (run.path / "report.json").write_text(json.dumps({"stages": shown}))
    assert len(run.metrics("ppo", 3)) == 7
    assert run.report["stages"] == shown


def test_an_arm_whose_name_begins_like_another_is_not_mistaken(run):
    stage(run, "rl-ppo-seed-30", "other", metrics=rows(9))
    assert len(run.metrics("ppo", 3)) == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run: run.report, CheckpointError, "no report yet"),
        (lambda run: run.metrics("salsa", 3), CheckpointError, "rl salsa seed 3 has not begun. There so far: "),
        (lambda run: run.metrics("ppo", 0), ConfigError, "no seed 0. Seeds of this run: 3, 5"),
        (lambda run: run.samples("salza", 3), ConfigError, "no arm 'salza'. Did you mean 'salsa'?"),
        (lambda run: run.samples("ppo", 5), CheckpointError, "eval ppo seed 5 is not finished"),
        (lambda run: run.checkpoint("ppo", 5), CheckpointError, "rl ppo seed 5 is not finished"),
        (lambda run: run.checkpoint("salza"), ConfigError, "no arm 'salza'"),
        (lambda run: run.checkpoint("sft[1]"), CheckpointError, "sft[1] is not finished"),
        (lambda run: Run(run.path / "stages"), ConfigError, "no run here"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(call, error, message, run):
    with pytest.raises(error) as raised:
        call(run)
    assert message in str(raised.value)


def test_to_pandas_has_every_row_so_far(run):
    table = run.to_pandas()
    assert list(table.columns) == ["arm", "seed", "step", "score"]
    assert table.groupby("seed").size().to_dict() == {3: 4, 5: 2}
    assert run.to_pandas("samples").to_dict("records") == [
        {"arm": "ppo", "seed": 3, "response": "hi", "proxy": 0.5}
    ]


def test_to_pandas_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install 'salsa-rlhf\[pandas\]'"):
        run.to_pandas()


def test_models_of_the_recipe(run, make_checkpoint):
    from salsa.artifacts import EMBEDDED_PATH

    assert run.checkpoint("base") == EMBEDDED_PATH
    soup = stage(run, "soup")
    assert run.checkpoint("soup") == soup
    first = run.path / "stages" / f"sft-0-{DIGESTS['old']}"
    shutil.copytree(make_checkpoint("llama", 3).path, first)
    assert run.checkpoint("sft[0]") == run.checkpoint("sft") == first
    model, tokenizer = run.policy("sft[0]")
    assert model.config.hidden_size == 16 and tokenizer.eos_token == "<|end|>"
    replies = [run.chat("hi", arm="sft[0]", seed=3, sample=n) for n in (0, 0, 1)]
    assert replies[0] == replies[1] != replies[2]
    assert run.speaker("sft[0]", 3) is run.speaker("sft[0]", 5)


def test_sft_checkpoints_that_were_given(run, make_checkpoint):
    given = [str(make_checkpoint("llama", seed).path) for seed in (3, 4)]
    text = RECIPE.replace("{dataset: sft.jsonl, seeds: [0, 1]}", f"{{checkpoints: {given}}}")
    (run.path / "recipe.yaml").write_text(text)
    assert str(Run(run.path).checkpoint("sft[1]")) == given[1]


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [("{}", "reward"), ("{seeds: [0, 1]}", "reward-soup"), ("{paths: [a/b, c/d]}", "reward-soup")],
)  # fmt: skip
def test_the_reward_model_is_the_one_that_rl_maximises(reward, wanted, run):
    pairs = "preferences: {dataset: pairs.jsonl}\n" if "paths" not in reward else ""
    text = re.sub("reward: .*\n", f"{pairs}reward: {reward}\n", RECIPE)
    (run.path / "recipe.yaml").write_text(text)
    parts = stage(run, "reward-seed-0"), stage(run, "reward-seed-1")
    made = stage(run, wanted)
    assert Run(run.path).checkpoint("reward") == made
    assert Run(run.path).checkpoint("reward seed 1") == parts[1]


def test_a_finished_reward_model_and_a_path_that_begins_like_it(run, tmp_path, monkeypatch):
    (run.path / "recipe.yaml").write_text(
        re.sub("reward: .*\n", "reward: {paths: [rewards/mine]}\n", RECIPE)
    )
    (tmp_path / "rewards" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("reward", "rewards/mine"):
        assert Run(run.path).checkpoint(name) == Path("rewards/mine")


def test_reading_needs_no_torch(run):
    code = (
        "import sys; from salsa import Run; run = Run(sys.argv[1]); run.metrics('ppo', 3); run.checkpoint('base')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
