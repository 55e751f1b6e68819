"""Bad recipes: one line that says what, where, got and do this."""

from pathlib import Path

import pytest
import yaml

from salsa.config import Recipe
from salsa.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALLEST = """
name: small
model: {path: embedded}
sft: {dataset: data.jsonl, seeds: [0, 1]}
reward: {functions: [{call: "my.module:score"}]}
rl:
  arms: {ppo: {init: "sft[0]", reference: "sft[0]"}, salsa: {init: "sft[0]", reference: soup}}
  prompts: prompts.jsonl
  kl_coef: 0.05
eval: {prompts: prompts.jsonl, baseline: ppo}
"""


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALLEST)
    return file


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_is_sound_and_says_how_to_run_it(path):
    Recipe.load(path)
    head = path.read_text().splitlines()[:2]
    assert f"salsa run recipes/{path.name}" in head[0]
    assert "Hardware:" in head[1]


def test_resolved_recipe_reads_back_as_itself(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe


def test_overrides(recipe_file):
    recipe = Recipe.load(recipe_file, ["rl.kl_coef=0.1", "rl.seeds=[3]", "soup.weights=[0.7, 0.3]"])
    assert (recipe.rl.kl_coef, recipe.rl.seeds, recipe.soup.weights) == (0.1, (3,), (0.7, 0.3))


def test_derived_batch_sizes(recipe_file):
    assert (
        Recipe.load(
            recipe_file, ["rl.rollout_size=24", "rl.minibatch_size=12", "rl.microbatch_size=4"]
        ).rl.microbatch
        == 4
    )
    assert Recipe.load(recipe_file, ["rl.rollout_size=24"]).rl.minibatch == 24


BAD = {
    "rl.kl_coeff=0.1": "unknown key 'rl.kl_coeff'. Did you mean 'kl_coef'?",
    "sft.dataset.pth=x": "override 'sft.dataset.pth=x': dataset is a value, not a section",
    "rl.arms.salsa.refrence=soup": "unknown key 'rl.arms.salsa.refrence'. Did you mean 'reference'?",
    "evall.seed=1": "unknown key 'evall'. Did you mean 'eval'?",
    "rl.kl_coef=much": "rl.kl_coef='much': input should be a valid number",
    "rl.kl_coef=-1": "rl.kl_coef=-1: input should be greater than or equal to 0.",
    "rl.rollout_size=0": "rl.rollout_size=0: input should be greater than or equal to 1.",
    "rl.minibatch_size=6": "minibatch_size=6 does not divide rollout_size=32. Use 1, 2, 4, 8, 16 or 32.",
    "rl.microbatch_size=5": "microbatch_size=5 does not divide minibatch_size=32. Use 1, 2, 4, 8, 16 or 32.",
    "rl.arms.salsa.reference=sft[7]": "needs sft[7], but there are 2 SFT models (sft[0] to sft[1])",
    "rl.arms.salsa.reference=sop": "'sop' names no model. Use sft[0], soup, soup[0,1], base, or a path",
    "soup.weights=[0.5, 0.6]": "weights sum to 1.1, not to 1; scale them.",
    "soup.weights=[1.0]": "has 1 weights for 2 ingredients; give one each.",
    "eval.baseline=dpo": "eval.baseline='dpo' is not an arm. Did you mean 'ppo'?",
    "reward.functions=[{call: nothing}]": "'nothing' is not module:function, e.g. my_rewards:score.",
    "reward.path=some/model": "reward: give exactly one of dataset, preferences, path and functions.",
    "sft.checkpoints=[a/b]": "sft: give exactly one of dataset (to train) and checkpoints (trained before).",
    "model.chat_template=nowhere.jinja": "nowhere.jinja: no such file. Give the path of a Jinja template.",
    "rl.algorithm=dqn": "rl.algorithm='dqn': input should be 'ppo'.",
    "name=../x": "name='../x': string should match pattern",
    "nonsense": "override 'nonsense': write key=value, e.g. rl.kl_coef=0.1",
}


@pytest.mark.parametrize("override", BAD)
def test_messages(override, recipe_file):
    with pytest.raises(ConfigError) as caught:
        Recipe.load(recipe_file, [override])
    message = str(caught.value)
    assert BAD[override] in message
    assert "\n" not in message


def test_messages_name_the_file(recipe_file):
    with pytest.raises(ConfigError, match="small.yaml: rl.kl_coef is missing. Add it."):
        values = yaml.safe_load(SMALLEST)
        del values["rl"]["kl_coef"]
        recipe_file.write_text(yaml.safe_dump(values))
        Recipe.load(recipe_file)


def test_missing_broken_and_empty_files(recipe_file, tmp_path):
    with pytest.raises(ConfigError, match="smal.yaml: no such recipe. Did you mean 'small.yaml'?"):
        Recipe.load(tmp_path / "smal.yaml")
    recipe_file.write_text("a: [b")
    with pytest.raises(ConfigError, match="small.yaml: not YAML"):
        Recipe.load(recipe_file)
    recipe_file.write_text("")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        Recipe.load(recipe_file)
