"""RL jobs of a tiny model in several processes: what is sent to them, and what they do with it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salsa.config.expressions import ReferenceRule
from salsa.models import RewardModel
from salsa.rl import train_rl
from salsa.runtime.engine import Engine
from salsa.runtime.launch import run_in_processes
from tests.tiny_rl import FP32, GRPO, RLOO, changed, rows_in, without_times

TIMEOUT = 60.0


@dataclass(frozen=True)
class Case:
    """One run; `setup` gets these settings of `rl:` and this kind of reference and reward."""

    config: dict[str, Any]
    rule: dict[str, Any] | None = None
    """Settings of the reference's rule."""
    second: bool = False
    """The reference is another model than the policy's first."""
    scored_by_model: bool = False


LORA = {"lora": {"rank": 2}}
CASES = {
    "ppo": Case({}),
    "ppo, another reference, small packs": Case({"microbatch_tokens": 30}, second=True),
    "ppo, minibatches of two rows": Case({"minibatch_size": 2, "num_epochs": 1}),
    "ppo, head critic, recomputed": Case(
        {"critic": "head", "critic_warmup": 1, "gradient_checkpointing": True}
    ),
    "ppo, reward model": Case({}, scored_by_model=True),
    "ppo, ema": Case({}, {"ema": 0.1}),
    "ppo, lora": Case(LORA),
    "ppo, lora, ema": Case(LORA, {"ema": 0.1}),
    "rloo": Case(RLOO | {"normalize_scores": True}),
    "rloo, ema": Case(RLOO, {"ema": 0.1}),
    "rloo, lora": Case(RLOO | LORA, second=True),
    "rloo, lora, ema": Case(RLOO | LORA, {"ema": 0.1}),
    "grpo, kl in the loss": Case(
        GRPO | {"kl_in": "loss", "kl_kind": "k3", "adaptive_kl": {"target": 0.1, "horizon": 100}}
    ),
    "ppo, reset": Case({}, {"reset_every": 2, "reset_optimizer": True}),
    "ppo, lora, reset": Case(LORA, {"reset_every": 2}),
}


@dataclass(frozen=True)
class Jobs:
    """What is sent: a setup, another model, a reward model, and cases by name."""

    setup: Any
    second: Any
    reward: Path
    cases: dict[str, Case]


def train(directory: Path, jobs: Jobs, engine: Engine) -> None:
    """Every case into a directory of its own."""
    for name, case in jobs.cases.items():
        setup = changed(jobs.setup, **case.config)
        reference = jobs.second if case.second else setup.init
        setup = replace(setup, reference=ReferenceRule((reference,), **case.rule or {}))
        setup = replace(setup, kl_to={"second": jobs.second})
        if case.scored_by_model:
            setup = replace(setup, reward=RewardModel.load(jobs.reward, engine))
        place = directory / name.replace(" ", "-")
        place.mkdir(exist_ok=True, parents=True)
        train_rl(setup, place, engine)


def train_in(processes: int, directory: Path, jobs: Jobs) -> dict[str, list[dict]]:
    """Name → the rows that the case logged, trained in so many processes."""
    if processes == 1:
        train(directory, jobs, FP32)
    else:
        run_in_processes(train, directory, jobs, FP32, processes=processes, timeout=TIMEOUT)
    return {n: without_times(rows_in(directory / n.replace(" ", "-"))) for n in jobs.cases}


def apart(one: list[dict], other: list[dict]) -> dict[str, float]:
    """Metric → the largest difference between two runs in one step, relative to the metric's size in the run."""
    assert [row.keys() for row in one] == [row.keys() for row in other]
    names = {name for row in one for name in row}
    return {
        n: max(_apart(a[n], b[n], one, n) for a, b in zip(one, other, strict=True) if n in a)
        for n in names
    }


def _apart(a: float, b: float, rows: list[dict], name: str) -> float:
    size = max(abs(row[name]) for row in rows if name in row)
    return abs(a - b) / size if a != b else 0.0


if __name__ == "__main__":  # while something is wrong: python -m tests.many_processes 2 "ppo, lora"
    import sys
    import tempfile

    from salsa.artifacts import Checkpoint
    from tests.conftest import tiny_model, tiny_tokenizer
    from tests.tiny_rl import job_from

    root = Path(tempfile.mkdtemp())
    for seed in (0, 1):
        tiny_model("llama", seed).save_pretrained(root / str(seed))
        tiny_tokenizer().save_pretrained(root / str(seed))
    from salsa.models import load_classifier
    from tests.many_processes import CASES as cases
    from tests.many_processes import Case, Jobs, train_in  # as those that are started know them

    load_classifier(root / "1", pad_id=0, new_head_seed=1).save_pretrained(root / "reward")
    tiny_tokenizer().save_pretrained(root / "reward")
    chosen = {n: c for n, c in cases.items() if not sys.argv[2:] or n in sys.argv[2:]}
    jobs = Jobs(
        job_from(Checkpoint.of(root / "0")), Checkpoint.of(root / "1"), root / "reward", chosen
    )
    rows = [train_in(n, root / f"in {n}", jobs) for n in (1, int(sys.argv[1]))]
    for name in chosen:
        worst = sorted(
            ((v, k) for k, v in apart(rows[0][name], rows[1][name]).items()), reverse=True
        )
        print(name, worst[:4])
