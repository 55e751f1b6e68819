"""Which states stay, which policy is returned, and what a failure leaves behind."""

from dataclasses import replace

import pytest
import torch

from salsa import models, objectives
from salsa.errors import CheckpointError, WorkFailed
from salsa.rl_models import Progress, save_progress
from salsa.runtime.checkpoint import load_state, saved_steps, state_file
from tests.tiny_rl import (
    ascii_share,
    first_experience,
    run,
    run_killed,
    weights,
    without_times,
)


def scripted(*scores):
    """A reward that gives all responses of the k-th update the k-th score, and then is killed."""
    script = iter(scores)

    def reward(prompts, responses):
        score = next(script, None)
        if score is None:
            raise KeyboardInterrupt
        return [score] * len(responses)

    return reward


@pytest.mark.parametrize(("select", "kept"), [("best", [4, 8, 10]), ("last", [8, 10])])
def test_the_newest_and_the_best_if_asked_for_stay(select, kept, job, tmp_path):
    """The score peaks in updates 3 and 4, before the second checkpoint."""
    peaked = replace(job, reward=scripted(0.0, 0.0, 5.0, 5.0, *[1.0] * 7))
    options = {"num_updates": 14, "keep_checkpoints": 2, "kl_coef": 0.0, "select": select}
    with pytest.raises(KeyboardInterrupt):
        run(peaked, tmp_path / "a", **options)
    assert saved_steps(tmp_path / "a" / "resume") == kept
    state = load_state(state_file(tmp_path / "a" / "resume", 10))
    assert state["progress"]["best"] == (4, 5.0)
    assert {"policy", "critic", "reference"} < state.keys()
    assert state["policy"].keys() == state["critic"].keys() == {"weights", "optimizer"}


@pytest.mark.slow
def test_select_best_returns_the_best_policy(job, tmp_path, capsys):
    scores = [0.0, 0.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    options = {"kl_coef": 0.0, "num_updates": 8, "keep_checkpoints": 1}
    run(replace(job, reward=scripted(*scores)), tmp_path / "last", **options)
    run(replace(job, reward=scripted(*scores)), tmp_path / "best", select="best", **options)
    assert "returns to update 4, mean reward 5" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run(replace(job, reward=scripted(*scores[:4])), tmp_path / "four", **options)
    state = load_state(state_file(tmp_path / "four" / "resume", 4))
    best = dict(models.load_policy(tmp_path / "best").named_parameters())
    assert all(torch.equal(best[key], value) for key, value in state["policy"]["weights"].items())
    assert weights(tmp_path / "best") != weights(tmp_path / "last")


@pytest.mark.slow
def test_select_best_keeps_the_last_where_it_is_best(job, tmp_path):
    for name, select in (("a", "best"), ("b", "last")):
        rising = replace(job, reward=scripted(0.0, 1.0, 2.0, 3.0, 4.0))
        run(rising, tmp_path / name, num_updates=5, kl_coef=0.0, select=select)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.slow
def test_selection_by_a_score_that_nothing_is_trained_on(job, tmp_path):
    """The reward rises all the time, gold peaks before the second of four checkpoints."""
    gold = {"gold": scripted(0.0, 0.0, 5.0, 5.0, *[1.0] * 4)}
    hacked = replace(job, reward=scripted(*map(float, range(8))), monitors=gold)
    options = {"kl_coef": 0.0, "num_updates": 8}
    run(hacked, tmp_path / "a", select={"metric": "gold"}, **options)
    plain = replace(job, reward=scripted(*map(float, range(4))))
    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path / "four", **options)
    state = load_state(state_file(tmp_path / "four" / "resume", 4))
    returned = dict(models.load_policy(tmp_path / "a").named_parameters())
    assert all(torch.equal(returned[k], v) for k, v in state["policy"]["weights"].items())


@pytest.mark.slow
def test_a_kl_budget_stops_the_run_where_it_is_passed(job, tmp_path, capsys):
    options = {"num_updates": 12, "kl_coef": 0.0, "learning_rate": 3e-3, "lr_schedule": "constant"}
    straight = run(job, tmp_path / "straight", **options)
    budget = sorted(row["kl"] for row in straight)[-4]
    passed = next(row["step"] for row in straight if row["kl"] > budget)
    stopped = run(job, tmp_path / "stopped", **options, stop={"kl": budget})
    assert "is above rl.stop.kl" in capsys.readouterr().err
    assert without_times(stopped)[:-1] == without_times(straight[: passed - 1])
    assert len(stopped) == passed < 12
    run_killed(job, tmp_path / "resumed", passed, **options, stop={"kl": budget})
    assert len(run(job, tmp_path / "resumed", **options, stop={"kl": budget})) == passed
    assert weights(tmp_path / "resumed") == weights(tmp_path / "stopped")


@pytest.mark.slow
def test_patience_ends_a_run_whose_score_falls(job, tmp_path):
    """Best after the first checkpoint, at 2; those at 4 and 6 are worse: it stops at 6, before or after a kill."""
    scores = [0.0, 2.0, 0.5, 0.5, 0.4, 0.4, 9.0, 9.0]
    options = {"kl_coef": 0.0, "num_updates": 8, "stop": {"patience": 2}, "select": "best"}
    rows = run(replace(job, reward=scripted(*scores)), tmp_path / "a", **options)
    assert [row["step"] for row in rows] == list(range(1, 7))
    again = run(replace(job, reward=scripted(*scores)), tmp_path / "a", **options)
    assert len(again) == 6, "the newest checkpoint says that it is over"
    state = load_state(state_file(tmp_path / "a" / "resume", 2))
    returned = dict(models.load_policy(tmp_path / "a").named_parameters())
    assert all(torch.equal(returned[k], v) for k, v in state["policy"]["weights"].items())


def test_nan_keeps_the_last_good_checkpoint(job, tmp_path, monkeypatch):
    """NaN in the fourth update: the state of the second stays, finite, and the run goes on from there."""
    real, calls = objectives.policy_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        return result._replace(loss=result.loss * float("nan")) if len(calls) > 12 else result

    monkeypatch.setattr(objectives, "policy_loss", poisoned)
    with pytest.raises(WorkFailed, match="policy_loss is nan at update 4. The last checkpoint is"):
        run(job, tmp_path / "a")
    state = load_state(state_file(tmp_path / "a" / "resume", 2))
    assert all(value.isfinite().all() for value in state["policy"]["weights"].values())
    monkeypatch.undo()
    assert len(run(job, tmp_path / "a")) == 4


def test_nan_weights_are_never_written(job, tmp_path):
    rl_models, _, _ = first_experience(job)
    with torch.no_grad():
        rl_models.critic.score.weight[0, 0] = float("inf")
    progress = Progress(kl_coef=0.1, update=2, rewards=(1.0,))
    with pytest.raises(WorkFailed, match="the critic's weights hold NaN or Inf after update 2"):
        save_progress(rl_models, progress, tmp_path, keep_last=2)
    assert saved_steps(tmp_path) == []


def test_a_failing_reward_keeps_the_checkpoint(job, tmp_path):
    calls = []

    def broken(prompts, responses):
        calls.append(1)
        if len(calls) == 3:
            raise WorkFailed("reward x: raised OSError")
        return ascii_share(prompts, responses)

    with pytest.raises(WorkFailed, match="OSError"):
        run(replace(job, reward=broken), tmp_path / "a")
    assert saved_steps(tmp_path / "a" / "resume") == [2]


def test_an_unreadable_state_says_which_file_to_delete(job, tmp_path):
    run_killed(job, tmp_path / "a", 5, num_updates=6)
    newest = state_file(tmp_path / "a" / "resume", 4)
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match="state-000004.pt: cannot be read .* Delete that file"
    ):
        run(job, tmp_path / "a", num_updates=6)
    newest.unlink()
    assert len(run(job, tmp_path / "a", num_updates=6)) == 6
