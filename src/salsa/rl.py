"""KL-anchored PPO, as an outline: collect_rollout → compute_experience → update.

    L(π) = −R(x, y) + β·KL(π(y|x) ‖ π_reference(y|x))        (SALSA; plain PPO where the reference is one SFT model)

The KL penalty is part of the per-token reward, the critic is a model of its own, advantages are whitened over the
batch. What an update draws depends on (seed, update) only, so k updates + kill + resume equal a straight run, bit for
bit on a CPU. Old logprobs are recomputed by the very forward pass that scores the reference: equal weights give a KL
of exactly 0.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa import models, objectives
from salsa.artifacts import Checkpoint
from salsa.config import RLConfig
from salsa.data import Prompt, collate
from salsa.errors import CheckpointError, WorkFailed
from salsa.reward import Scorer
from salsa.runtime.checkpoint import load_state, save_state
from salsa.runtime.generation import generate
from salsa.runtime.local import autocast, device, seed_everything
from salsa.runtime.tracking import tracker
from salsa.types import Experience, Rollout, Sampling, UpdateStats, rows_of

SHOWN = ("score", "kl", "length", "tokens_per_second")


@dataclass
class Actors:
    """The models of one run, all without dropout. Policy and critic learn; the reference stands still."""

    policy: PreTrainedModel
    critic: PreTrainedModel
    reference: PreTrainedModel
    policy_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class RLJob:
    """One RL run: an arm and a seed."""

    label: str
    init: Checkpoint
    reference: Checkpoint
    critic_init: Checkpoint
    """A sequence classifier (the reward model), or a language model whose trunk gets a new head."""
    config: RLConfig
    prompts: Sequence[Prompt]
    reward: Scorer
    seed: int
    precision: str = "auto"
    monitors: Mapping[str, Scorer] = field(default_factory=dict)
    """Further scores to log, e.g. `gold`; they do not train anything."""


def train_rl(job: RLJob, directory: Path) -> None:
    """Train the policy and write it to `directory`; resumable.

    Raises:
        CheckpointError: init and reference do not share a vocabulary, or the reference changed since the last
            checkpoint.
        WorkFailed: a reward failed, or a loss is no longer finite.
    """
    config, state_file = job.config, directory / "resume" / "state.pt"
    tokenizer = models.load_tokenizer(job.init.path)
    sampling = models.sampling(
        job.init.path,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        precision=job.precision,
    )
    _require_same_vocabulary(job)
    job.reference.verify()
    actors = _load_actors(job, sampling.pad_id)
    first = _restore(actors, state_file, job.reference)
    with tracker(directory, job.label, config.num_updates, SHOWN) as log:
        log.resume_at(first)
        for update in range(first, config.num_updates):
            clock = [time.perf_counter()]
            generator = seed_everything(job.seed, update)
            prompts = _draw(job.prompts, config.rollout_size, job.seed, update)
            rollout = collect_rollout(actors.policy, prompts, sampling, generator)
            clock.append(time.perf_counter())
            experience, figures = compute_experience(
                actors, rollout, prompts, job, tokenizer, sampling
            )
            clock.append(time.perf_counter())
            stats = update_models(actors, experience, config, update, job.precision)
            clock.append(time.perf_counter())
            _require_finite(job.label, update, stats)
            log.log(update + 1, figures | asdict(stats) | _timings(clock, rollout))
            if (update + 1) % config.checkpoint_every == 0 and update + 1 < config.num_updates:
                _save(actors, state_file, update + 1, job.reference)
    models.save(actors.policy, tokenizer, directory)
    actors.critic.save_pretrained(directory / "critic")


def collect_rollout(
    policy: PreTrainedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    generator: torch.Generator,
) -> Rollout:
    """Sample one response per prompt."""
    batch = collate(prompts, sampling.pad_id)
    prompt, prompt_mask = batch.prompt.to(device()), batch.prompt_mask.to(device())
    with autocast(sampling.precision):
        response, response_mask = generate(
            policy,
            prompt,
            prompt_mask,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            eos_ids=sampling.eos_ids,
            pad_id=sampling.pad_id,
            generator=generator,
        )
    return Rollout(prompt, prompt_mask, response, response_mask)


@torch.no_grad()
def compute_experience(
    actors: Actors,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    job: RLJob,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> tuple[Experience, dict[str, float]]:
    """Logprobs, values, scores, rewards and advantages of a rollout, and what is worth logging of them."""
    config, mask = job.config, rollout.response_mask
    logprobs, entropy, ref_logprobs, values = _forward(actors, rollout, config, job.precision)
    texts = decode(rollout, tokenizer)
    ended = has_ended(rollout, sampling.eos_ids)
    raw_scores = torch.tensor(job.reward(prompts, texts), device=mask.device)
    scores = raw_scores - config.missing_eos_penalty * (~ended)
    rewards = objectives.token_rewards(
        scores, logprobs, ref_logprobs, mask, kl_coef=config.kl_coef, kl_kind=config.kl_kind
    )
    advantages, returns = objectives.gae(
        rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    experience = Experience(
        rollout,
        logprobs,
        ref_logprobs,
        values,
        scores,
        rewards,
        objectives.whiten(advantages, mask),
        returns,
    )
    figures = {
        "score": raw_scores.mean().item(),
        "score_std": raw_scores.std(correction=0).item(),
        "reward": rewards.sum(dim=1).mean().item(),
        "kl": objectives.kl_estimate(logprobs, ref_logprobs, "k1").sum(dim=1).mean().item(),
        "entropy": objectives.masked_mean(entropy, mask).item(),
        "length": rollout.lengths.float().mean().item(),
        "eos_rate": ended.float().mean().item(),
        "value": objectives.masked_mean(values, mask).item(),
        "explained_variance": _explained_variance(values[mask], returns[mask]),
    }
    for name, monitor in job.monitors.items():
        figures[name] = sum(monitor(prompts, texts)) / len(texts)
    return experience, figures


def update_models(
    actors: Actors, experience: Experience, config: RLConfig, update: int, precision: str
) -> UpdateStats:
    """`num_epochs` passes in shuffled minibatches; each steps policy and critic once."""
    decay = 1 - update / config.num_updates
    actors.policy_optimizer.param_groups[0]["lr"] = config.learning_rate * decay
    actors.critic_optimizer.param_groups[0]["lr"] = (
        config.critic_learning_rate or config.learning_rate
    ) * decay
    steps = []
    for _ in range(config.num_epochs):
        order = torch.randperm(len(experience)).to(experience.scores.device)
        for mb_index in order.split(config.minibatch):
            steps.append(_optimizer_step(actors, rows_of(experience, mb_index), config, precision))
    return UpdateStats(*(sum(column) / len(steps) for column in zip(*steps, strict=True)))


def _optimizer_step(
    actors: Actors, minibatch: Experience, config: RLConfig, precision: str
) -> list[float]:
    """Accumulate gradients over microbatches, weighted by their real tokens, and step both optimizers."""
    total_tokens = minibatch.rollout.response_mask.sum()
    sums = torch.zeros(6)
    for start in range(0, len(minibatch), config.microbatch):
        micro = rows_of(minibatch, slice(start, start + config.microbatch))
        mask = micro.rollout.response_mask
        share = mask.sum() / total_tokens
        with autocast(precision):
            logprobs = models.response_stats(
                actors.policy, micro.rollout, temperature=config.temperature
            ).logprobs
            values = models.response_values(actors.critic, micro.rollout)
        policy = objectives.policy_loss(
            logprobs, micro.logprobs, micro.advantages, mask, clip_range=config.clip_range
        )
        value = objectives.value_loss(
            values, micro.values, micro.returns, mask, value_clip_range=config.value_clip_range
        )
        ((policy.loss + value.loss) * share).backward()
        ratio = objectives.masked_mean((logprobs - micro.logprobs).exp(), mask)
        figures = (
            policy.loss,
            value.loss,
            policy.clip_fraction,
            value.clip_fraction,
            policy.approx_kl,
            ratio,
        )
        sums += torch.stack([figure.detach() for figure in figures]).cpu() * share.cpu()
    norms = []
    for model, optimizer in (
        (actors.policy, actors.policy_optimizer),
        (actors.critic, actors.critic_optimizer),
    ):
        norms.append(
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        )
        optimizer.step()
        optimizer.zero_grad()
    return [*sums.tolist(), *norms]


def decode(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Response texts without special tokens."""
    ids = [
        row[keep].tolist()
        for row, keep in zip(rollout.response, rollout.response_mask, strict=True)
    ]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def has_ended(rollout: Rollout, eos_ids: Sequence[int]) -> torch.Tensor:
    """Whether each response ends in EOS [B]; one that hit the length limit does not."""
    last = rollout.response.gather(1, (rollout.lengths - 1)[:, None]).squeeze(1)
    return torch.isin(last, torch.tensor(list(eos_ids), device=last.device))


def _forward(
    actors: Actors, rollout: Rollout, config: RLConfig, precision: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs and entropy of the policy, logprobs of the reference, values: each [B, R]."""
    parts = []
    for start in range(0, len(rollout), config.microbatch):
        micro = rows_of(rollout, slice(start, start + config.microbatch))
        with autocast(precision):
            own = models.response_stats(actors.policy, micro, temperature=config.temperature)
            ref = models.response_stats(actors.reference, micro, temperature=config.temperature)
            parts.append(
                (
                    own.logprobs,
                    own.entropy,
                    ref.logprobs,
                    models.response_values(actors.critic, micro),
                )
            )
    logprobs, entropy, ref_logprobs, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropy, ref_logprobs, values


def _load_actors(job: RLJob, pad_id: int) -> Actors:
    config = job.config
    policy = models.load_policy(job.init.path)
    critic = models.load_scorer(job.critic_init.path, pad_id=pad_id, new_head_seed=job.seed)
    reference = models.load_policy(job.reference.path).requires_grad_(False)
    critic_lr = config.critic_learning_rate or config.learning_rate
    return Actors(
        policy,
        critic,
        reference,
        _optimizer(policy, config.learning_rate),
        _optimizer(critic, critic_lr),
    )


def _optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )


def _draw(prompts: Sequence[Prompt], count: int, seed: int, update: int) -> list[Prompt]:
    """The update's prompts: consecutive slices of one shuffled pass after another."""
    drawn: list[Prompt] = []
    position = update * count
    while len(drawn) < count:
        epoch, start = divmod(position, len(prompts))
        order = random.Random(f"{seed}-{epoch}").sample(range(len(prompts)), len(prompts))
        chosen = order[start : start + count - len(drawn)]
        drawn += [prompts[i] for i in chosen]
        position += len(chosen)
    return drawn


def _save(actors: Actors, state_file: Path, update: int, reference: Checkpoint) -> None:
    state = {name: getattr(actors, name).state_dict() for name in _LEARNING}
    save_state(state_file, state | {"update": update, "reference": reference.digest})


def _restore(actors: Actors, state_file: Path, reference: Checkpoint) -> int:
    """Put the last checkpoint back; the number of updates it has behind it (0 if there is none)."""
    state = load_state(state_file)
    if state is None:
        return 0
    if state["reference"] != reference.digest:
        raise CheckpointError(
            f"{state_file}: was anchored to reference {state['reference'][:12]}, now it is {reference.digest[:12]}. "
            "Delete that directory to start this arm anew."
        )
    for name in _LEARNING:
        getattr(actors, name).load_state_dict(state[name])
    return state["update"]


_LEARNING = ("policy", "critic", "policy_optimizer", "critic_optimizer")


def _require_same_vocabulary(job: RLJob) -> None:
    for name, checkpoint in (("reference", job.reference), ("critic", job.critic_init)):
        if not models.same_vocabulary(job.init.path, checkpoint.path):
            raise CheckpointError(
                f"{job.label}: the {name}'s tokenizer is not the policy's. Use models of one family."
            )


def _require_finite(label: str, update: int, stats: UpdateStats) -> None:
    for name, value in asdict(stats).items():
        if not math.isfinite(value):
            raise WorkFailed(
                f"{label}: {name} is {value} at update {update + 1}. The last checkpoint is kept; "
                "try a smaller rl.learning_rate or rl.kl_coef."
            )


def _explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 − Var(returns − values) / Var(returns); 0 where the returns do not vary."""
    variance = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / variance).item() if variance > 0 else 0.0


def _timings(clock: Sequence[float], rollout: Rollout) -> dict[str, float]:
    phases = {
        f"seconds_{name}": stop - start
        for name, start, stop in zip(
            ("rollout", "experience", "update"), clock, clock[1:], strict=False
        )
    }
    return phases | {"tokens_per_second": int(rollout.lengths.sum()) / (clock[-1] - clock[0])}
