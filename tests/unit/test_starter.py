"""`salsa init`: a commented recipe that passes `salsa check`, from answers or options; shell completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from salsa.config import Recipe
from salsa.config.schema import DataSource, RewardFunction
from salsa.errors import ConfigError
from salsa.starter import QUESTIONS, answers, recipe_text, write_recipe
from tests.whole_run import salsa

OWN = {
    "model": "org/model@v2",
    "sft": "sft.jsonl",
    "reward": "pairs.parquet",
    "prompts": "mine:prompts",
    "heldout": "org/held-out",
}


def answered(text: str, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "salsa", "init"],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
    )


def test_five_times_enter_gives_a_recipe_that_passes_check(tmp_path):
    done = answered("\n" * 5, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("]: ") == len(QUESTIONS) == 5
    assert salsa(tmp_path, "check", "recipe.yaml").stdout.startswith("recipe: sound\n")


def test_nobody_to_ask_names_the_options(tmp_path):
    done = answered("embedded\n", tmp_path)
    assert done.returncode == 2 and not (tmp_path / "recipe.yaml").exists()
    assert done.stderr == (
        "error: init: there is nobody to ask. Give --model, --sft, --reward, --prompts, --heldout.\n"
    )


def test_options_take_the_place_of_questions(tmp_path):
    options = [word for name, value in OWN.items() for word in (f"--{name}", value)]
    done = salsa(tmp_path, "init", "own.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "note: sft: sft.jsonl is not here yet",
        "note: reward: pairs.parquet is not here yet",
    ]
    recipe = Recipe.load(tmp_path / "own.yaml")
    assert recipe.name == "own" and recipe.model.path == "org/model@v2"
    assert recipe.sft.dataset == DataSource(path="sft.jsonl")
    assert recipe.preferences is not None
    assert recipe.preferences.dataset == DataSource(path="pairs.parquet") and recipe.reward.trains
    assert recipe.rl.prompts == DataSource(call="mine:prompts")
    assert recipe.eval.prompts == DataSource(path="org/held-out", limit=200)
    again = salsa(tmp_path, "init", "own.yaml", *options)
    assert again.returncode == 2 and "exists" in again.stderr


def test_checkpoints_and_a_reward_function(tmp_path):
    file = tmp_path / "b.yaml"
    write_recipe(file, OWN | {"sft": "runs/a, runs/b", "reward": "mine:score"})
    recipe = Recipe.load(file)
    assert recipe.sft.checkpoints == ("runs/a", "runs/b") and recipe.preferences is None
    assert recipe.reward.functions == (RewardFunction(call="mine:score"),)


def test_comments_stand_in_one_column():
    lines = recipe_text(Path("a.yaml"), answers({}, lambda question, default: default)).splitlines()
    assert max(map(len, lines)) <= 130
    starts = {
        line.index(" # ") for line in lines if " # " in line and not line.strip().startswith("#")
    }
    assert min(starts) == 35 and sum(" # " in line for line in lines) > 20


@pytest.mark.parametrize("answer", ["a: b", "it's", "#x", "{a}", "null", "1.5", "on", "a b"])
def test_what_yaml_would_misread_is_quoted(answer, tmp_path):
    write_recipe(tmp_path / "r.yaml", OWN | {"model": answer, "sft": answer})
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.model.path == answer and recipe.sft.dataset == DataSource(path=answer)


def test_a_name_that_no_run_can_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"name='a b'"):
        write_recipe(tmp_path / "a b.yaml", OWN)
    assert not list(tmp_path.iterdir())


def test_the_shell_completes_commands():
    words = {"_SALSA_COMPLETE": "complete_bash", "COMP_WORDS": "salsa in", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'salsa'; from salsa.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True
    )
    assert done.stdout.split() == ["init"], done.stderr
