"""docs/how-to/from-trl-ppo.md: our recipe runs, the table has every field of TRL's PPOConfig and keys that exist."""

import json
import math
import re
import shutil

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from salsa.config import Recipe
from salsa.config.rl import RLConfig
from tests.conftest import tiny_tokenizer
from tests.whole_run import salsa

# names of the dataclass's own fields in trl 1.12.0, trl/experimental/ppo/ppo_config.py, with their defaults
PPO_CONFIG = {
    "learning_rate": 3e-6, "dataset_num_proc": None, "num_mini_batches": 1, "total_episodes": None,
    "local_rollout_forward_batch_size": 64, "num_sample_generations": 10, "response_length": 53, "stop_token": None,
    "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m", "world_size": None, "num_total_batches": None, "micro_batch_size": None,
    "local_batch_size": None, "batch_size": None, "local_mini_batch_size": None, "mini_batch_size": None,
    "push_to_hub": False, "reward_model_path": "EleutherAI/pythia-160m", "model_adapter_name": None,
    "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False, "kl_coef": 0.05, "kl_estimator": "k1",
    "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    "ds3_gather_for_generation": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "how-to" / "from-trl-ppo.md").read_text()


def rows_of(page):
    """The table's rows: TRL's cell and ours."""
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    return rows[1:]


def test_the_table_has_every_field_once(page):
    names = [n for theirs, _, _ in rows_of(page) for n in re.findall(r"`(\w+)`", theirs)]
    assert sorted(names) == sorted(PPO_CONFIG)


def test_the_tables_defaults_are_trls(page):
    checked = 0
    for theirs, _, _ in rows_of(page):
        for name, shown in re.findall(r"`(\w+)` \(([^)]*)\)", theirs):
            if shown != "derived":
                assert str(PPO_CONFIG[name]) == shown or float(shown) == PPO_CONFIG[name], name
                checked += 1
    assert checked > 20


def test_our_keys_exist_with_the_defaults_that_are_shown(page):
    fields = RLConfig.model_fields
    checked = 0
    for _, ours, _ in rows_of(page):
        for section, key in re.findall(r"`(rl|sft|reward)\.(\w+)`", ours):
            known = fields if section == "rl" else {"checkpoints": 0, "paths": 0}
            assert key in known, key
        for key, shown in re.findall(r"`rl\.(\w+)` \(([\d.e-]+)\)", ours):
            assert fields[key].default == float(shown), key
            checked += 1
    assert checked == 5 and fields["kl_coef"].is_required()


def test_the_keys_of_trls_script_are_fields(page):
    script = re.search(r"PPOConfig\((.*?)\),\n    processing_class", page, flags=re.S)[1]
    own = set(re.findall(r"(\w+)=", script)) - {
        "per_device_train_batch_size", "gradient_accumulation_steps",  # of transformers.TrainingArguments
    }  # fmt: skip
    assert own <= set(PPO_CONFIG) and len(own) == 11


def test_the_recipe_asks_for_what_the_script_does(page, tmp_path):
    (tmp_path / "ppo.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, flags=re.S)[1])
    rl = Recipe.load(tmp_path / "ppo.yaml").rl
    script = dict(re.findall(r"(\w+)=([\d._e-]+)[,)\n]", page))
    episodes = int(script["per_device_train_batch_size"]) * int(
        script["gradient_accumulation_steps"]
    )
    assert rl.rollout_size == rl.minibatch == episodes  # one mini-batch
    assert rl.num_updates == math.ceil(int(script["total_episodes"]) / episodes)
    for ours, theirs in (
        ("num_epochs", "num_ppo_epochs"), ("max_new_tokens", "response_length"), ("kl_coef", "kl_coef"),
        ("missing_eos_penalty", "missing_eos_penalty"), ("temperature", "temperature"),
        ("learning_rate", "learning_rate"),
    ):  # fmt: skip
        assert getattr(rl, ours) == float(script[theirs]), ours
    for name in ("clip_range", "value_clip_range", "gamma", "gae_lambda", "kl_kind"):
        theirs = {"clip_range": "cliprange", "value_clip_range": "cliprange_value", "gae_lambda": "lam",
                  "kl_kind": "kl_estimator"}.get(name, name)  # fmt: skip
        assert getattr(rl, name) == PPO_CONFIG[theirs], name  # neither says it, both mean the same


@pytest.mark.slow
def test_the_recipe_runs(page, make_checkpoint, tmp_path):
    """As it stands but for its size: two updates of eight short episodes."""
    recipe = re.search(r"```yaml\n(.*?)```", page, flags=re.S)[1]
    (tmp_path / "ppo.yaml").write_text(recipe)
    for name, seed in (("base", 0), ("sft", 1), ("sft-other-seed", 2)):
        shutil.copytree(make_checkpoint("llama", seed).path, tmp_path / name)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    reward.config.pad_token_id = 0
    reward.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    for name in ("prompts", "heldout"):
        rows = [{"prompt": f"{name} {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["rl.num_updates=2", "rl.rollout_size=8", "rl.max_new_tokens=6"]
    done = salsa(tmp_path, "run", "ppo.yaml", *small)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "from-trl" / "report.json").read_text())
    assert {"ppo", "salsa"} <= set(json.dumps(report).replace('"', " ").split())
    written = yaml.safe_load((tmp_path / "runs" / "from-trl" / "recipe.yaml").read_text())
    assert written["rl"]["arms"]["salsa"]["reference"] == "soup"
