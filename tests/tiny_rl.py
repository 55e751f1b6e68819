"""RL on a tiny random model: a run takes half a second."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salsa.actors import Actors, Progress
from salsa.config import RLConfig
from salsa.data import Prompt, as_prompt, draw_prompts
from salsa.rl import RLJob, collect_rollout, compute_experience, load, train_rl
from salsa.runtime.local import seed_everything
from salsa.types import Experience
from tests.conftest import tiny_tokenizer

CONFIG = RLConfig(
    kl_coef=0.1,
    num_updates=4,
    rollout_size=8,
    minibatch_size=4,
    num_epochs=2,
    learning_rate=1e-3,
    max_new_tokens=6,
    checkpoint_every=2,
)
RLOO = {"algorithm": "rloo", "group_size": 4}
GRPO = {"algorithm": "grpo", "group_size": 4}


def ascii_share(prompts, responses):
    """A reward that a tiny model can raise."""
    return [sum(c.isascii() for c in r) / 6 for r in responses]


@pytest.fixture(scope="session")
def job(make_checkpoint) -> RLJob:
    """Plain PPO, pulled towards its start."""
    return job_from(make_checkpoint("llama", 0))


def job_from(init, **fields) -> RLJob:
    """The job that starts from `init` and is anchored to it."""
    prompts = [
        as_prompt({"prompt": f"question {i}" * (i % 3 + 1)}, tiny_tokenizer()) for i in range(12)
    ]
    plain = RLJob("rl test", init, init, init, CONFIG, prompts, ascii_share, 0, precision="fp32")
    return replace(plain, **fields)


def run(job: RLJob, directory: Path, **config) -> list[dict]:
    """Train with changed keys; the rows of metrics.jsonl."""
    directory.mkdir(exist_ok=True)
    train_rl(changed(job, **config), directory)
    return rows_in(directory)


def changed(job: RLJob, **config) -> RLJob:
    """The job with other values of `rl:`, validated."""
    return replace(job, config=RLConfig(**job.config.model_dump() | config))


def rows_in(directory: Path) -> list[dict]:
    """What a run logged."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run_killed(job: RLJob, directory: Path, update: int, **config) -> None:
    """Like `run`, killed when the rollout of `update` (from 1) is scored."""
    calls = 0

    def reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == update:
            raise KeyboardInterrupt
        return ascii_share(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        run(replace(job, reward=reward), directory, **config)


def weights(directory: Path) -> dict[str, bytes]:
    """Every weight file of a finished run, critic and moving anchor included."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}


def without_times(rows: list[dict]) -> list[dict]:
    """Rows without what may differ between equal runs."""
    speed = ("seconds_", "tokens_per_second_", "mfu_", "peak_memory_gb_")
    return [{k: v for k, v in row.items() if not k.startswith(speed)} for row in rows]


def drawn(job: RLJob, update: int) -> list[Prompt]:
    """The prompts of one update."""
    config = job.config
    return draw_prompts(job.prompts, config.rollout_size, config.group_size, job.seed, update)


def first_experience(job: RLJob) -> tuple[Actors, Experience, dict]:
    """The models of a job, its first experience and the figures of it."""
    actors, tokenizer, sampling = load(job)
    prompts = drawn(job, update=0)
    rollout = collect_rollout(actors.policy, prompts, sampling, seed_everything(job.seed))
    progress = Progress(kl_coef=job.config.kl_coef)
    experience, figures = compute_experience(
        actors, rollout, prompts, job, tokenizer, sampling, progress
    )
    return actors, experience, figures
