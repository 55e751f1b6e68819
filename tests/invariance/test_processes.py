"""One, two and four processes that share an RL job: one trajectory, whoever resumes it, and faults that are named.

Runs are compared in fp32. What each process packs together depends on their number, so sums are taken in another order:
the bound is 1e-5 of a metric's size in the run (`apart`). Shares of clipped tokens are counts, which a last bit may
change by one token.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.config import DataSource, RewardFunction, RLConfig
from salsa.config.expressions import ReferenceRule
from salsa.errors import WorkFailed
from salsa.models import load_classifier
from salsa.rewards import RewardSource
from salsa.runtime.checkpoint import load_state, saved_steps, state_file
from salsa.stages.jobs import RLJob
from tests.conftest import tiny_tokenizer
from tests.many_processes import (
    CASES,
    COUNTS,
    FURTHER,
    Jobs,
    apart,
    fit,
    run_forked,
    train_in,
    where,
)
from tests.tiny_rl import FP32, job_from, rows_in, without_times

pytestmark = pytest.mark.slow

CLOSE = 1e-5
ONE_TOKEN = 1 / 47  # of eight replies of six
SETTINGS = ["ppo, ema", "ppo, lora, ema"]
OF_FOUR = {name: CASES[name] for name in ("ppo", "ppo, lora, ema", "rloo, ema", "rloo, lora")}
"""Half of the cases, in which every two settings meet: four processes on two cores take their time."""


@pytest.fixture(scope="module")
def jobs(make_checkpoint, tmp_path_factory) -> Jobs:
    """The tiny job, with another model to be pulled towards and a reward model."""
    one, other = (make_checkpoint("llama", seed) for seed in (0, 1))
    reward = tmp_path_factory.mktemp("reward")
    load_classifier(other.path, pad_id=0, new_head_seed=1).save_pretrained(reward)
    tiny_tokenizer().save_pretrained(reward)
    return Jobs(job_from(one), other, reward, CASES)


@pytest.fixture(scope="module")
def trained(jobs, tmp_path_factory):
    """`trained(N)`: where N processes trained the cases, and their rows; made once for each N."""
    made = {}
    directory = tmp_path_factory.mktemp("trained")

    def train(processes):
        if processes not in made:
            cases = OF_FOUR if processes == 4 else CASES | FURTHER
            place = directory / str(processes)
            made[processes] = place, train_in(processes, place, replace(jobs, cases=cases))
        return made[processes]

    return train


@pytest.mark.parametrize("name", CASES | FURTHER)
def test_two_processes_agree_with_one(name, trained):
    _agree(name, trained, 2)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_agree_with_one(name, trained):
    _agree(name, trained, 4)


def _agree(name, trained, processes):
    (alone_in, alone), (together_in, together) = trained(1), trained(processes)
    differences = apart(alone[name], together[name])
    assert {
        "policy_loss",
        "grad_norm",
        "kl",
        "reward",
        "score",
        "kl_to_second",
    } < differences.keys()
    assert len(alone[name]) == 4
    for metric, difference in differences.items():
        assert difference < (ONE_TOKEN if metric in COUNTS else CLOSE), metric
    for file in where(alone_in, name).rglob("*.safetensors"):  # policy, critic/, reference/
        other = where(together_in, name) / file.relative_to(where(alone_in, name))
        whole, gathered = load_file(file), load_file(other)
        assert whole.keys() == gathered.keys()
        for key, weight in whole.items():
            assert torch.allclose(weight, gathered[key], rtol=1e-3, atol=1e-4), (other, key)


def test_a_reward_model_that_is_only_watched_is_scored_by_all_processes(jobs, tmp_path):
    """`eval.reward_models`: called by the main process alone, it would wait for the others for ever."""
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": f"question {i}"} for i in range(8)])
    init, watched = jobs.setup.init, RewardSource(checkpoint=Checkpoint.of(jobs.reward))
    function = RewardSource((RewardFunction(call="tests.rewards:letters"),))
    config = RLConfig(**jobs.setup.config.model_dump() | {"num_updates": 1})
    source = DataSource(path=str(prompts))
    job = RLJob(
        "rl",
        init,
        ReferenceRule((init,)),
        function,
        config,
        source,
        0,
        monitors={"second": watched},
    )
    fit(tmp_path / "one", ({"rl": job}, None), FP32)
    call = fit, tmp_path / "two", ({"rl": job}, None), FP32
    run_forked(*call, processes=2, timeout=20.0)
    alone, together = (without_times(rows_in(tmp_path / n / "rl")) for n in ("one", "two"))
    assert alone[0]["second"] != alone[0]["score"]
    assert all(v < CLOSE for k, v in apart(alone, together).items() if k not in COUNTS)


@pytest.fixture(scope="module")
def interrupted(jobs, tmp_path_factory):
    """`interrupted(N)`: what N processes left when the reward failed in the fourth update; made once for each N."""
    made = {}
    cases = {name: CASES[name] for name in SETTINGS}

    def stop(processes):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("interrupted") / str(processes)
            train_in(processes, made[processes], replace(jobs, cases=cases, reward_fails=4))
        return made[processes], cases

    return stop


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_processes_goes_on(before, after, jobs, trained, interrupted, tmp_path):
    """State of 1 and of 2 is one file of whole tensors, of the same names and shapes."""
    left, cases = interrupted(before)
    _, straight = trained(1)
    shutil.copytree(left, tmp_path / "resumed")
    for name in cases:
        assert len(rows_in(where(tmp_path / "resumed", name))) == 3
        assert saved_steps(where(left, name) / "resume") == [2]
    resumed = train_in(after, tmp_path / "resumed", replace(jobs, cases=cases))
    for name in cases:
        assert len(resumed[name]) == 4
        differences = apart(straight[name], resumed[name])
        assert all(v < CLOSE for k, v in differences.items() if k not in COUNTS), differences


def test_states_are_alike_whoever_wrote_them(interrupted):
    for name in SETTINGS:
        one, two = (
            load_state(state_file(where(interrupted(n)[0], name) / "resume", 2)) for n in (1, 2)
        )
        assert _shapes(one) == _shapes(two)


def _shapes(state):
    if isinstance(state, dict):
        return {key: _shapes(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_shapes(value) for value in state]
    return tuple(state.shape) if isinstance(state, torch.Tensor) else type(state)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((1, "SIGKILL"), "rank 1 of 2 was ended by SIGKILL"),
        ((0, "SIGKILL"), "rank 0 of 2 was ended by SIGKILL"),
        ((1, "SIGSTOP"), "rank 1 of 2 did not come to a meeting within 10 s .said by rank 0"),
        ((1, "partition"), "rank [01] of 2 was lost .said by rank [01]"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_lost_rank_is_named_and_costs_what_came_after_the_checkpoint(
    fault, says, jobs, trained, tmp_path
):
    """In the midst of the third update; the state after the second is there, and the rerun ends as if nothing was."""
    hit = replace(jobs, cases={"ppo": CASES["ppo"]}, fault=fault)
    with pytest.raises(WorkFailed, match=f"{says}.*run again to go on from the last checkpoint"):
        train_in(2, tmp_path, hit, timeout=10.0)
    place = where(tmp_path, "ppo")
    assert len(rows_in(place)) == 2 and saved_steps(place / "resume") == [2]
    rerun = train_in(1, tmp_path, replace(hit, fault=None))
    straight = without_times(rows_in(where(trained(1)[0], "ppo")))
    differences = apart(straight, rerun["ppo"])
    assert all(v < CLOSE for k, v in differences.items() if k not in COUNTS), differences
