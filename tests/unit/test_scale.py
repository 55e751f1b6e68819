"""`--scale tiny`: what stays, what gets small, and that a recipe of finished models gets models."""

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


def test_a_directory_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        tiny(recipe("llama2-7b"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
