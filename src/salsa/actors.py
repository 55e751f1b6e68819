"""The models of one RL run, how they are loaded, and what a checkpoint keeps of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa import models
from salsa.adapters import add_adapters, copy_effective, shared_copy
from salsa.anchors import Reference
from salsa.artifacts import Checkpoint
from salsa.config import RLConfig
from salsa.errors import WorkFailed
from salsa.expressions import Anchor
from salsa.objectives import Moments
from salsa.runtime.checkpoint import (
    load_state,
    prune_states,
    save_state,
    saved_steps,
    state_file,
)


class ValueHead(nn.Module):
    """A scalar head on a trunk; it starts at 0, so that every value does.

    `models.response_values` reads `base_model_prefix` and `score`, as in a sequence classifier of transformers.
    """

    base_model_prefix = "trunk"
    trunk: nn.Module

    def __init__(self, trunk: PreTrainedModel, *, owns_trunk: bool) -> None:
        """Sit on `trunk`; if it is the policy's, its parameters are not this module's."""
        super().__init__()
        self.owns_trunk = owns_trunk
        (setattr if owns_trunk else object.__setattr__)(self, "trunk", trunk)
        size = trunk.config.get_text_config().hidden_size
        self.score = nn.Linear(size, 1, bias=False, device=trunk.device)
        nn.init.zeros_(self.score.weight)


@dataclass
class Actors:
    """Policy, critic and reference, all without dropout. RLOO and GRPO have no critic."""

    policy: PreTrainedModel
    reference: Reference
    policy_optimizer: torch.optim.Optimizer
    critic: nn.Module | None
    critic_optimizer: torch.optim.Optimizer | None

    @property
    def learners(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What learns, with its optimizer."""
        found: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
            "policy": (self.policy, self.policy_optimizer)
        }
        if self.critic is not None and self.critic_optimizer is not None:
            found["critic"] = (self.critic, self.critic_optimizer)
        return found

    def groups(self, *, warming_up: bool) -> list[tuple[str, ...]]:
        """Who steps together: policy and critic where the critic is a head on the policy's trunk, else each alone."""
        names = tuple(name for name in self.learners if name == "critic" or not warming_up)
        shared = isinstance(self.critic, ValueHead) and not self.critic.owns_trunk
        return [names] if shared else [(name,) for name in names]

    def modules_of(self, name: str) -> tuple[nn.Module, nn.Module]:
        """A learner and the trunk that it sits on, which may be the policy's."""
        model = self.learners[name][0]
        return model, _trunk(model)

    def forget_gradients(self) -> None:
        """Also those that a critic's head left in a trunk that does not learn now."""
        for _, optimizer in self.learners.values():
            optimizer.zero_grad()

    def forget_moments(self) -> None:
        """Start the optimizers anew."""
        for _, optimizer in self.learners.values():
            optimizer.state.clear()


@dataclass
class Progress:
    """What changes from update to update besides the weights."""

    kl_coef: float
    """β as it is now."""
    update: int = 0
    """Updates done; prompts and randomness follow from it."""
    moments: Moments = field(default_factory=Moments)
    """Of all scores so far, where they are normalised."""
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each update since the last checkpoint."""
    best: tuple[int, float] | None = None
    """Update and mean reward of the best checkpoint."""

    @property
    def reward(self) -> float:
        """Mean reward since the last checkpoint."""
        return sum(self.rewards) / len(self.rewards)


def load_actors(
    config: RLConfig,
    *,
    init: Checkpoint,
    critic_init: Checkpoint,
    anchor: Anchor[Checkpoint],
    pad_id: int,
    seed: int,
) -> Actors:
    """Load policy, critic and reference, with adapters where `config.lora` says so."""
    policy = models.load_policy(init.path)
    shared = {}
    if config.lora is not None:
        policy.requires_grad_(False)
        if not anchor.moves:
            shared[init.digest] = shared_copy(policy)
    reference = Reference(anchor, shared)
    critic: nn.Module | None = None
    if config.algorithm == "ppo":
        critic = _critic(config, policy, critic_init, pad_id, seed)
    critic_optimizer = None
    if critic is not None:
        rate = config.critic_learning_rate or config.learning_rate
        critic_optimizer = _optimizer(critic, rate)
    if config.lora is not None:
        add_adapters(policy, config.lora, seed=seed)
    return Actors(
        policy,
        reference,
        _optimizer(policy, config.learning_rate),
        critic,
        critic_optimizer,
    )


def save_actors(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, init: Checkpoint, directory: Path
) -> None:
    """Write the policy, with `critic/` and a moving anchor's `reference/` beside it; adapters are merged."""
    policy = actors.policy
    if any(".lora_" in name for name, _ in policy.named_parameters()):
        policy = models.load_policy(init.path)
        copy_effective(actors.policy, policy)
    models.save(policy, tokenizer, directory)
    actors.reference.save(tokenizer, directory / "reference")
    if isinstance(actors.critic, ValueHead):
        _save_value_head(actors.critic, tokenizer, init, directory / "critic")
    elif actors.critic is not None:
        actors.critic.save_pretrained(directory / "critic")  # type: ignore[operator]


def save_progress(actors: Actors, progress: Progress, directory: Path, *, keep_last: int) -> None:
    """Write a resume state; drop those that neither are new nor the best.

    Raises:
        WorkFailed: a weight is no longer finite.
    """
    if progress.best is None or progress.reward > progress.best[1]:
        progress.best = (progress.update, progress.reward)
    progress.rewards = []
    for name, (model, _) in actors.learners.items():
        if not all(weight.isfinite().all() for weight in _trained(model).values()):
            raise WorkFailed(
                f"{directory}: the {name}'s weights hold NaN or Inf after update {progress.update}. "
                "The last checkpoint is kept; try a smaller rl.learning_rate."
            )
    state: dict[str, Any] = {"progress": vars(progress) | {"moments": tuple(progress.moments)}}
    for name, (model, optimizer) in actors.learners.items():
        state[name] = _trained(model)
        state[f"{name}_optimizer"] = optimizer.state_dict()
    state["reference"] = actors.reference.state()
    save_state(state_file(directory, progress.update), state)
    prune_states(directory, keep_last=keep_last, keep=progress.best[0])


def load_progress(actors: Actors, directory: Path, update: int | None = None) -> Progress | None:
    """Put back the state after `update`, the newest if not given; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or the reference is not the one that it was made with.
    """
    steps = saved_steps(directory) if update is None else [update]
    if not steps:
        return None
    file = state_file(directory, steps[-1])
    state = load_state(file)
    actors.reference.load_state(state["reference"], file)
    for name, (model, optimizer) in actors.learners.items():
        weights = state[name]
        with torch.no_grad():
            for key, parameter in _trained(model).items():
                parameter.copy_(weights[key])
        optimizer.load_state_dict(state[f"{name}_optimizer"])
    return Progress(**state["progress"] | {"moments": Moments(*state["progress"]["moments"])})


def _critic(
    config: RLConfig, policy: PreTrainedModel, critic_init: Checkpoint, pad_id: int, seed: int
) -> nn.Module:
    if config.critic == "head":
        return ValueHead(_trunk(policy), owns_trunk=False)
    if config.lora is None:
        return models.load_scorer(critic_init.path, pad_id=pad_id, new_head_seed=seed)
    trunk = _trunk(shared_copy(policy))
    add_adapters(trunk, config.lora, seed=seed + 1)
    return ValueHead(trunk, owns_trunk=True)


def _trunk(model: nn.Module) -> PreTrainedModel:
    return getattr(model, str(model.base_model_prefix))


def _save_value_head(
    critic: ValueHead, tokenizer: PreTrainedTokenizerBase, init: Checkpoint, directory: Path
) -> None:
    """As a sequence classifier, trunk included, so that it loads like any other critic."""
    scorer = models.load_scorer(
        init.path, pad_id=int(tokenizer.pad_token_id), new_head_seed=0
    ).requires_grad_(False)
    copy_effective(critic.trunk, _trunk(scorer))
    scorer.get_submodule("score").weight.copy_(critic.score.weight)  # type: ignore[operator]
    models.save(scorer, tokenizer, directory)


def _optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    parameters = _trained(model).values()
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
