"""What one RL run is made of, how its models are loaded, and what a checkpoint keeps of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from salsa.artifacts import Checkpoint
from salsa.config import RLConfig
from salsa.config.expressions import ReferenceRule
from salsa.data import Prompt
from salsa.errors import ConfigError, WorkFailed
from salsa.models import LanguageModel, ValueModel, check_vocabulary, load_tokenizer, sampling_for
from salsa.objectives import Moments
from salsa.references import Reference
from salsa.rewards import Scorer
from salsa.runtime.checkpoint import load_state, prune_states, save_state, saved_steps, state_file
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler, Sampler
from salsa.runtime.sampler.vllm import VLLMSampler
from salsa.runtime.sharding import divided_like, local, whole, whole_on_main
from salsa.types import Sampling


@dataclass(frozen=True)
class RLSetup:
    """What one RL run is made of: an arm and a seed, with prompts and rewards loaded."""

    label: str
    init: Checkpoint
    reference: Checkpoint | ReferenceRule[Checkpoint]
    """What the KL pulls towards; a bare checkpoint is a reference that stands still."""
    critic_init: Checkpoint
    """A sequence classifier (the reward model), or a language model whose trunk gets a new head."""
    config: RLConfig
    prompts: Sequence[Prompt]
    reward: Scorer | Mapping[str, Scorer]
    """What is maximised; of several, by name, the sum, and each is logged."""
    seed: int
    monitors: Mapping[str, Scorer] = field(default_factory=dict)
    """Further scores to log, e.g. `gold`; they do not train anything."""
    kl_to: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Name → model whose KL is logged every `monitor_kl_every` updates: the ingredients and the base."""

    def __post_init__(self) -> None:
        known = ("reward", "score", *self.monitors)
        if (metric := self.config.selection.metric) not in known:
            raise ConfigError(
                f"{self.label}: select.metric={metric!r} is not measured here. Known: {', '.join(known)}."
            )

    @property
    def rewards(self) -> Mapping[str, Scorer]:
        """The rewards by name."""
        return {"reward": self.reward} if callable(self.reward) else self.reward

    @property
    def rule(self) -> ReferenceRule[Checkpoint]:
        """The reference as a rule."""
        if isinstance(self.reference, ReferenceRule):
            return self.reference
        return ReferenceRule((self.reference,))


@dataclass(frozen=True)
class PolicySampler:
    """How the policy is sampled from, and its tokenizer."""

    sampler: Sampler
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Learner:
    """A model that learns, with its optimizer."""

    model: LanguageModel | ValueModel
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: LanguageModel | ValueModel, learning_rate: float) -> "Learner":
        """AdamW on the fp32 weights that learn."""
        optimizer = torch.optim.AdamW(
            list(model.trained().values()), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8,
            weight_decay=0.0, fused=True,
        )  # fmt: skip
        return cls(model, optimizer)

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip the gradients and step; the norm they had."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.trained().values(), max_grad_norm)
        self.optimizer.step()
        self.model.sync()
        return whole(norm)

    def is_finite(self) -> bool:
        """Whether all weights that learn are numbers, in every process."""
        wrong = [(~local(weight).isfinite()).sum() for weight in self.model.trained().values()]
        return int(self.model.engine.sum(torch.stack(wrong).sum())) == 0

    def state(self) -> dict[str, Any]:
        """The weights that learn and the optimizer's moments, whole in the main process, None in others."""
        state = {"weights": self.model.trained(), "optimizer": self.optimizer.state_dict()}
        return whole_on_main(state, self.model.engine.is_main)

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back `state()`, in any number of processes."""
        trained = self.model.trained()
        weights = list(trained.values())
        for name, weight in trained.items():
            local(weight).copy_(local(divided_like(state["weights"][name], weight)))
        self.model.sync()
        moments = {
            number: {
                key: divided_like(value, weights[number])
                if value.shape == weights[number].shape
                else value
                for key, value in of.items()
            }
            for number, of in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})


@dataclass(frozen=True)
class RLModels:
    """Policy, critic and reference, all without dropout. RLOO and GRPO have no critic."""

    policy: LanguageModel
    critic: ValueModel | None
    reference: Reference
    learners: dict[str, Learner]
    """`policy` and, with a critic, `critic`."""

    def groups(self, *, warming_up: bool) -> list[tuple[str, ...]]:
        """Who steps together: policy and critic where the critic is a head on the policy's trunk, else each alone."""
        names = tuple(name for name in self.learners if name == "critic" or not warming_up)
        shared = self.critic is not None and not self.critic.owns_trunk
        return [names] if shared else [(name,) for name in names]

    def zero_grad(self) -> None:
        """Of all that learns: a critic's head leaves gradients in a trunk that may not step now."""
        for learner in self.learners.values():
            learner.optimizer.zero_grad()

    def reset_optimizers(self) -> None:
        """Drop the optimizers' moments."""
        for learner in self.learners.values():
            learner.optimizer.state.clear()


@dataclass(frozen=True)
class Progress:
    """What changes from update to update besides the weights."""

    kl_coef: float
    """β as it is now."""
    update: int = 0
    """Updates done; prompts and randomness follow from it."""
    moments: Moments = field(default_factory=Moments)
    """Of all scores so far, where they are normalised."""
    rewards: tuple[float, ...] = ()
    """Of each update since the last checkpoint, what `rl.select` compares: the mean reward, or its metric."""
    best: tuple[int, float] | None = None
    """Update of the best checkpoint, and the mean of that since the one before."""
    kl: float = 0.0
    """To own reference, of the last rollout."""

    @property
    def reward(self) -> float:
        """Mean of `rewards`."""
        return sum(self.rewards) / len(self.rewards)


def load(setup: RLSetup, engine: Engine) -> tuple[RLModels, PolicySampler]:
    """The run's models, with adapters where `config.lora` says so, and how its policy is sampled.

    Raises:
        CheckpointError: the models do not share a vocabulary, one cannot be loaded, or a reference is not what its
            digest says.
    """
    init, critic_init, config, seed = setup.init, setup.critic_init, setup.config, setup.seed
    named = {"critic": critic_init} | {
        f"reference {i}" if i else "reference": c for i, c in enumerate(setup.rule.models)
    }
    tokenizer, length = load_tokenizer(init.path), config.max_new_tokens
    for name, checkpoint in named.items():
        check_vocabulary(tokenizer, checkpoint.path, name)
    sampling = sampling_for(
        init.path, tokenizer, max_new_tokens=length, temperature=config.temperature
    )
    lora, again = config.lora, config.gradient_checkpointing
    policy = LanguageModel.load(init.path, engine, learns=True, gradient_checkpointing=again)
    shared = {init.digest: policy.shared()} if lora and not setup.rule.moves else {}
    reference = Reference(setup.rule, engine, shared)
    critic = None
    if config.algorithm == "ppo" and config.critic == "head":
        critic = ValueModel.head_on(policy)
    elif config.algorithm == "ppo" and lora is not None:
        critic = ValueModel.adapters_on(policy, lora, seed + 1)
    elif config.algorithm == "ppo":
        critic = ValueModel.load(
            critic_init.path, engine, pad_id=sampling.pad_id, new_head_seed=seed,
            gradient_checkpointing=again,
        )  # fmt: skip
    if lora is not None:
        policy.add_adapters(lora, seed)
    for model in (policy, critic, *reference.models):
        if model is not None:
            engine.shard(model)
    learners = {"policy": Learner.of(policy, config.learning_rate)}
    if critic is not None:
        rate = config.critic_learning_rate or config.learning_rate
        learners["critic"] = Learner.of(critic, rate)
    models = RLModels(policy, critic, reference, learners)
    return models, PolicySampler(_sampler(policy, config), sampling, tokenizer)


def _sampler(policy: LanguageModel, config: RLConfig) -> Sampler:
    """What samples the rollouts: the policy in this process, or a vLLM server that its weights are pushed to."""
    if (server := config.vllm) is None:
        return LocalSampler(policy)
    return VLLMSampler(
        policy, server.url, transfer=server.transfer, timeout=server.timeout, verify=server.verify
    )


def save_models(
    models: RLModels, tokenizer: PreTrainedTokenizerBase, init: Checkpoint, directory: Path
) -> None:
    """Write the policy, with `critic/` and a moving reference's `reference/` beside it; adapters are merged."""
    models.policy.save(tokenizer, directory)
    models.reference.save(tokenizer, directory / "reference")
    if models.critic is not None:
        models.critic.save(tokenizer, directory / "critic", init.path)


def save_progress(
    models: RLModels,
    progress: Progress,
    directory: Path,
    *,
    keep_last: int,
    keep_best: bool = True,
    within: float | None = None,
) -> Progress:
    """Write a resume state; drop those that are not new, nor the best if that is kept. The progress to go on with.

    One whose KL is not `within` a budget is not the best.

    Raises:
        WorkFailed: a weight is no longer finite.
    """
    eligible = within is None or progress.kl <= within
    if eligible and (progress.best is None or progress.reward > progress.best[1]):
        progress = replace(progress, best=(progress.update, progress.reward))
    progress = replace(progress, rewards=())
    for name, learner in models.learners.items():
        if not learner.is_finite():
            raise WorkFailed(
                f"{directory}: the {name}'s weights hold NaN or Inf after update {progress.update}. "
                "The last checkpoint is kept; try a smaller rl.learning_rate."
            )
    state: dict[str, Any] = {"progress": asdict(progress) | {"moments": tuple(progress.moments)}}
    state |= {name: learner.state() for name, learner in models.learners.items()}
    state["reference"] = models.reference.state()
    best = progress.best[0] if progress.best and keep_best else None

    def write() -> None:
        save_state(state_file(directory, progress.update), state)
        prune_states(directory, keep_last=keep_last, keep=best)

    models.policy.engine.from_main(write)
    return progress


def load_progress(models: RLModels, directory: Path, update: int | None = None) -> Progress | None:
    """Put back the state after `update`, the newest if not given; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or the reference is not the one that it was made with.
    """
    found = models.policy.engine.from_main(lambda: saved_steps(directory))
    steps = found if update is None else [update]
    if not steps:
        return None
    file = state_file(directory, steps[-1])
    state = load_state(file)
    models.reference.load_state(state["reference"], file)
    for name, learner in models.learners.items():
        learner.load_state(state[name])
    return Progress(**state["progress"] | {"moments": Moments(*state["progress"]["moments"])})
