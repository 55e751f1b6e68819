"""Jobs that sample a model many times a prompt, score the replies and weigh them under other models.

Each is a stage of its own, so that a further candidate, score or yardstick computes only what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa.artifacts import Checkpoint
from salsa.config import DataSource
from salsa.rewards import RewardSource
from salsa.stages.jobs import Job, Undecisive, identity_from

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine


@dataclass(frozen=True)
class Asked:
    """The prompts, and how replies to them are drawn."""

    prompts: DataSource
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    num_samples: int
    """Replies per prompt."""
    seed: int
    batch_prompts: int
    """Prompts sampled together."""


@dataclass(frozen=True)
class RepliesJob(Job):
    """Many replies of one model to each prompt."""

    model: Checkpoint
    asked: Asked

    def identity(self) -> dict[str, Any]:
        """The model, the prompts and how it is sampled."""
        return identity_from(model=self.model, **vars(self.asked))

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `replies.jsonl`, a row a prompt; resumable."""
        from salsa.analysis.sampling import write_replies

        write_replies(self, directory, engine)


@dataclass(frozen=True)
class ScoresJob(Job):
    """The replies of one model, scored."""

    model: Checkpoint
    """Who replied: prompts are shown as it saw them."""
    replies: Checkpoint
    asked: Asked
    rewards: dict[str, RewardSource]

    def identity(self) -> dict[str, Any]:
        """The replies, their prompts and what scores them."""
        asked = {name: vars(self.asked)[name] for name in ("prompts", "max_prompt_tokens")}
        return identity_from(replies=self.replies, **asked, score=self.rewards)

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `scores.jsonl`, a row a prompt; resumable."""
        from salsa.analysis.sampling import write_scores

        write_scores(self, directory, engine)


@dataclass(frozen=True)
class LogprobsJob(Job):
    """The log-probability of one model's replies under another."""

    author: Undecisive[Checkpoint]
    """Who replied."""
    replies: Checkpoint
    model: Checkpoint
    """Under which."""
    temperature: float

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `logprobs.jsonl`, a row a prompt; resumable."""
        from salsa.analysis.sampling import write_logprobs

        write_logprobs(self, directory, engine)


@dataclass(frozen=True)
class LandscapeJob(Job):
    """Scores, KL and loss at places on the line or the plane through models."""

    models: tuple[Checkpoint, ...]
    """Two for a line, three for a plane."""
    alphas: tuple[float, ...]
    asked: Asked
    rewards: dict[str, RewardSource]
    kl_to: dict[str, Checkpoint]
    validation: DataSource | None

    def identity(self) -> dict[str, Any]:
        """The models, the places, and everything that is measured there."""
        loss = {} if self.validation is None else {"validation": self.validation}
        return identity_from(
            **vars(self.asked),
            alphas=self.alphas,
            model=dict(enumerate(self.models)),
            kl_to=self.kl_to,
            score=self.rewards,
            **loss,
        )

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `places.jsonl`, a row a place; resumable."""
        from salsa.analysis.landscape import write_places

        write_places(self, directory, engine)
