"""The jobs of a run: what each stage is made of, and so its identity. Plain data; torch is imported only to run one.

Those that sample a model many times a prompt, score the replies and weigh them under other models are stages of their
own, so that a further candidate, score or yardstick computes only what is new.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.config import (
    DataSource,
    DPOConfig,
    ModelConfig,
    PreferencesConfig,
    RewardConfig,
    RewardFunction,
    RLConfig,
    SFTConfig,
    Strict,
)
from salsa.config.expressions import ReferenceRule, identity_of
from salsa.data import PREFERENCE_COLUMNS, fingerprint, import_callable, load_prompts, load_rows
from salsa.errors import CheckpointError
from salsa.rewards import RewardSource, function_digest
from salsa.untrusted import read_text

if TYPE_CHECKING:
    from salsa.evaluate.benchmarks import Question
    from salsa.runtime.engine import Engine

T = TypeVar("T")
Undecisive = Annotated[T, None]
"""A job's field that does not decide its result."""


@dataclass(frozen=True)
class Job(ABC):
    """The work of one stage as plain data: frozen, picklable, made without loading a model.

    A field decides the result under its own name; `Annotated[type, name]` gives it another one in the identity.
    """

    needs_engine: ClassVar[bool] = True
    """Whether the work computes with torch, so that its arithmetic is part of its identity."""
    label: Undecisive[str]
    """Names the directory and the report's row, e.g. `sft[0]`."""

    def identity(self) -> dict[str, Any]:
        """`{"config": …, "inputs": {name: digest}}`: all that decides the result, as JSON values."""
        names = {f.name: getattr(f.type, "__metadata__", (f.name,))[0] for f in fields(self)}
        return identity_from(**{name: getattr(self, own) for own, name in names.items() if name})

    def decides(self, name: str) -> bool:
        """Whether the input of that name in the identity decides the result, and not only what is logged on the way."""
        return True

    @property
    def can_be_divided(self) -> bool:
        """Whether several processes can do the work together."""
        return False

    def execution(self) -> dict[str, Any]:
        """How it is computed, which does not decide the result; recorded beside the identity."""
        config = getattr(self, "config", None)
        return {} if config is None else config.execution()

    @abstractmethod
    def run(self, directory: Path, engine: Any) -> None:
        """Fill `directory`, by an `Engine` if the job needs one.

        What is kept in `directory/resume` survives a kill and is dropped at the end.
        """


def identity_from(**parts: Any) -> dict[str, Any]:
    """A job's identity from what it is made of.

    A recipe's section gives its settings. Models, data, functions and rewards are inputs, known by their digests; of
    several in a dictionary as `name key`, in a tuple as `name[number]`. Anything else counts as it is.
    """
    settings: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    for name, part in parts.items():
        if isinstance(part, dict):
            inputs |= {f"{name} {key}": _digest(one) for key, one in part.items()}
        elif isinstance(part, tuple) and all(isinstance(one, _SOURCES) for one in part):
            inputs |= {f"{name}[{number}]": _digest(one) for number, one in enumerate(part)}
        elif isinstance(part, _SOURCES):
            inputs[name] = _digest(part)
        else:
            settings |= part.identity() if isinstance(part, Strict) else {name: part}
    return {"config": settings, "inputs": inputs}


def _digest(source: Any) -> str:
    match source:
        case DataSource():
            return fingerprint(source)
        case RewardFunction():
            return function_digest(source)
        case ReferenceRule():
            return identity_of(source)
    return source.digest


_SOURCES = (Checkpoint, DataSource, RewardFunction, RewardSource, ReferenceRule)


@dataclass(frozen=True)
class BaseJob(Job):
    """The base as an ordinary checkpoint: de-quantized, with a chat template."""

    needs_engine: ClassVar[bool] = False
    source: Checkpoint
    model: ModelConfig

    def identity(self) -> dict[str, Any]:
        """The source's digest, the GGUF file and the template's text."""
        template = self.model.chat_template
        text = read_text(Path(template)) if template else None
        return identity_from(gguf_file=self.model.gguf_file, chat_template=text, source=self.source)

    def run(self, directory: Path, engine: "Engine | None") -> None:
        """Write the checkpoint."""
        from salsa.models import prepare_base

        prepare_base(self.model, self.source.path, directory)


@dataclass(frozen=True)
class SoupJob(Job):
    """A weight average of checkpoints, or a model shrunk towards the base."""

    needs_engine: ClassVar[bool] = False
    ingredients: tuple[Checkpoint, ...]
    base: Checkpoint | None
    as_near_as: Checkpoint | None = None
    """Shrink the one ingredient until it is as far from the base as this model."""
    options: dict[str, Any] = field(default_factory=dict)
    """As of `salsa.soup.write_soup`; `score` as `module:function`."""

    def identity(self) -> dict[str, Any]:
        """The options and every model's digest."""
        inputs = {f"ingredient {i}": c.digest for i, c in enumerate(self.ingredients)}
        for name, model in (("base", self.base), ("as near as", self.as_near_as)):
            if model is not None:
                inputs[name] = model.digest
        if "score" in self.options:
            inputs["score"] = fingerprint(DataSource(call=self.options["score"]))
        return {"config": self.options, "inputs": inputs}

    def run(self, directory: Path, engine: "Engine | None") -> None:
        """Write the soup."""
        from salsa.soup import measure_soup, write_soup

        options = dict(self.options)
        if self.base is not None:
            options["base"] = self.base
        if "score" in options:
            options["score"] = import_callable(options["score"])
        if self.as_near_as is not None:  # alpha = ‖other − base‖ / ‖model − base‖
            assert self.base is not None  # the resolver gives it
            pair = [self.as_near_as.path, self.ingredients[0].path]
            norms = measure_soup(pair, base=self.base.path)["diagnostics"]["norms"]
            options |= {"method": "wise", "alpha": norms[0] / norms[1]}
        write_soup(list(self.ingredients), directory, **options)


@dataclass(frozen=True)
class SFTJob(Job):
    """Supervised fine-tuning with one seed."""

    base: Checkpoint
    config: SFTConfig
    dataset: Annotated[DataSource, "data"]
    seed: int

    @property
    def can_be_divided(self) -> bool:
        """Unless its settings ask for adapters or packed rows."""
        return self.config.can_be_divided

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.sft import train_sft

        train_sft(self, directory, engine)


@dataclass(frozen=True)
class PreferencesJob(Job):
    """Preference pairs: rows of a data set, or replies of the SFT models labelled by a noisy scorer."""

    models: tuple[Checkpoint, ...]
    """The SFT models that reply; none where the pairs are rows of a data set."""
    config: PreferencesConfig
    max_prompt_tokens: int

    def identity(self) -> dict[str, Any]:
        """The data set; or settings, models, prompts and labeller."""
        config, longest = self.config, self.max_prompt_tokens
        if config.dataset is not None:
            return identity_from(data=config.dataset)
        given = {"prompts": config.prompts, "labeller": config.labeller}
        return identity_from(config=config, max_prompt_tokens=longest, sft=self.models, **given)

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `pairs.jsonl`."""
        if self.config.dataset is not None:
            rows = load_rows(self.config.dataset, PREFERENCE_COLUMNS)
            wanted = ("prompt", "chosen", "rejected")
            pairs = [{k: row[k] for k in wanted if k in row} for row in rows]
            return write_jsonl(directory / "pairs.jsonl", pairs)
        from salsa.preferences import sample_pairs

        sample_pairs(self, directory, engine)


@dataclass(frozen=True)
class RewardJob(Job):
    """A reward model trained on preference pairs with one seed."""

    init: Checkpoint
    pairs: Checkpoint
    """The directory of `pairs.jsonl`."""
    config: RewardConfig
    seed: int

    @property
    def can_be_divided(self) -> bool:
        """Unless its settings ask for adapters."""
        return self.config.can_be_divided

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.reward import train_reward

        train_reward(self, directory, engine)


@dataclass(frozen=True)
class DPOJob(Job):
    """Direct preference optimisation of one arm with one seed."""

    init: Checkpoint
    reference: Checkpoint
    pairs: Checkpoint
    config: DPOConfig
    seed: int

    @property
    def can_be_divided(self) -> bool:
        """Always."""
        return True

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.dpo import train_dpo

        train_dpo(self, directory, engine)


@dataclass(frozen=True)
class RLJob(Job):
    """RL of one arm with one seed."""

    init: Checkpoint
    reference: ReferenceRule[Checkpoint]
    reward: RewardSource
    config: RLConfig
    prompts: DataSource
    seed: int
    kl_to: dict[str, Checkpoint] = field(default_factory=dict)
    """Name → model whose KL is logged: the base and the SFT models."""
    monitors: Annotated[dict[str, RewardSource], "score"] = field(default_factory=dict)
    """Further scores to log, e.g. `gold`; they train nothing."""

    def decides(self, name: str) -> bool:
        """Not what is logged only: the KL to other models, and scores that no checkpoint is chosen by."""
        kind, _, which = name.partition(" ")
        return kind not in ("kl_to", "score") or which == self.config.selection.metric

    @property
    def can_be_divided(self) -> bool:
        """Always."""
        return True

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.models import load_tokenizer, same_vocabulary
        from salsa.rl import RLSetup, train_rl

        tokenizer, longest = load_tokenizer(self.init.path), self.config.max_prompt_tokens
        loaded = {
            "reward": self.reward.load(engine),
            "critic_init": self.init,
            "prompts": load_prompts(self.prompts, tokenizer, max_tokens=longest),
            "monitors": {name: source.load_one(engine) for name, source in self.monitors.items()},
        }
        trained = self.reward.checkpoint
        if trained is not None and same_vocabulary(trained.path, self.init.path):
            loaded["critic_init"] = trained
        train_rl(RLSetup(**vars(self) | loaded), directory, engine)


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
    questions: "tuple[Question, ...]"
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
        named = {"model": dict(enumerate(self.models)), "kl_to": self.kl_to, "score": self.rewards}
        loss = {} if self.validation is None else {"validation": self.validation}
        return identity_from(**vars(self.asked), alphas=self.alphas, **named, **loss)

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `places.jsonl`, a row a place; resumable."""
        from salsa.analysis.landscape import write_places

        write_places(self, directory, engine)


def directories_of(part: Any) -> set[Path]:
    """The directories of every checkpoint that a job, or a part of one, is made from."""
    match part:
        case Checkpoint():
            return {part.path}
        case tuple():
            return set().union(*map(directories_of, part))
        case dict():
            return directories_of(tuple(part.values()))
        case Job() | ReferenceRule() | RewardSource():
            return directories_of(tuple(vars(part).values()))
    return set()


def moved_reference(policy: Checkpoint) -> Checkpoint:
    """Where a moving reference ended, beside the policy it followed; CheckpointError if it is not there."""
    path = policy.path / "reference"
    if not path.is_dir():
        raise CheckpointError(f"{path}: the moving reference is missing. Run this arm again.")
    return Checkpoint.of(path)
