"""Jobs that sample a model many times a prompt, score the replies and weigh them under other models.

Each is a stage of its own, so that a further candidate, score or yardstick computes only what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa.artifacts import Checkpoint
from salsa.config import DataSource
from salsa.rewards import RewardSource
from salsa.stages.directory import Job
from salsa.stages.jobs import identity_from

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

    def identity(self) -> dict[str, Any]:
        """All but the prompts, which are an input."""
        return {name: value for name, value in vars(self).items() if name != "prompts"}


@dataclass(frozen=True)
class RepliesJob(Job):
    """Many replies of one model to each prompt."""

    model: Checkpoint
    asked: Asked

    def identity(self) -> dict[str, Any]:
        """The model, the prompts and how it is sampled."""
        return identity_from(self.asked.identity(), model=self.model, prompts=self.asked.prompts)

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
        settings = {"max_prompt_tokens": self.asked.max_prompt_tokens}
        return identity_from(
            settings, replies=self.replies, prompts=self.asked.prompts, score=self.rewards
        )

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `scores.jsonl`, a row a prompt; resumable."""
        from salsa.analysis.sampling import write_scores

        write_scores(self, directory, engine)


@dataclass(frozen=True)
class LogprobsJob(Job):
    """The log-probability of one model's replies under another."""

    model: Checkpoint
    """Under which."""
    author: Checkpoint
    """Who replied."""
    replies: Checkpoint
    temperature: float

    def identity(self) -> dict[str, Any]:
        """The replies, the model and the temperature."""
        settings = {"temperature": self.temperature}
        return identity_from(settings, replies=self.replies, model=self.model)

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
        return identity_from(
            self.asked.identity() | {"alphas": list(self.alphas)},
            prompts=self.asked.prompts,
            model=dict(enumerate(self.models)),
            kl_to=self.kl_to,
            score=self.rewards,
            validation=self.validation,
        )

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `places.jsonl`, a row a place; resumable."""
        from salsa.analysis.landscape import write_places

        write_places(self, directory, engine)
