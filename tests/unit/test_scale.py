"""`--scale tiny`: what stays, what gets small, and that a recipe of finished models gets models."""

import re
from pathlib import Path

import pytest

from salsa.config import Recipe
from salsa.errors import ConfigError
from salsa.models import load_classifier, load_policy, load_tokenizer, same_vocabulary
from salsa.scale import tiny

FINISHED = [
    "sft.dataset=null", "sft.checkpoints=[models/a, models/b, models/c]", "preferences=null",
    "reward.paths=[models/reward]", "rl.lora={rank: 4}", "rl.algorithm=rloo", "rl.group_size=4",
    "rl.critic_learning_rate=null",
]  # fmt: skip


@pytest.fixture
def recipe(repository, monkeypatch):
    monkeypatch.chdir(repository)
    return lambda name, *overrides: Recipe.load(f"recipes/paper/{name}.yaml", overrides)


def test_sizes_shrink_and_the_rest_stays(recipe, tmp_path):
    before = recipe("gemma-2b")
    after, changes = tiny(before, tmp_path)
    assert (after.rl.num_updates, after.rl.rollout_size, after.rl.seeds) == (2, 8, (0,))
    assert after.rl.kl_coef == before.rl.kl_coef and after.rl.arms == before.rl.arms
    assert (
        after.model.chat_template == before.model.chat_template
        and after.sft.seeds == before.sft.seeds
    )
    assert "rl.rollout_size: 256 → 8" in changes and not any("kl_coef" in line for line in changes)
    base = load_policy(after.model.path)
    assert base.config.model_type == "gemma" and base.config.tie_word_embeddings
    assert (base.config.num_attention_heads, base.config.num_key_value_heads) == (4, 1)
    scorer = load_classifier(tmp_path / "tiny" / "reward-0", pad_id=0)
    assert scorer.config.model_type == "mistral"
    assert not same_vocabulary(tmp_path / "tiny" / "reward-0", tmp_path / "tiny" / "base")
    assert "[INST]" in load_tokenizer(tmp_path / "tiny" / "reward-0").chat_template


def test_finished_models_become_tiny_ones_that_differ(recipe, tmp_path):
    after, _ = tiny(recipe("llama2-7b", *FINISHED), tmp_path)
    assert len(set(after.sft.checkpoints)) == 3 and after.rl.group_size == 4
    weights = [load_policy(path).model.embed_tokens.weight for path in after.sft.checkpoints]
    assert not weights[0].equal(weights[1])
    assert same_vocabulary(tmp_path / "tiny" / "reward-0", tmp_path / "tiny" / "base")
    again, _ = tiny(recipe("llama2-7b", *FINISHED), tmp_path)  # nothing is made twice
    assert again == after


def test_every_model_and_count_of_a_recipe_becomes_tiny(recipe, tmp_path):
    """Each of these ended in a traceback, or left a model of billions of parameters in the tiny recipe."""
    given = [
        "model.gguf_file=llama.gguf", "rl.lr_warmup=10", "rl.arms.salsa.lr_warmup=20",
        "forecast={num_samples: 256, references: ['sft[0]', mine/a]}",
        "landscape={num_samples: 8, models: ['sft[0]', 'shrink(mine/a, base, 0.5)'], prompts: p.jsonl}",
        "eval.reward_models={second: org/second, third: weqweasdas/RM-Mistral-7B}", "eval.kl_to=[base, mine/a@main]",
        "rl.arms.ppo.reference=mixture(0.5*mine/a, 0.5*deep/mine/a)", "rl.arms.salsa.init=soup(mine/a, soup)",
    ]  # fmt: skip
    after, changes = tiny(recipe("llama2-7b", *given), tmp_path)
    text = after.to_yaml()
    assert not re.search("mine/|org/|weqweasdas|gguf_file: llama|meta-llama", text)
    assert (after.rl.lr_warmup, after.rl.config_of("salsa").lr_warmup) == (1, 1)
    assert (after.forecast.num_samples, after.landscape.num_samples) == (32, 2)
    second, third = (
        load_classifier(Path(path), pad_id=0) for path in after.eval.reward_models.values()
    )
    assert (second.config.model_type, third.config.model_type) == ("llama", "mistral")
    ppo = after.rl.arms["ppo"]
    one, other = (load_policy(Path(part.path)).model.norm.weight for part in ppo.rule.models)
    assert one.shape == other.shape and len({model.path for model in ppo.rule.models}) == 2
    assert "eval.kl_to: ['base', 'mine/a@main'] → " in "\n".join(changes)


def test_what_cannot_be_made_tiny_is_one_line(recipe, tmp_path):
    after = recipe("llama2-7b").model_copy(update={"name": "a b"})
    with pytest.raises(ConfigError, match="^--scale tiny: name='a b': string should match"):
        tiny(after, tmp_path)


def test_a_directory_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        tiny(recipe("llama2-7b"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
