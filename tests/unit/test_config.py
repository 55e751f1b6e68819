"""Bad recipes: one line that says what, where, got and do this."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from salsa.artifacts import digest_of
from salsa.config import (
    ArmConfig,
    DPOConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    PreferencesConfig,
    Recipe,
    RewardConfig,
    RewardFunction,
    RLConfig,
    RLSection,
    SFTConfig,
    SoupConfig,
)
from salsa.config.engine import SlurmConfig
from salsa.config.schema import differences
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


def test_an_override_under_a_section_that_is_null(recipe_file):
    recipe = Recipe.load(recipe_file, ["rl.lora=null", "rl.lora.rank=4", "sft.lora.rank=2"])
    assert recipe.rl.lora.rank == 4 and recipe.sft.lora.rank == 2


def test_two_processes_cannot_push_to_one_server(recipe_file):
    server = "rl.arms.salsa.vllm={url: 'http://localhost:8000'}"
    Recipe.load(recipe_file, [server])
    with pytest.raises(ConfigError, match="engine.processes=2: weights are pushed to the server"):
        Recipe.load(recipe_file, [server, "engine.processes=2"])


def test_text_that_is_a_number_counts_as_one(recipe_file):
    """YAML reads 1e-06, which has no point, as text."""
    assert yaml.safe_load("1e-06") == "1e-06"
    more = "kl_coef: 0.05\n  learning_rate: 1e-06\n  num_updates: '50'"
    recipe_file.write_text(SMALLEST.replace("kl_coef: 0.05", more))
    rl = Recipe.load(recipe_file).rl
    assert (rl.learning_rate, rl.num_updates) == (1e-6, 50)


def test_derived_batch_sizes(recipe_file):
    assert Recipe.load(recipe_file, ["rl.rollout_size=24"]).rl.minibatch == 24


BAD = {
    "rl.kl_coeff=0.1": "unknown key 'rl.kl_coeff'. Did you mean 'kl_coef'?",
    "sft.dataset.pth=x": "override 'sft.dataset.pth=x': sft.dataset is 'data.jsonl', not a section. Set it "
    "whole: sft.dataset={pth: …}",
    "rl.arms.salsa.refrence=soup": "unknown key 'rl.arms.salsa.refrence'. Did you mean 'reference'?",
    "evall.seed=1": "unknown key 'evall'. Did you mean 'eval'?",
    "rl.kl_coef=much": "rl.kl_coef='much': input should be a valid number",
    "rl.kl_coef=-1": "rl.kl_coef=-1: input should be greater than or equal to 0.",
    "rl.rollout_size=0": "rl.rollout_size=0: input should be greater than or equal to 1.",
    "rl.minibatch_size=6": "minibatch_size=6 does not divide rollout_size=32. Use 1, 2, 4, 8, 16 or 32.",
    "reward.microbatch_size=5": "reward: microbatch_size=5 does not divide batch_size=16. Use 1, 2, 4, 8 or 16.",
    "sft.microbatch_size=5": "microbatch_size=5 does not divide batch_size=16. Use 1, 2, 4, 8 or 16.",
    "rl.arms.salsa.reference=sft[7]": "needs sft[7], but there are 2 SFT models (sft[0] to sft[1])",
    "rl.arms.salsa.reference=sop": "'sop' names no model. Use sft[0], soup, soup[0,1], shrink(sft[0], base, 0.7),",
    "rl.arms.salsa.reference=mixture(sft[0], sft[3])": "needs sft[3], but there are 2 SFT models",
    "rl.arms.salsa.reference=mixture(sft[0])": "a mixture has two models or more, all with a weight or none",
    "rl.arms.salsa.reference=mixture(0.7*sft[0], sft[1])": "a mixture has two models or more, all with a weight",
    "rl.arms.salsa.reference=mixture(0.7*sft[0], 0.7*soup)": "weights must be above 0 and sum to 1, not 1.4.",
    "rl.arms.salsa.reference=ema(sft[0], 1.5)": "'ema(sft[0], 1.5)': μ must lie between 0 and 1",
    "rl.arms.salsa.reference=ema(none, 0.1)": "'none' names no model.",
    "rl.arms.salsa.reference=reset(sft[0], 0.5)": "the period is a number of updates, 1 or more",
    "rl.arms.salsa.reference=reset(sft[0])": "names no model. Use",
    "soup={method: wise}": "soup: alpha belongs to method=wise, which needs it.",
    "soup={alpha: 0.5}": "soup: alpha belongs to method=wise, which needs it.",
    "soup={method: greedy}": "soup: score belongs to method=greedy, which needs it.",
    "soup={method: model_stock, weights: [0.5, 0.5]}": "method=model_stock finds the weights itself.",
    "rl.arms.salsa.init=none": "'none' names no model.",
    "rl.arms.salsa.init=shrink(sft[0], base, 2)": "the share of the way from base lies between 0 and 1.",
    "rl.arms.salsa.init=shrink(sft[0], sft[1], 0.5)": "names no model. Use",
    "rl.algorithm=rloo": "algorithm=rloo compares the responses to one prompt. Set group_size to 2 or more.",
    "rl.group_size=5": "group_size=5 does not divide rollout_size=32. Use 1, 2, 4, 8, 16 or 32.",
    "rl={**rloo, critic_warmup: 1}": "critic_warmup=1 changes nothing with algorithm=rloo",
    "rl={**rloo, gamma: 0.9}": "gamma=0.9 changes nothing with algorithm=rloo",
    "rl={**rloo, critic: head}": "critic=head changes nothing with algorithm=rloo",
    "rl.vf_coef=0.5": "vf_coef=0.5 changes nothing for a separate critic, which has an Adam of its own.",
    "rl.critic_warmup=50": "critic_warmup=50 leaves none of 50 updates for the policy. Lower it.",
    "rl.kl_in=loss": "kl_kind=k1 in the loss has an expected gradient of 0. Use k2",
    "rl={**base, kl_coef: 0, adaptive_kl: {target: 3}}": "adaptive_kl cannot move kl_coef=0, which it multiplies.",
    "rl={**base, kl_kind: k3, arms: {ppo: {init: base, reference: 'mixture(base, soup)'}}}": "a mixture is penalised "
    "right by kl_kind=k1 with kl_in=reward, not by k3. Use that, or one reference.",
    "rl.top_p=0.9": "rl: top_p is refused: truncated sampling draws from another distribution than",
    "rl.top_k=50": "rl: top_k is refused: truncated sampling",
    "rl.lora={rank: 0}": "rl.lora.rank=0: input should be greater than or equal to 1.",
    "reward.functions=[{call: 'a:b', concurrency: 4}]": "concurrency=4 changes nothing while one call",
    "soup.weights=[0.5, 0.6]": "weights sum to 1.1, not to 1; scale them.",
    "soup.weights=[1.0]": "has 1 weights for 2 ingredients; give one each.",
    "eval.baseline=dpo": "eval.baseline='dpo' is not an arm. Did you mean 'ppo'?",
    "reward.functions=[{call: nothing}]": "'nothing' is not module:function, e.g. my_rewards:score.",
    "reward={paths: [some/model], functions: [{call: 'a:b'}]}": "reward: give paths or functions, or neither to train",
    "reward={}": "the reward model learns from preferences, and there are none. Add preferences: {dataset: …}, or give",
    "preferences={dataset: x}": "preferences: nothing learns from them. Remove the section.",
    "preferences={prompts: x}": "preferences: give either dataset, or prompts and labeller.",
    "preferences={dataset: x, noise: 1}": "noise=1.0 changes nothing for the rows of a dataset. Remove it.",
    "rl.arms.salsa.kl_coef=-1": "rl: arms.salsa.kl_coef=-1: input should be greater than or equal to 0.",
    "rl.arms.salsa.minibatch_size=6": "minibatch_size=6 does not divide rollout_size=32. Use 1, 2, 4, 8, 16 or 32.",
    "rl.arms.salsa={method: dpo, init: base, reference: base, kl_coef: 1}": "unknown key 'rl.arms.salsa.kl_coef'.",
    "rl.arms.salsa={method: dpo, init: base, reference: none}": "DPO needs one model that stands still, e.g. soup",
    "rl.arms.salsa={method: dpo, init: base, reference: soup}": "rl.arms.salsa (dpo) learns from preferences, and",
    "rl.arms.salsa.prompts=x": "unknown key 'rl.arms.salsa.prompts'.",
    "rl.kl_importance=never": "kl_importance=never changes nothing with kl_in=reward. Remove it, or set kl_in: loss.",
    "rl.arms.salsa.init=soup(0.5*sft[0], 0.6*sft[1])": "weights must be 0 or more and sum to 1, not 1.1.",
    "eval.kl_to=[base, base]": "eval.kl_to: names a model twice. Name each once.",
    "eval.scores={kl: {call: 'a:b'}}": "eval: scores.kl is the name of a metric. Call it something else, e.g. gold.",
    "eval.reward_models={proxy: a/b}": "eval: reward_models.proxy is the name of a metric. Call it something else",
    "soup.weights=[1.5, -0.5]": "soup: weights=[1.5, -0.5]: one is negative; give 0 or more.",
    "soup.ingredients=[0, 0]": "soup: ingredients=[0, 0] has a model twice. Name each once.",
    "soup={method: model_stock, ingredients: [0]}": "method=model_stock compares ingredients. Give two or more.",
    "rl.arms.salsa.reference=soup[0,0]": "'soup[0,0]': a model twice. Name each once",
    "rl.arms.salsa.reference=soup(0.5*sft[0], 0.5*sft[0])": "a model twice. Name each once",
    "rl.arms.salsa={init: 'sft[0]', reference: none, kl_coef: 0.1}": "rl: arms.salsa.kl_coef changes nothing with "
    "reference: none, which does not pull. Remove it.",
    "rl.arms.salsa={init: 'sft[0]', reference: none, adaptive_kl: {target: 3}}": "arms.salsa.adaptive_kl changes",
    "engine.gpus=1": "engine: gpus=1 changes nothing with executor: local: all stages run on this machine as it is.",
    "engine.memory_gib=8": "engine: memory_gib=8.0 changes nothing with executor: local",
    "rl.prompts={path: p.jsonl, split: test}": "rl.prompts: split=test changes nothing where rows do not come from a",
    "rl.prompts={call: 'a:b', name: main}": "rl.prompts: name=main changes nothing where rows do not come from a hub",
    "rl.prompts={path: p.jsonl, shuffle_seed: 3}": "rl.prompts: shuffle_seed=3 changes nothing without limit",
    "sft.epochs=0": "small.yaml: sft.epochs=0: input should be greater than 0.",
    "sft.epochs=[1, 0]": "small.yaml: sft.epochs",
    "soup.weights=even": "small.yaml: soup.weights='even': input should be 'uniform'.",
    "engine={executor: slurm, slurm: {parameters: {qos: [1]}}}": "engine.slurm.parameters.qos=[1]: input should be",
    "eval.kl_to=[]": "eval.kl_to=[]: tuple should have at least 1 item",
    "eval.kl_to=['sft[7]']": "eval.kl_to needs sft[7], but there are 2 SFT models",
    "sft.checkpoints=[a/b]": "sft: give exactly one of dataset (to train) and checkpoints (trained before).",
    "model.chat_template=nowhere.jinja": "nowhere.jinja: no such file. Give the path of a Jinja template.",
    "rl.algorithm=dqn": "rl.algorithm='dqn': input should be 'ppo', 'rloo' or 'grpo'.",
    "name=../x": "name='../x': string should match pattern",
    "nonsense": "override 'nonsense': write key=value, e.g. rl.kl_coef=0.1",
}


SECTIONS = {
    "{**base, ": '{prompts: p.jsonl, arms: {ppo: {init: "sft[0]", reference: "sft[0]"}}, kl_coef: 0.1, ',
    "{**rloo, ": "{**base, algorithm: rloo, group_size: 2, ",
}


def expanded(override: str) -> str:
    for name in ("{**rloo, ", "{**base, "):
        override = override.replace(name, SECTIONS[name])
    return override.replace("kl_coef: 0.1, kl_coef: 0,", "kl_coef: 0,")


@pytest.mark.parametrize("override", BAD)
def test_messages(override, recipe_file):
    with pytest.raises(ConfigError) as caught:
        Recipe.load(recipe_file, [expanded(override)])
    message = str(caught.value)
    assert BAD[override] in message
    assert "\n" not in message


def test_a_resolved_recipe_of_every_kind_reads_back(recipe_file, tmp_path):
    """Defaults of keys that do not apply are written out too, and must not be refused when read."""
    rl = "rl={**rloo, kl_in: loss, kl_kind: k3, adaptive_kl: {target: 3}, lora: {rank: 2}, select: best}"
    recipe = Recipe.load(recipe_file, [expanded(rl)])
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe


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


def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield kind
    for field in kind.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from sections(inner)


@pytest.mark.parametrize(
    "kind", dict.fromkeys([*sections(Recipe), ArmConfig]), ids=lambda kind: kind.__name__
)
def test_every_field_says_what_it_does(kind):
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


# identity and execution

SECTIONS_OF = [
    DPOConfig, EngineConfig, EvalConfig, ModelConfig, PreferencesConfig, RewardConfig, RewardFunction, RLSection,
    SFTConfig, SlurmConfig, SoupConfig,
]  # fmt: skip
EXECUTION = {
    "microbatch_tokens", "microbatch_size", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints",
    "threads", "jobs", "processes", "batch_size of EvalConfig", "batch_size of RewardFunction", "concurrency",
    "timeout", "retries", "precision",
    "executor", "address", "slurm", "gpus", "memory_gib", "artifacts", "partition", "hours", "account",
    "parameters", "price_per_hour", "url", "transfer", "verify",
}  # fmt: skip
INPUT = {
    "path", "revision", "dataset", "checkpoints", "seeds", "prompts", "labeller", "paths", "functions", "init", "arms",
    "baseline", "kl_to", "scores", "reward_models",
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS_OF, ids=lambda section: section.__name__)
def test_every_field_decides_the_result_or_says_why_not(section: type[BaseModel]):
    made = section.model_construct()
    for name in section.model_fields:
        full = {name, f"{name} of {section.__name__}"}
        marked = made._marked("execution"), made._marked("input")
        assert (name in marked[0]) == bool(full & EXECUTION), name
        assert (name in marked[1]) == bool(full & INPUT), name


def test_identity_and_execution_share_no_field_and_leave_none_out():
    later = {"lr_schedule": "cosine", "lr_warmup": 1, "entropy_coef": 0.01, "stop": {"kl": 8}}
    config = RLConfig(kl_coef=0.1, **later)
    identity, execution = config.identity(), config.execution()
    assert identity.keys() | execution.keys() == RLConfig.model_fields.keys()
    assert not identity.keys() & execution.keys() and "kl_coef" in identity


def test_checkpoints_decide_what_the_best_of_them_is():
    every = lambda **keys: RLConfig(kl_coef=0.1, select="best", **keys).identity()
    assert every(checkpoint_every=2) != every(checkpoint_every=3)
    assert every(keep_checkpoints=2) == every(keep_checkpoints=3)


def test_fields_that_came_later_leave_old_identities_alone(repository):
    """The digest of these identities before the first such field (commit 5a3ae8e)."""
    recipe = Recipe.load(repository / "recipes" / "quickstart.yaml")
    parts = [
        RLConfig(kl_coef=0.1), RLConfig(kl_coef=0.1, select="best"), SFTConfig(dataset="x"), RewardConfig(),
        recipe.sft, recipe.reward, recipe.rl.config_of("salsa"),
    ]  # fmt: skip
    known = "b07aff919d7c0c94257d9678f6d965e70f7e9f04c5dc76fee5c1b78e7b2f512d"
    assert digest_of([part.identity() for part in parts]) == known


def test_checkpoints_count_where_patience_does():
    counted = lambda **stop: "checkpoint_every" in RLConfig(kl_coef=0.1, stop=stop).identity()
    assert counted(patience=2) and not counted(kl=8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.select=beste", "rl.select='beste': input should be 'last' or 'best'."),
        ("rl.select={metrik: gold}", "unknown key 'rl.select.metrik'. Did you mean 'metric'?"),
        ("rl.select={metric: silver}", "rl.select.metric='silver' is neither reward, score nor a name under "
         "eval.scores or eval.reward_models. Known: reward, score."),
        ("rl.stop={}", "rl.stop: give kl, patience or both."),
        ("rl.lr_warmup=50", "lr_warmup=50 leaves none of 50 updates at the full rate. Lower it."),
    ],
)  # fmt: skip
def test_stopping_and_selecting_that_cannot_be_meant(override, message, recipe_file):
    with pytest.raises(ConfigError) as raised:
        Recipe.load(recipe_file, [override])
    assert message in str(raised.value)


def test_no_score_is_called_what_a_metric_is_called(repository, recipe_file):
    """It would stand in the metric's place, and select, stop and adaptive_kl would go by it."""
    table = (repository / "docs" / "metrics.md").read_text().split("\n## ")[1]
    cells = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")]
    names = [re.sub(r"\*\w+\*|\[i\]", "x", name) for cell in cells for name in cell.split(", ")]
    names = [name for name in names if name not in ("name", "x", "…")]
    assert len(names) > 35
    for name in [*names, "proxy", "prompt", "response", "ended", "kl_reference"]:
        for key, value in (("scores", {name: {"call": "a:b"}}), ("reward_models", {name: "a/b"})):
            with pytest.raises(ValueError, match=rf"{key}\.{name} is the name of a metric"):
                EvalConfig(prompts="x", baseline="ppo", **{key: value})


def test_a_reward_model_that_is_logged_may_select(recipe_file):
    given = ["eval.reward_models={second: a/b}", "rl.select={metric: second}"]
    assert Recipe.load(recipe_file, given).rl.selection.metric == "second"


def test_what_differs_between_recipes_is_told_by_key(recipe_file):
    decided = lambda *overrides: Recipe.decisive_text(Recipe.load(recipe_file, overrides).to_yaml())
    others = (
        "rl.kl_coef=0.1", "rl.microbatch_tokens=64", "sft.dataset=q.jsonl",
        "rl.prompts={path: prompts.jsonl, limit: 3}", "rl.lora={rank: 4}",
        "rl.arms.salsa.init=soup",
    )  # fmt: skip
    assert list(differences(decided(), decided(*others))) == [
        "sft.dataset: data.jsonl → q.jsonl", "rl.kl_coef: 0.05 → 0.1",
        "rl.lora: not set → {'rank': 4, 'alpha': 32, 'target_modules': []}", "rl.arms.salsa.init: sft[0] → soup",
        "rl.prompts.limit: not set → 3",
    ]  # fmt: skip


def test_recipes_that_are_only_computed_otherwise_are_the_same(recipe_file):
    recipe_file.write_text(
        SMALLEST.replace("baseline: ppo", "baseline: ppo, scores: {gold: {call: 'a:b'}}")
    )
    text = lambda *overrides: Recipe.decisive_text(Recipe.load(recipe_file, overrides).to_yaml())
    plain = text()
    for same in (
        "rl.microbatch_tokens=64", "engine.jobs=2", "model.precision=bf16", "sft.checkpoint_every=7",
        "eval.batch_size=8", "rl.gradient_checkpointing=true", "reward.microbatch_size=4",
        "rl.arms.salsa.microbatch_tokens=512", "eval.scores.gold.timeout=9",
        "reward.functions=[{call: 'my.module:score', retries: 3}]",
    ):  # fmt: skip
        assert text(same) == plain, same
    for other in (
        "rl.kl_coef=0.1",
        "sft.seeds=[0, 2]",
        "rl.prompts=q.jsonl",
        "eval.seed=1",
        "rl.arms.ppo.kl_coef=1",
    ):
        assert text(other) != plain, other
    best = lambda every: text("rl.select=best", f"rl.checkpoint_every={every}")
    assert text("rl.checkpoint_every=5") == plain and best(5) != best(10)
    server = "rl.arms.ppo.vllm={{url: 'http://{}', importance_cap: {}}}"
    assert text(server.format("a", 2)) == text(server.format("b", 2)) != text(server.format("b", 3))
    assert Recipe.decisive_text("no: recipe") == "no: recipe"


# arms


def test_an_arm_overrides_settings_for_itself_only(recipe_file, tmp_path):
    recipe = Recipe.load(
        recipe_file, ["rl.arms.salsa.kl_coef=0.3", "rl.arms.salsa.learning_rate=0.0001"]
    )
    ppo, salsa = (recipe.rl.config_of(name) for name in ("ppo", "salsa"))
    assert (ppo.kl_coef, salsa.kl_coef, salsa.learning_rate) == (0.05, 0.3, 1e-4)
    assert ppo == RLConfig(kl_coef=0.05) and salsa.identity() != ppo.identity()
    written = yaml.safe_load(recipe.to_yaml())["rl"]["arms"]["salsa"]
    assert written == {
        "init": "sft[0]", "reference": "soup", "method": "rl", "kl_coef": 0.3, "learning_rate": 1e-4,
    }  # fmt: skip
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe


def test_an_arm_may_have_another_algorithm(recipe_file):
    recipe = Recipe.load(
        recipe_file, ["rl.arms.salsa={init: soup, reference: soup, algorithm: rloo, group_size: 4}"]
    )
    assert recipe.rl.config_of("salsa").algorithm == "rloo"
    assert recipe.rl.config_of("ppo").algorithm == "ppo"


def test_a_dpo_arm_has_settings_of_its_own(recipe_file, tmp_path):
    arm = "rl.arms.salsa={method: dpo, init: 'sft[0]', reference: soup, beta: 0.2}"
    recipe = Recipe.load(recipe_file, [arm, "preferences={dataset: pairs.jsonl}"])
    assert recipe.rl.config_of("salsa") == DPOConfig(beta=0.2)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe


# recipes of 0.1

OLD = SMALLEST.replace(
    'functions: [{call: "my.module:score"}]', "dataset: pairs.jsonl, epochs: 2"
).replace("baseline: ppo", "baseline: ppo, anchor: base")


def test_old_recipes_load_and_say_the_new_names(recipe_file):
    recipe_file.write_text(OLD + "engine: {kind: local}\n")
    with pytest.warns(FutureWarning) as caught:
        recipe = Recipe.load(recipe_file)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "reward.dataset is now preferences.dataset" in messages
    assert "eval.anchor is now eval.kl_to: [base]" in messages and "engine.kind is gone" in messages
    assert recipe.preferences.dataset.path == "pairs.jsonl" and recipe.eval.kl_to == ("base",)


def test_old_synthetic_preferences_load(recipe_file):
    pairs = "reward={preferences: {prompts: p.jsonl, labeller: {call: 'a:b'}}}"
    with pytest.warns(FutureWarning, match="reward.preferences is now a section of its own"):
        recipe = Recipe.load(recipe_file, [pairs])
    assert recipe.preferences.labeller.call == "a:b"


def test_every_sft_model_may_have_its_own_epochs(recipe_file):
    recipe = Recipe.load(recipe_file, ["sft.epochs=[1, 2]"])
    assert [recipe.sft.of_model(i).epochs for i in (0, 1)] == [1, 2]
    alike = Recipe.load(recipe_file, ["sft.epochs=2"]).sft
    assert alike.of_model(0).identity() == recipe.sft.of_model(1).identity(), (
        "one stage serves both"
    )
    with pytest.raises(ConfigError, match="epochs has 3 values for 2 models"):
        Recipe.load(recipe_file, ["sft.epochs=[1, 2, 3]"])
