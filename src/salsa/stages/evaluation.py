"""The jobs of an evaluation: samples of a policy on held-out prompts, and its answers to a benchmark's questions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from salsa.artifacts import Checkpoint
from salsa.config import DataSource
from salsa.evaluate.inputs import Question
from salsa.rewards import RewardSource
from salsa.stages.jobs import Job, Undecisive, identity_from

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine


@dataclass(frozen=True)
class EvalJob(Job):
    """One policy on the held-out prompts: responses, scores, KL, lengths."""

    policy: Checkpoint
    prompts: DataSource
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    batch_size: Undecisive[int]
    """Responses sampled per call; it decides no response but for rounding."""
    seed: int
    kl_to: dict[str, Checkpoint] = field(default_factory=dict)
    """Name → model to measure the KL to."""
    rewards: Annotated[dict[str, RewardSource], "score"] = field(default_factory=dict)
    """Name → what scores; of several functions the sum. A run's training reward is `proxy`."""
    references: Annotated[tuple[Checkpoint, ...], "reference"] = ()
    """The policy's own reference; several are the parts of a mixture."""
    only: tuple[int, ...] | None = None
    """Which of the prompts, by number, where not all fit; all that fit if not given."""
    reference_weights: tuple[float, ...] = (1.0,)

    def execution(self) -> dict[str, Any]:
        """Responses per call."""
        return {"batch_size": self.batch_size}

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `samples.jsonl`."""
        from salsa.evaluate.scores import evaluate_policy

        evaluate_policy(self, directory, engine)


@dataclass(frozen=True)
class AnswersJob(Job):
    """One policy and the questions of one or two turns that it answers."""

    benchmark: str
    """Whose format `answers.jsonl` has: `mt_bench` or `arena_hard`."""
    name: str
    """What the model is called in it."""
    policy: Checkpoint
    questions: tuple[Question, ...]
    temperatures: tuple[float, ...]
    """One a question."""
    max_new_tokens: int
    batch_size: int
    seed: int

    def identity(self) -> dict[str, Any]:
        """Settings, questions and the policy."""
        return identity_from(
            seed=self.seed,
            name=self.name,
            benchmark=self.benchmark,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,  # answers of one batch share their random numbers
            temperatures=self.temperatures,
            questions=[[q.id, *q.turns] for q in self.questions],
            policy=self.policy,
        )

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `answers.jsonl`; resumable by the batch."""
        from salsa.evaluate.answers import write_answers

        write_answers(self, directory, engine)
