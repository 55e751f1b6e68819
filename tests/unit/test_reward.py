"""Callables that fail, and labels that are as noisy as they say."""

import sys
import types

import pytest

from salsa.config import PreferencesConfig, RewardFunction
from salsa.data import Prompt
from salsa.errors import WorkFailed
from salsa.preferences import label_pairs
from salsa.reward import model_scorer
from salsa.reward_functions import function_scorer

PROMPTS = [Prompt((1,), None, text) for text in ("a", "b")]
FUNCTIONS = {
    "lengths": lambda prompts, responses: [len(r) for r in responses],
    "prompts": lambda prompts, responses: [{"a": 10.0, "b": 20.0}[p] for p in prompts],
    "numpy": lambda prompts, responses: __import__("numpy").ones(len(responses), dtype="float32"),
    "raises": lambda prompts, responses: 1 / 0,
    "short": lambda prompts, responses: [1.0],
    "nan": lambda prompts, responses: [1.0, float("nan")],
    "text": lambda prompts, responses: ["good", "bad"],
    "none": lambda prompts, responses: None,
}


@pytest.fixture(autouse=True)
def module(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(**FUNCTIONS))


def scorer(*names_and_weights):
    return function_scorer(
        [RewardFunction(call=f"my_rewards:{n}", weight=w) for n, w in names_and_weights]
    )


def test_weighted_sum():
    assert scorer(("lengths", 1.0), ("prompts", 0.5))(PROMPTS, ["xx", "yyy"]) == [7.0, 13.0]
    assert scorer(("numpy", 2.0))(PROMPTS, ["x", "y"]) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            "reward my_rewards:raises: raised ZeroDivisionError: division by zero. Finished work is kept",
        ),
        ("short", "reward my_rewards:short: returned 1 scores for 2 responses. Return one each."),
        ("nan", "reward my_rewards:nan: score 1 is nan for response 'yyy'. Return finite numbers."),
        ("text", "reward my_rewards:text: score 0 is 'good'"),
        (
            "none",
            "reward my_rewards:none: returned None, not a list of scores. Return one number each.",
        ),
    ],
)
def test_failing_callables_stop_the_work_and_say_why(name, message):
    with pytest.raises(WorkFailed) as caught:
        scorer((name, 1.0))(PROMPTS, ["xx", "yyy"])
    assert message in str(caught.value)


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
    models.save(models.load_scorer(source.path, pad_id=0, new_head_seed=1), tokenizer, tmp_path)
    prompt = Prompt((99, 98), ({"role": "user", "content": "hi"},), "hi")
    ids = tokenizer("<|bos|><|user|>hi<|end|><|assistant|>yo<|end|>", add_special_tokens=False)[
        "input_ids"
    ]
    expected = models.load_scorer(tmp_path, pad_id=0).eval()(torch.tensor([ids])).logits.item()
    scores = model_scorer(tmp_path, "fp32")([prompt, prompt], ["yo", "something longer"])
    assert scores[0] == pytest.approx(expected, abs=1e-5)
    assert scores[1] != pytest.approx(scores[0], abs=1e-3)


def test_digest_of_a_function_covers_its_weight():
    """Else a stage made with another weight would be reused."""
    from salsa.reward_functions import function_digest

    one, two = (RewardFunction(call="my_rewards:lengths", weight=w) for w in (1.0, 2.0))
    assert function_digest(one) == function_digest(one) != function_digest(two)
