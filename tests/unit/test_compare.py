"""`salsa report A B` and what the report says of time, tokens and cost."""

import json

import numpy as np
import pytest

from salsa.errors import ConfigError
from salsa.evaluate.results import Arm, Results, summarise
from salsa.report.compare import across, compare_runs, score_rows, settings_that_differ
from salsa.report.page import usage_rows
from salsa.stages.directory import Stage

PROMPTS = [f"prompt {i}" for i in range(30)]


def recipe(**rl):
    return {
        "name": "one", "model": {"path": "embedded"}, "reward": {"functions": [{"call": "mine:score"}]},
        "rl": {"kl_coef": 0.1, "arms": {"ppo": {"init": "sft[0]"}}, **rl}, "eval": {"scores": {"gold": "g:g"}},
    }  # fmt: skip


def report(**rl):
    mean = {"proxy": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    return {
        "recipe": recipe(**rl), "scores": ["proxy", "gold"], "kl_to": ["sft[0]"], "stages": [],
        "arms": {"ppo": {"mean": mean}}, "pairs": [],
    }  # fmt: skip


def table(shift=0.0, prompts=PROMPTS, seeds=2):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(seeds, len(prompts)))
    return {"ppo": {"prompt": np.array([prompts] * seeds), "proxy": scores + shift, "gold": scores}}


def test_settings_that_differ_by_their_dotted_key():
    rows = settings_that_differ({"a": recipe(), "b": recipe(kl_coef=0.3, lr_schedule="cosine")})
    assert rows == [
        {"key": "rl.kl_coef", "values": {"a": 0.1, "b": 0.3}},
        {"key": "rl.lr_schedule", "values": {"a": None, "b": "cosine"}},
    ]
    assert settings_that_differ({"a": recipe(), "b": recipe() | {"name": "two"}}) == []


def test_equal_prompts_are_compared_reply_by_reply():
    rows, why_not = across(
        {"a": table(), "b": table(0.25), "c": table(prompts=PROMPTS[:20])},
        {"a": report(), "b": report(kl_coef=0.3), "c": report()},
    )
    assert [(row["arm"], row["candidate"], row["baseline"], row["score"]) for row in rows] == [
        ("ppo", "b", "a", "proxy"), ("ppo", "b", "a", "gold"),
    ]  # fmt: skip
    assert rows[0]["difference"]["mean"] == pytest.approx(0.25) and rows[0]["rate"] == 1.0
    assert rows[1]["difference"]["mean"] == 0 and rows[1]["verdict"] == "not resolved"
    assert why_not == [
        "c and a are not compared reply by reply: other held-out prompts, or another number of seeds."
    ]


def test_another_reward_model_is_another_yardstick():
    other = report()
    other["stages"] = [{"stage": "reward", "output": "other bytes"}]
    rows, _ = across({"a": table(), "b": table()}, {"a": report(), "b": other})
    assert [row["score"] for row in rows] == ["gold"]


def test_a_held_out_reward_model_is_a_score_like_a_function():
    one = report()
    one["recipe"]["eval"] = {"scores": {}, "reward_models": {"gold": "models/gold"}}
    other = {**one, "recipe": {**one["recipe"], "reward": {"functions": [{"call": "mine:other"}]}}}
    rows, _ = across({"a": table(), "b": table()}, {"a": one, "b": other})
    assert [row["score"] for row in rows] == ["gold"]


def test_every_arm_of_every_run_has_its_scores():
    rows = score_rows({"a": report(), "b": report()})
    assert [(row["run"], row["arm"]) for row in rows] == [("a", "ppo"), ("b", "ppo")]


def test_what_cannot_be_compared_is_told(tmp_path):
    with pytest.raises(ConfigError, match="give two or more run directories"):
        compare_runs([tmp_path], tmp_path / "page.html")
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(ConfigError, match="page.html: exists"):
        compare_runs([tmp_path, tmp_path / "b"], tmp_path / "page.html")
    (tmp_path / "sweep.json").write_text("a sweep's")
    with pytest.raises(ConfigError, match="sweep.json: exists"):
        compare_runs([tmp_path, tmp_path / "b"], tmp_path / "sweep.html")
    with pytest.raises(ConfigError, match="End --out in .html"):
        compare_runs([tmp_path, tmp_path / "b"], tmp_path / "other.json")


def finished(tmp_path, label, seconds, rows):
    folder = tmp_path / label.replace(" ", "-")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"digest": "d" * 64, "output": "e" * 64, "seconds": seconds, "inputs": {}}
    return Stage(label, folder, record, reused=False)


def test_time_tokens_and_cost_of_each_arm(tmp_path):
    """Seed 1 was interrupted: its last session took 3 s, its four updates 6 s."""
    row = {
        "tokens_per_second_rollout": 50.0, "seconds_rollout": 0.5, "tokens_per_second_experience": 9.0,
        "seconds_experience": 0.25, "tokens_per_second_update": 200.0, "seconds_update": 0.75,
    }  # fmt: skip
    curves = {"ppo": [[row] * 4, [row] * 4], "dpo": [[{"loss": 1.0}], [{"loss": 1.0}]]}
    stages = [
        finished(tmp_path, "sft[0]", 20.0, [{"loss": 1.0}]),
        finished(tmp_path, "rl ppo seed 0", 7.0, curves["ppo"][0]),
        finished(tmp_path, "rl ppo seed 1", 3.0, curves["ppo"][1]),
        finished(tmp_path, "rl dpo seed 0", 5.0, []),
        finished(tmp_path, "rl dpo seed 1", 5.0, []),
    ]
    arms = {name: Arm(["a", "b"], [0, 1], ["x", "y"]) for name in curves}
    made = Results(
        "test", "ppo", arms, {"engine": {"price_per_hour": 3.6}}, curves=curves, stages=stages
    )
    summary = summarise(made)
    assert summary["usage"]["ppo"]["tokens"] == {"rollout": 2 * 4 * 25, "update": 2 * 4 * 150}
    rows = {r["name"]: r for r in usage_rows(summary)}
    assert {name: r["seconds"] for name, r in rows.items()} == {
        "ppo": 7.0 + 6.0, "dpo": 10.0, "all other stages": 20.0,
    }  # fmt: skip
    assert rows["ppo"]["sampled"] == 200 and rows["dpo"]["sampled"] == 0
    assert rows["ppo"]["cost"] == pytest.approx(13.0 / 1000)
    summary["recipe"] = {}
    assert {r["cost"] for r in usage_rows(summary)} == {None}
    assert usage_rows(summary | {"usage": {}}) == []
