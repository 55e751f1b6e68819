"""RL on a tiny random model: a run takes half a second."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salsa.config import RLConfig
from salsa.data import Prompt, as_prompt, draw_prompts
from salsa.rl import RLSetup, collect_rollout, compute_experience, load, train_rl
from salsa.rl_models import Progress, RLModels
from salsa.runtime.engine import Engine
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
FP32 = Engine.create("fp32")


def ascii_share(prompts, responses):
    """A reward that a tiny model can raise."""
    return [sum(c.isascii() for c in r) / 6 for r in responses]


@pytest.fixture(scope="session")
def job(make_checkpoint) -> RLSetup:
    """Plain PPO, pulled towards its start."""
    return job_from(make_checkpoint("llama", 0))


def job_from(init, **fields) -> RLSetup:
    """The setup that starts from `init` and is pulled towards it."""
    prompts = [
        as_prompt({"prompt": f"question {i}" * (i % 3 + 1)}, tiny_tokenizer()) for i in range(12)
    ]
    plain = RLSetup("rl test", init, init, init, CONFIG, prompts, ascii_share, 0)
    return replace(plain, **fields)


def run(job: RLSetup, directory: Path, engine: Engine = FP32, **config) -> list[dict]:
    """Train with changed keys; the rows of metrics.jsonl."""
    directory.mkdir(exist_ok=True)
    train_rl(changed(job, **config), directory, engine)
    return rows_in(directory)


def changed(job: RLSetup, **config) -> RLSetup:
    """The setup with other values of `rl:`, validated."""
    return replace(job, config=RLConfig(**job.config.model_dump() | config))


def rows_in(directory: Path) -> list[dict]:
    """What a run logged."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run_killed(job: RLSetup, directory: Path, update: int, engine: Engine = FP32, **config) -> None:
    """Like `run`, killed when the rollout of `update` (from 1) is scored."""
    calls = 0

    def reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == update:
            raise KeyboardInterrupt
        return ascii_share(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        run(replace(job, reward=reward), directory, engine, **config)


def weights(directory: Path) -> dict[str, bytes]:
    """Every weight file of a finished run, critic and moving reference included."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}


def without_times(rows: list[dict]) -> list[dict]:
    """Rows without what may differ between equal runs."""
    speed = ("seconds_", "tokens_per_second_", "mfu_", "peak_memory_gb_")
    return [{k: v for k, v in row.items() if not k.startswith(speed)} for row in rows]


def drawn(job: RLSetup, update: int) -> list[Prompt]:
    """The prompts of one update."""
    config = job.config
    return draw_prompts(job.prompts, config.rollout_size, config.group_size, job.seed, update)


def first_experience(
    job: RLSetup, engine: Engine = FP32, progress: Progress | None = None
) -> tuple[RLModels, Experience, dict]:
    """The models of a setup, its first experience and the metrics of it."""
    models, source = load(job, engine)
    prompts = drawn(job, update=0)
    generator = engine.generator(job.seed)
    rollout = collect_rollout(models.policy, source, prompts, generator).rollout
    progress = progress or Progress(kl_coef=job.config.kl_coef)
    experience, metrics, _ = compute_experience(models, rollout, prompts, job, source, progress)
    return models, experience, metrics
