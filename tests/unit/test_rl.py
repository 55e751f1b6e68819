"""The loop: where KL starts, what accumulation and a kill may change (nothing), what stops it."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from salsa import make_soup, objectives
from salsa.artifacts import sha256_tree
from salsa.errors import CheckpointError, WorkFailed
from salsa.runtime.checkpoint import load_state, save_state, saved_steps, state_file
from salsa.runtime.engine import Engine
from salsa.trace import read_trace
from tests.tiny_rl import drawn, run, run_killed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_starts_at_exactly_zero_where_reference_is_the_start(job, tmp_path, precision):
    rows = run(job, tmp_path / "a", Engine.create(precision), num_updates=2)
    assert rows[0]["kl"] == 0.0
    assert rows[1]["kl"] != 0.0


def test_kl_starts_above_zero_where_reference_is_a_soup(job, make_checkpoint, tmp_path):
    soup = make_soup([job.init.path, make_checkpoint("llama", 1).path], out=tmp_path / "soup")
    rows = run(
        replace(job, reference=soup),
        tmp_path / "a",
        num_updates=1,
        rollout_size=64,
        minibatch_size=64,
    )
    assert rows[0]["kl"] > 0


@pytest.mark.slow
def test_reward_rises(job, tmp_path):
    rows = run(
        job,
        tmp_path / "a",
        num_updates=20,
        rollout_size=32,
        minibatch_size=16,
        learning_rate=1e-2,
        kl_coef=0.0,
    )
    first, last = (sum(row["score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 0.2


@pytest.mark.slow
def test_kl_penalty_holds_the_policy_back(job, tmp_path):
    options = {"num_updates": 12, "rollout_size": 32, "minibatch_size": 32, "learning_rate": 3e-3}
    free = run(job, tmp_path / "free", kl_coef=0.0, **options)
    held = run(job, tmp_path / "held", kl_coef=2.0, **options)
    last = [sum(row["kl"] for row in rows[-4:]) for rows in (held, free)]  # one row is noisy
    assert last[0] < last[1] / 2


def test_the_reference_may_not_change_between_kill_and_resume(job, make_checkpoint, tmp_path):
    run_killed(job, tmp_path / "a", 3)
    says = rf"was pulled towards reference .* Delete {tmp_path}/a/resume to start this arm anew"
    with pytest.raises(CheckpointError, match=says):
        run(replace(job, reference=make_checkpoint("llama", 3)), tmp_path / "a")


def test_nan_stops_the_run(job, tmp_path, monkeypatch):
    real = objectives.policy_loss

    def poisoned(*args, **kwargs):
        result = real(*args, **kwargs)
        return result._replace(loss=result.loss * math.nan)

    monkeypatch.setattr(objectives, "policy_loss", poisoned)
    with pytest.raises(
        WorkFailed,
        match="policy_loss is nan at update 1. The last checkpoint is kept; try a smaller",
    ):
        run(job, tmp_path / "a")
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_foreign_vocabularies_are_refused(job, make_checkpoint, tmp_path):
    other = make_checkpoint("llama", 0)
    file = other.path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    from salsa.artifacts import Checkpoint

    says = rf"{other.path}: the reference's tokenizer is not the policy's \({job.init.path}\)"
    with pytest.raises(CheckpointError, match=says):
        run(replace(job, reference=Checkpoint.of(other.path)), tmp_path / "a")


@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_other_families_and_pad_equal_to_eos(family, job, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(family, 0, pad_is_eos=True)
    rows = run(
        replace(job, init=checkpoint, reference=checkpoint, critic_init=checkpoint),
        tmp_path / "a",
        num_updates=1,
    )
    assert rows[0]["kl"] == 0.0 and math.isfinite(rows[0]["policy_loss"])


def test_missing_eos_penalty_lowers_the_reward_of_cut_responses(job, tmp_path):
    plain = run(job, tmp_path / "a", num_updates=1)[0]
    fined = run(job, tmp_path / "b", num_updates=1, missing_eos_penalty=1.0)[0]
    assert plain["score"] == fined["score"]
    assert plain["reward"] - fined["reward"] == pytest.approx(1 - plain["eos_rate"], abs=1e-5)


def test_prompts_are_drawn_in_passes_that_miss_nobody(job):
    everyone = [prompt for update in range(3) for prompt in drawn(job, update)]
    assert sorted(p.text for p in everyone) == sorted(p.text for p in job.prompts * 2)
    assert drawn(job, 1) == drawn(job, 1) != drawn(replace(job, seed=1), 1)


def test_states_are_written_whole_or_not_at_all(tmp_path):
    file = state_file(tmp_path / "resume", 3)
    assert saved_steps(tmp_path / "resume") == []
    save_state(file, {"x": torch.ones(3)})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("killed while writing")

    with pytest.raises(RuntimeError):
        save_state(file, {"x": Unpicklable()})
    assert load_state(file)["x"].sum() == 3
    assert saved_steps(tmp_path / "resume") == [3]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match="state-000003.pt: cannot be read .* Delete that file"
    ):
        load_state(file)


def test_the_first_and_the_last_update_leave_a_trace(job, tmp_path):
    """It agrees with what was logged, and is no part of the stage's output."""
    rows = run(job, tmp_path / "a")
    for update in (1, 4):
        trace, logged = read_trace(tmp_path / "a", update), rows[update - 1]
        assert len(trace) == 8
        scores, kls = (
            [r["score"] for r in trace],
            [sum(r["logprobs"]) - sum(r["ref_logprobs"]) for r in trace],
        )
        assert sum(scores) / 8 == pytest.approx(logged["score"], rel=1e-5)
        assert sum(kls) / 8 == pytest.approx(logged["kl"], abs=1e-5)
        tokens = sum(len(r["response"]) for r in trace)
        gaps = [
            abs(a - b)
            for r in trace
            for a, b in zip(r["logprobs"], r["sampler_logprobs"], strict=True)
        ]
        assert sum(gaps) / tokens == pytest.approx(logged["sampler_gap"], abs=1e-7)
        assert logged["sampler_gap"] < 1e-4
    assert read_trace(tmp_path / "a", 2) == []
    before = sha256_tree(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "trace")
    assert sha256_tree(tmp_path / "a") == before


def test_an_update_that_is_stopped_at_leaves_what_the_last_one_leaves(job, tmp_path):
    """Its trace, and its KL to other models; without them a stopped run has none but the first update's."""
    watched = replace(job, kl_to={"base": job.init})
    options = {"monitor_kl_every": 100, "kl_coef": 0.0}
    straight = run(watched, tmp_path / "straight", **options)
    passed = next(row for row in straight[1:-1] if row["kl"] > 0)
    stop = {"kl": passed["kl"] / 2}
    rows = run(watched, tmp_path / "stopped", **options, stop=stop)
    assert len(rows) == passed["step"] < 4
    assert [("kl_to_base" in row) for row in rows] == [True] + [False] * (len(rows) - 2) + [True]
    assert rows[-1]["kl_to_base"] == rows[-1]["kl"] == passed["kl"]
    traced = read_trace(tmp_path / "stopped", len(rows))
    kls = [sum(r["logprobs"]) - sum(r["ref_logprobs"]) for r in traced]
    assert sum(kls) / len(kls) == pytest.approx(passed["kl"], abs=1e-5)
