"""RL jobs of a tiny model in several processes: what is sent to them, and what they do with it."""

import functools
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from salsa import objectives
from salsa.config.expressions import ReferenceRule
from salsa.errors import WorkFailed
from salsa.models import RewardModel
from salsa.rl import train_rl
from salsa.runtime.engine import Engine
from salsa.runtime.launch import run_in_processes
from tests.forked import FORKS
from tests.tiny_rl import FP32, GRPO, RLOO, ascii_share, changed, rows_in, without_times

TIMEOUT = 120.0
STOPPED = 14
"""Seconds."""
LORA = {"lora": {"rank": 2}}
COUNTS = ("clip_fraction", "value_clip_fraction")
"""Metrics that are shares of tokens."""


@dataclass(frozen=True)
class Case:
    """One run: settings of `rl:`, of the reference's rule, and what else differs from plain PPO."""

    config: dict[str, Any]
    rule: dict[str, Any] = field(default_factory=dict)
    second: bool = False
    """The reference is another model than the one that the policy starts at."""
    scored_by_model: bool = False


CASES = {
    "ppo": Case({}),
    "ppo, ema": Case({}, {"ema": 0.1}, second=True),
    "ppo, lora": Case(LORA),
    "ppo, lora, ema": Case(LORA, {"ema": 0.1}, second=True),
    "rloo": Case(RLOO | {"normalize_scores": True}),
    "rloo, ema": Case(RLOO, {"ema": 0.1}, second=True),
    "rloo, lora": Case(RLOO | LORA, second=True),
    "rloo, lora, ema": Case(RLOO | LORA, {"ema": 0.1}, second=True),
}
FURTHER = {
    "ppo, small packs": Case({"microbatch_tokens": 30}, second=True),
    "ppo, minibatches of two rows": Case({"minibatch_size": 2, "num_epochs": 1}),
    "ppo, head critic, recomputed": Case(
        {"critic": "head", "critic_warmup": 1, "gradient_checkpointing": True}
    ),
    "ppo, reward model": Case({}, scored_by_model=True),
    "grpo, kl in the loss": Case(
        GRPO | {"kl_in": "loss", "kl_kind": "k3", "adaptive_kl": {"target": 0.1, "horizon": 100}}
    ),
    "ppo, reset": Case({}, {"reset_every": 3, "reset_optimizer": True}),
    "ppo, lora, reset": Case(LORA, {"reset_every": 3}),
}


@dataclass(frozen=True)
class Jobs:
    """What is sent: a setup, another model, a reward model, cases by name, and what goes wrong."""

    setup: Any
    second: Any
    reward: Path
    cases: dict[str, Case]
    reward_fails: int | None = None
    """In which update, from 1."""
    fault: tuple[int, str] | None = None
    """Rank, and what happens to it in the third update: `SIGKILL`, `SIGSTOP` or `partition`."""


def train(directory: Path, jobs: Jobs, engine: Engine) -> None:
    """Every case into a directory of its own."""
    for name, case in jobs.cases.items():
        setup = changed(jobs.setup, **case.config)
        reference = jobs.second if case.second else setup.init
        setup = replace(setup, reference=ReferenceRule((reference,), **case.rule))
        setup = replace(setup, kl_to={"second": jobs.second})
        if case.scored_by_model:
            setup = replace(setup, reward=RewardModel.load(jobs.reward, engine))
        if jobs.reward_fails is not None:
            setup = replace(setup, reward=_failing(jobs.reward_fails))
        if jobs.fault is not None and jobs.fault[0] == engine.rank:
            _hit(jobs.fault[1])
        place = where(directory, name)
        place.mkdir(exist_ok=True, parents=True)
        try:
            train_rl(setup, place, engine)
        except WorkFailed as error:
            if jobs.reward_fails is None or "on purpose" not in str(error):
                raise


def fit(directory: Path, jobs: tuple[dict[str, Any], int | None], engine: Engine) -> None:
    """Jobs of TRL's trainers, each into a directory of its name; they fail in the step that is given, if any."""
    from salsa.runtime import hf_trainer

    named, stop_at = jobs
    real = hf_trainer._Report.on_step_end

    def stopped(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        real(self, args, state, control, **options)
        if state.global_step == stop_at:
            raise WorkFailed("stopped on purpose")

    hf_trainer._Report.on_step_end = stopped  # type: ignore[method-assign]
    try:
        for name, job in named.items():
            (directory / name).mkdir(parents=True, exist_ok=True)
            job.run(directory / name, engine)
    finally:
        hf_trainer._Report.on_step_end = real  # type: ignore[method-assign]


def run_forked(*call: Any, processes: int, timeout: float) -> None:
    """`run_in_processes` with processes that are forked, which saves each the imports."""
    from torch.distributed.launcher import api

    forking = functools.partial(api.LaunchConfig, start_method=FORKS.get_start_method())
    with mock.patch.object(api, "LaunchConfig", forking):
        run_in_processes(*call, processes=processes, timeout=timeout)


def where(directory: Path, name: str) -> Path:
    """Where a case is written."""
    return directory / name.replace(", ", "-").replace(" ", "-")


def train_in(
    processes: int, directory: Path, jobs: Jobs, timeout: float = TIMEOUT
) -> dict[str, list[dict]]:
    """Name → the rows that the case logged, trained in so many processes."""
    if processes == 1:
        train(directory, jobs, FP32)
    else:
        run = run_forked if jobs.fault is None else run_in_processes
        run(train, directory, jobs, FP32, processes=processes, timeout=timeout)
    return {name: without_times(rows_in(where(directory, name))) for name in jobs.cases}


def apart(one: list[dict], other: list[dict]) -> dict[str, float]:
    """Metric → the largest difference between two runs in a step, relative to the metric's size in the run.

    Told as they are: `sampler_gap`, which is rounding and nothing else; `policy_loss`, a mean of advantages of size 1
    that cancel to a hundredth; and shares of tokens.
    """
    assert [row.keys() for row in one] == [row.keys() for row in other]
    size = {name: max(abs(row[name]) for row in one if name in row) for row in one for name in row}
    size |= {name: 1.0 for name in ("sampler_gap", "policy_loss", *COUNTS) if name in size}
    return {
        name: max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True) if name in a)
        / (size[name] or 1.0)
        for name in size
    }


def _failing(update: int) -> Any:
    calls = 0

    def reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == update:
            raise WorkFailed("the reward failed on purpose")
        return ascii_share(prompts, responses)

    return reward


def _hit(fault: str) -> None:
    """From now on the ninth policy loss of this process, the first of the third update, is its last."""
    real, calls = objectives.policy_loss, 0

    def policy_loss(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 9:
            if (
                fault == "SIGSTOP"
            ):  # for longer than the others wait; not for the 30 s until an elastic agent kills
                wake = f"sleep {STOPPED}; kill -CONT {os.getpid()}"
                subprocess.Popen(["sh", "-c", wake], start_new_session=True)
            _partition() if fault == "partition" else os.kill(os.getpid(), signal.Signals[fault])
        return real(*args, **kwargs)

    objectives.policy_loss = policy_loss


def _partition() -> None:
    """Cut every connection that this process has, to other ranks and to their store."""
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
            connection.getpeername()
        except OSError:
            continue
        connection.shutdown(socket.SHUT_RDWR)
