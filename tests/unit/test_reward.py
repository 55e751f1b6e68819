"""Callables that fail, and labels that are as noisy as they say."""

import sys
import types

import pytest

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.config import PreferencesConfig, RewardConfig, RewardFunction
from salsa.data import Prompt
from salsa.errors import DataError
from salsa.models import RewardModel
from salsa.preferences import label_pairs
from salsa.reward import _accuracy, train_reward
from salsa.runtime.engine import Engine
from salsa.stages.jobs import RewardJob

FP32 = Engine.create("fp32")
PROMPTS = [Prompt((1,), None, text) for text in ("a", "b")]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    lengths = lambda prompts, responses: [len(r) for r in responses]
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(lengths=lengths))


def test_labels_follow_bradley_terry():
    """Longer by 3 at noise 2: the longer reply must be chosen in σ(1.5) = 81.8 % of the cases."""
    count = 20_000
    config = PreferencesConfig(
        prompts="x.jsonl", labeller=RewardFunction(call="my_rewards:lengths"), noise=2.0
    )
    prompts = [PROMPTS[0]] * count
    rows = label_pairs(prompts, ["aaaa"] * count, ["b"] * count, config)
    share = sum(row["chosen"] == "aaaa" for row in rows) / count
    assert share == pytest.approx(0.8176, abs=0.009)
    assert all(row["label_agrees"] == (row["chosen"] == "aaaa") for row in rows)
    assert label_pairs(PROMPTS, ["same", "x"], ["same ", "yy"], config)[0]["prompt"] == "b"


def test_reward_model_scores_the_conversation_it_was_trained_on(make_checkpoint, tmp_path):
    """Oracle: the model's own forward on the rendered conversation; its tokenizer, not the policy's."""
    import torch

    from salsa import models

    source = make_checkpoint("llama", 5)
    tokenizer = models.load_tokenizer(source.path)
    models.save_checkpoint(
        models.load_classifier(source.path, pad_id=0, new_head_seed=1), tokenizer, tmp_path
    )
    prompt = Prompt((99, 98), ({"role": "user", "content": "hi"},), "hi")
    ids = tokenizer("<|bos|><|user|>hi<|end|><|assistant|>yo<|end|>", add_special_tokens=False)[
        "input_ids"
    ]
    expected = models.load_classifier(tmp_path, pad_id=0).eval()(torch.tensor([ids])).logits.item()
    scores = RewardModel.load(tmp_path, FP32)([prompt, prompt], ["yo", "something longer"])
    assert scores[0] == pytest.approx(expected, abs=1e-5)
    assert scores[1] != pytest.approx(scores[0], abs=1e-3)


def test_the_accuracy_is_of_whole_replies_not_of_their_first_turn(make_checkpoint, monkeypatch):
    """A scorer that likes length: the rejected one's first turn is longer, the chosen conversation is."""
    from salsa.models import load_classifier, load_tokenizer

    source = make_checkpoint("llama", 5)
    classifier = load_classifier(source.path, pad_id=0, new_head_seed=1)
    model = RewardModel(classifier, load_tokenizer(source.path), FP32)
    monkeypatch.setattr(model, "scores", lambda rows, most: [float(len(row)) for row in rows])
    user, reply = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    chosen = [reply, user, reply | {"content": "x" * 9}]
    rejected = [reply | {"content": "xx"}, user, reply]
    talks = {"prompt": [user], "chosen": chosen, "rejected": rejected}
    bare = {"prompt": "a", "chosen": "b", "rejected": "bb"}
    assert _accuracy(model, [talks]) == 1.0
    assert _accuracy(model, [talks, bare]) == 0.5


def test_too_few_pairs_say_what_to_do(make_checkpoint, tmp_path):
    """One pair is enough where none is kept back, and too few where one is."""
    init = make_checkpoint("llama", 5)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = RewardConfig(epochs=1, max_length=64, holdout=0.1)
    job = RewardJob("reward", init, Checkpoint(tmp_path, "0" * 64), config, 3)
    with pytest.raises(
        DataError, match="of 1 pairs 1 are kept back, .* Give more pairs, or set reward.hold"
    ):
        train_reward(job, tmp_path, FP32)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # as in test_sft
@pytest.mark.parametrize("whole", [False, True])
def test_whole_prompts_are_kept_back_if_asked(whole, make_checkpoint, tmp_path):
    rows = [{"prompt": "ab"[i % 2], "chosen": f"{i}", "rejected": "no"} for i in range(6)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = RewardConfig(epochs=1, max_length=64, batch_size=2, holdout_prompts=whole)
    job = RewardJob(
        "reward", make_checkpoint("llama", 5), Checkpoint(tmp_path, "0" * 64), config, 3
    )
    train_reward(job, tmp_path, FP32)
    assert (
        (tmp_path / "accuracy.txt").read_text().endswith(f"on {3 if whole else 1} held-out pairs\n")
    )
    alone = [row | {"prompt": "a"} for row in rows]
    write_jsonl(tmp_path / "pairs.jsonl", alone)
    if whole:
        with pytest.raises(DataError, match="of 6 pairs 6 are kept back"):
            train_reward(job, tmp_path, FP32)


def test_a_soup_of_reward_models_is_their_weight_average(make_checkpoint, tmp_path):
    """WARM through the stages: `reward.paths` of two models scores as the averaged classifier does."""
    from safetensors.torch import load_file

    from salsa import models
    from salsa.config import Recipe
    from salsa.pipeline import stages_of
    from salsa.stages.directory import RunDirectory
    from salsa.stages.graph import Graph

    paths = []
    for seed in (5, 6):
        source = make_checkpoint("llama", seed)
        path = tmp_path / f"rm{seed}"
        scorer = models.load_classifier(source.path, pad_id=0, new_head_seed=seed)
        models.save_checkpoint(scorer, models.load_tokenizer(source.path), path)
        paths.append(str(path))
    recipe = Recipe.model_validate(
        {
            "name": "warm",
            "model": {"path": str(source.path), "precision": "fp32"},
            "sft": {"checkpoints": [str(source.path)]},
            "soup": {"ingredients": [0]},
            "reward": {"paths": paths},
            "rl": {
                "kl_coef": 0.1, "prompts": "p.jsonl", "arms": {"ppo": {"init": "base", "reference": "base"}},
            },
            "eval": {"prompts": "p.jsonl", "baseline": "ppo"},
        }
    )  # fmt: skip
    run = RunDirectory(tmp_path / "run")
    with run.opened("recipe"):
        (node,) = stages_of(recipe, run.hashes).reward
        graph = Graph(run)
        graph.finish([node])
        reward = graph[node]
    one, two, both = (
        load_file(Checkpoint.of(path).path / "model.safetensors") for path in (*paths, reward.path)
    )
    assert all(((one[k] + two[k]) / 2 - both[k]).abs().max() < 1e-6 for k in both)
    assert "score.weight" in both


def test_a_reward_model_of_another_family_and_tokenizer_scores(make_checkpoint, tmp_path):
    """Decode, re-encode: a Gemma with its own chat template judges a Llama's words."""
    from salsa import models

    other = make_checkpoint(
        "gemma", 3, template="{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    tokenizer = models.load_tokenizer(other.path)
    models.save_checkpoint(
        models.load_classifier(other.path, pad_id=0, new_head_seed=1), tokenizer, tmp_path
    )
    prompt = Prompt((99, 98), ({"role": "user", "content": "hi"},), "hi")
    ids = tokenizer("[hi][yo]", add_special_tokens=False)["input_ids"]
    import torch

    expected = models.load_classifier(tmp_path, pad_id=0)(torch.tensor([ids])).logits.item()
    assert RewardModel.load(tmp_path, FP32)([prompt], ["yo"]) == pytest.approx([expected], abs=1e-5)
