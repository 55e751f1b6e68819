"""The jobs of a run: what each stage is made of, and so its identity. Plain data; torch is imported only to run one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
)
from salsa.config.expressions import ReferenceRule
from salsa.data import PREFERENCE_COLUMNS, fingerprint, import_callable, load_rows
from salsa.errors import CheckpointError
from salsa.rewards import FunctionScorer, RewardSource, function_digest

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

Reference = ReferenceRule[Checkpoint]


@dataclass(frozen=True)
class BaseJob:
    """The base as an ordinary checkpoint: de-quantized, with a chat template."""

    needs_engine: ClassVar[bool] = False
    label: str
    source: Checkpoint
    config: ModelConfig

    def identity(self) -> dict[str, Any]:
        """The source's digest, the GGUF file and the template's text."""
        template = self.config.chat_template
        text = Path(template).read_text(encoding="utf-8") if template else None
        return {
            "config": {"gguf_file": self.config.gguf_file, "chat_template": text},
            "inputs": {"source": self.source.digest},
        }

    def execution(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {}

    def run(self, directory: Path, engine: "Engine | None") -> None:
        """Write the checkpoint."""
        from salsa.models import prepare_base

        prepare_base(self.config, self.source.path, directory)


@dataclass(frozen=True)
class SoupJob:
    """A weight average of checkpoints, or a model shrunk towards the base."""

    needs_engine: ClassVar[bool] = False
    label: str
    ingredients: tuple[Checkpoint, ...]
    base: Checkpoint | None
    as_near_as: Checkpoint | None = None
    """Shrink the one ingredient until it is as far from the base as this model."""
    options: dict[str, Any] = field(default_factory=dict)
    """As of `salsa.soup.write_soup`; `score` as `module:function`."""

    def identity(self) -> dict[str, Any]:
        """The options and every model's digest."""
        inputs = {f"ingredient {i}": c.digest for i, c in enumerate(self.ingredients)}
        if self.base is not None:
            inputs["base"] = self.base.digest
        if self.as_near_as is not None:
            inputs["as near as"] = self.as_near_as.digest
        if "score" in self.options:
            inputs["score"] = fingerprint(DataSource(call=self.options["score"]))
        return {"config": self.options, "inputs": inputs}

    def execution(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {}

    def run(self, directory: Path, engine: "Engine | None") -> None:
        """Write the soup."""
        from salsa.soup import write_soup

        options = dict(self.options)
        if self.base is not None:
            options["base"] = self.base
        if "score" in options:
            options["score"] = import_callable(options["score"])
        if self.as_near_as is not None:
            options |= {"method": "wise", "alpha": self._norm_ratio(self.as_near_as)}
        write_soup(list(self.ingredients), directory, **options)

    def _norm_ratio(self, other: Checkpoint) -> float:
        """‖other − base‖ / ‖model − base‖."""
        from salsa.soup import measure_soup

        assert self.base is not None  # the resolver gives it
        record = measure_soup([other.path, self.ingredients[0].path], base=self.base.path)
        of_other, of_model = record["diagnostics"]["norms"]
        return of_other / of_model


@dataclass(frozen=True)
class SFTJob:
    """Supervised fine-tuning with one seed."""

    needs_engine: ClassVar[bool] = True
    label: str
    base: Checkpoint
    config: SFTConfig
    dataset: DataSource
    seed: int

    def identity(self) -> dict[str, Any]:
        """Settings, seed, base and data."""
        return {
            "config": self.config.identity() | {"seed": self.seed},
            "inputs": {"base": self.base.digest, "data": fingerprint(self.dataset)},
        }

    def execution(self) -> dict[str, Any]:
        """Micro-batches and checkpoints."""
        return self.config.execution()

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.sft import train_sft

        train_sft(self, directory, engine)


@dataclass(frozen=True)
class PreferencesJob:
    """Preference pairs: rows of a data set, or replies of the SFT models labelled by a noisy scorer."""

    needs_engine: ClassVar[bool] = True
    label: str
    models: tuple[Checkpoint, ...]
    """The SFT models that reply; none where the pairs are rows of a data set."""
    config: PreferencesConfig
    max_prompt_tokens: int

    def identity(self) -> dict[str, Any]:
        """The data set; or settings, models, prompts and labeller."""
        if self.config.dataset is not None:
            return {"config": {}, "inputs": {"data": fingerprint(self.config.dataset)}}
        assert self.config.prompts is not None and self.config.labeller is not None  # the schema
        return {
            "config": self.config.identity() | {"max_prompt_tokens": self.max_prompt_tokens},
            "inputs": {f"sft[{i}]": c.digest for i, c in enumerate(self.models)}
            | {
                "prompts": fingerprint(self.config.prompts),
                "labeller": function_digest(self.config.labeller),
            },
        }

    def execution(self) -> dict[str, Any]:
        """How the labeller is called."""
        return self.config.execution()

    def run(self, directory: Path, engine: "Engine") -> None:
        """Write `pairs.jsonl`."""
        if self.config.dataset is not None:
            rows = load_rows(self.config.dataset, PREFERENCE_COLUMNS)
            wanted = ("prompt", "chosen", "rejected")
            write_jsonl(
                directory / "pairs.jsonl", [{k: r[k] for k in wanted if k in r} for r in rows]
            )
            return
        from salsa.preferences import sample_pairs

        sample_pairs(self, directory, engine)


@dataclass(frozen=True)
class RewardJob:
    """A reward model trained on preference pairs with one seed."""

    needs_engine: ClassVar[bool] = True
    label: str
    init: Checkpoint
    pairs: Checkpoint
    """The directory of `pairs.jsonl`."""
    config: RewardConfig
    seed: int

    def identity(self) -> dict[str, Any]:
        """Settings, seed, start and data."""
        return {
            "config": self.config.identity() | {"seed": self.seed},
            "inputs": {"init": self.init.digest, "pairs": self.pairs.digest},
        }

    def execution(self) -> dict[str, Any]:
        """Checkpoints."""
        return self.config.execution()

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.reward import train_reward

        train_reward(self, directory, engine)


@dataclass(frozen=True)
class DPOJob:
    """Direct preference optimisation of one arm with one seed."""

    needs_engine: ClassVar[bool] = True
    label: str
    init: Checkpoint
    reference: Checkpoint
    pairs: Checkpoint
    config: DPOConfig
    seed: int

    def identity(self) -> dict[str, Any]:
        """Settings, seed, models and data."""
        return {
            "config": self.config.identity() | {"seed": self.seed},
            "inputs": {
                "init": self.init.digest,
                "reference": self.reference.digest,
                "pairs": self.pairs.digest,
            },
        }

    def execution(self) -> dict[str, Any]:
        """Micro-batches and checkpoints."""
        return self.config.execution()

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.dpo import train_dpo

        train_dpo(self, directory, engine)


@dataclass(frozen=True)
class RLJob:
    """RL of one arm with one seed."""

    needs_engine: ClassVar[bool] = True
    label: str
    init: Checkpoint
    reference: Reference
    reward: RewardSource
    config: RLConfig
    prompts: DataSource
    seed: int
    monitors: dict[str, RewardFunction] = field(default_factory=dict)
    """Further scores to log, e.g. `gold`; they train nothing."""
    kl_to: dict[str, Checkpoint] = field(default_factory=dict)
    """Name → model whose KL is logged: the base and the SFT models."""

    def identity(self) -> dict[str, Any]:
        """Settings, seed, models, reward and prompts; what is only logged counts too, for it is part of the output."""
        return {
            "config": self.config.identity() | {"seed": self.seed},
            "inputs": {
                "init": self.init.digest,
                "reference": identity_of(self.reference),
                "reward": self.reward.digest,
                "prompts": fingerprint(self.prompts),
            }
            | {f"kl_to {name}": c.digest for name, c in self.kl_to.items()}
            | {f"score {name}": function_digest(f) for name, f in self.monitors.items()},
        }

    def execution(self) -> dict[str, Any]:
        """Micro-batches, recomputed activations and checkpoints."""
        return self.config.execution()

    def run(self, directory: Path, engine: "Engine") -> None:
        """Train; resumable."""
        from salsa.data import load_prompts
        from salsa.models import load_tokenizer, same_vocabulary
        from salsa.rl import RLSetup, train_rl

        rewards = self.reward.load(engine)
        critic_init, reward_model = self.init, self.reward.checkpoint
        if reward_model is not None and same_vocabulary(reward_model.path, self.init.path):
            critic_init = reward_model
        setup = RLSetup(
            label=self.label,
            init=self.init,
            reference=self.reference,
            critic_init=critic_init,
            config=self.config,
            prompts=load_prompts(
                self.prompts,
                load_tokenizer(self.init.path),
                max_tokens=self.config.max_prompt_tokens,
            ),
            reward=rewards,
            seed=self.seed,
            monitors={name: FunctionScorer([f]) for name, f in self.monitors.items()},
            kl_to=self.kl_to,
        )
        train_rl(setup, directory, engine)


def identity_of(reference: Reference) -> str:
    """A reference in one line: its rule and its models' digests. A model that stands still is its digest alone."""
    digests = [checkpoint.digest for checkpoint in reference.models]
    if reference == ReferenceRule(reference.models):
        return digests[0]
    rule = {key: value for key, value in vars(reference).items() if key != "models"}
    return f"{rule} of {digests}"


def moved_reference(policy: Checkpoint) -> Checkpoint:
    """Where a moving reference ended, beside the policy it followed.

    Raises:
        CheckpointError: it is not there.
    """
    path = policy.path / "reference"
    if not path.is_dir():
        raise CheckpointError(f"{path}: the moving reference is missing. Run this arm again.")
    return Checkpoint.of(path)
