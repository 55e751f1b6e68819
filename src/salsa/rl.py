"""KL-anchored policy optimization, as an outline: collect_rollout → compute_experience → update_models.

    L(π) = −R(x, y) + β·KL(π(y|x) ‖ π_reference(y|x))        (SALSA; plain PPO where the reference is one SFT model)

PPO, RLOO and GRPO are one loop: only `estimate_advantages` differs. The KL penalty is part of the per-token reward, or
a term of the loss. What an update draws depends on (seed, update) only, so k updates + kill + resume equal a straight
run, bit for bit on a CPU. Old logprobs are recomputed by the very forward pass that scores the reference: equal weights
give a KL of exactly 0.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa import models, objectives
from salsa.actors import (
    Actors,
    Progress,
    load_actors,
    load_progress,
    save_actors,
    save_progress,
)
from salsa.alarms import Alarms
from salsa.artifacts import Checkpoint, read_jsonl, write_atomic
from salsa.config import RLConfig
from salsa.data import Prompt, collate, draw_prompts
from salsa.errors import CheckpointError, WorkFailed
from salsa.expressions import Anchor
from salsa.reward_functions import Scorer, begin
from salsa.runtime.generation import generate
from salsa.runtime.local import computing, device, freeze, seed_everything
from salsa.runtime.meter import Meter, Work, forward_flops
from salsa.runtime.packing import num_distinct, packs_of, recomputing
from salsa.runtime.tracking import say, tracker
from salsa.types import Experience, Rollout, Sampling, UpdateStats, rows_of

SHOWN = ("score", "kl", "length", "tokens_per_second_rollout")


@dataclass(frozen=True)
class RLJob:
    """One RL run: an arm and a seed."""

    label: str
    init: Checkpoint
    reference: Checkpoint | Anchor[Checkpoint]
    """What the KL pulls towards; a bare checkpoint is an anchor that stands still."""
    critic_init: Checkpoint
    """A sequence classifier (the reward model), or a language model whose trunk gets a new head."""
    config: RLConfig
    prompts: Sequence[Prompt]
    reward: Scorer | Mapping[str, Scorer]
    """What is maximised; of several, by name, the sum, and each is logged."""
    seed: int
    precision: str = "auto"
    monitors: Mapping[str, Scorer] = field(default_factory=dict)
    """Further scores to log, e.g. `gold`; they do not train anything."""
    kl_to: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Name → model whose KL is logged every `monitor_kl_every` updates: the ingredients and the base."""

    @property
    def rewards(self) -> Mapping[str, Scorer]:
        """The rewards by name."""
        return {"reward": self.reward} if callable(self.reward) else self.reward

    @property
    def anchor(self) -> Anchor[Checkpoint]:
        """The reference as an anchor."""
        return self.reference if isinstance(self.reference, Anchor) else Anchor((self.reference,))


def train_rl(job: RLJob, directory: Path) -> None:
    """Train the policy and write it to `directory`, with its critic; resumable.

    Raises:
        CheckpointError: the models do not share a vocabulary, or the reference changed since the last checkpoint.
        WorkFailed: a reward failed, or a loss is no longer finite.
    """
    config, states = job.config, directory / "resume"
    actors, tokenizer, sampling = load(job)
    progress = load_progress(actors, states) or Progress(config.kl_coef * job.anchor.pulls)
    with tracker(directory, job.label, config.num_updates, SHOWN) as log:
        log.resume_at(progress.update)
        alarms = Alarms(job.monitors, read_jsonl(log.file))
        for update in range(progress.update, config.num_updates):
            meter = Meter()
            generator = seed_everything(job.seed, update)
            prompts = draw_prompts(
                job.prompts, config.rollout_size, config.group_size, job.seed, update
            )
            rollout = collect_rollout(actors.policy, prompts, sampling, generator)
            meter.phase_done("rollout")
            experience, figures = compute_experience(
                actors, rollout, prompts, job, tokenizer, sampling, progress
            )
            _require_finite(job.label, update, figures)
            if update % config.monitor_kl_every == 0 or update + 1 == config.num_updates:
                figures |= measure_kl(actors, experience, job)
            meter.phase_done("experience")
            stats = update_models(actors, experience, job, progress, generator)
            meter.phase_done("update")
            _require_finite(job.label, update, stats.figures)
            speed = meter.figures(_work(actors, rollout, config), job.precision)
            row = figures | stats.figures | speed
            log.log(update + 1, row)
            if messages := alarms.observe(row | {"step": update + 1}):
                write_atomic(directory / "alarms.log", "\n".join(alarms.raised.values()) + "\n")
                say("\n".join(f"{job.label}: {message}" for message in messages))
            advance(actors, progress, config, figures)
            if (
                progress.update % config.checkpoint_every == 0
                and progress.update < config.num_updates
            ):
                save_progress(actors, progress, states, keep_last=config.keep_checkpoints)
    if config.select == "best":
        _return_to_best(actors, progress, states, job.label)
    save_actors(actors, tokenizer, job.init, directory)


def collect_rollout(
    policy: PreTrainedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    generator: torch.Generator,
) -> Rollout:
    """Sample one response per prompt."""
    batch = collate(prompts, sampling.pad_id)
    prompt, prompt_mask = batch.prompt.to(device()), batch.prompt_mask.to(device())
    with computing(sampling.precision, policy):
        said = generate(
            policy,
            prompt,
            prompt_mask,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            eos_ids=sampling.eos_ids,
            pad_id=sampling.pad_id,
            generator=generator,
        )
    return Rollout(prompt, prompt_mask, said.response, said.response_mask)


@torch.no_grad()
def compute_experience(
    actors: Actors,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    job: RLJob,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    progress: Progress,
) -> tuple[Experience, dict[str, float]]:
    """Logprobs, values, scores, rewards and advantages of a rollout, and what is worth logging of them."""
    config, mask = job.config, rollout.response_mask
    texts = decode(rollout, tokenizer)
    pending = {name: begin(scorer, prompts, texts) for name, scorer in job.rewards.items()}
    logprobs, entropy, ref_logprobs, values = _forward(actors, rollout, job)
    ended = has_ended(rollout, sampling.eos_ids)
    parts = {
        name: torch.tensor(scores(), dtype=torch.float32, device=mask.device)
        for name, scores in pending.items()
    }
    raw_scores = torch.stack(list(parts.values())).sum(dim=0)
    scores = shape_scores(raw_scores, ended, config, progress)
    rewards = objectives.token_rewards(
        scores,
        logprobs,
        ref_logprobs,
        mask,
        kl_coef=progress.kl_coef if config.kl_in == "reward" else 0.0,
        kl_kind=config.kl_kind,
    )
    advantages, returns = estimate_advantages(rewards, values, mask, config)
    experience = Experience(
        rollout, logprobs, ref_logprobs, values, scores, rewards, advantages, returns
    )
    kl = objectives.kl_estimate(logprobs, ref_logprobs, "k1").sum(dim=1)
    figures = {
        "score": raw_scores.mean().item(),
        "score_std": raw_scores.std(correction=0).item(),
        "reward": rewards.sum(dim=1).mean().item(),
        "kl": kl.mean().item(),
        "kl_stderr": kl.std(correction=0).item() / math.sqrt(len(kl)),
        "kl_coef": progress.kl_coef,
        "entropy": objectives.masked_mean(entropy, mask).item(),
        "length": rollout.lengths.float().mean().item(),
        "eos_rate": ended.float().mean().item(),
    }
    if actors.critic is not None:
        figures["value"] = objectives.masked_mean(values, mask).item()
        figures["explained_variance"] = objectives.explained_variance(values, returns, mask)
    if len(parts) > 1:
        figures |= {f"score_{name}": part.mean().item() for name, part in parts.items()}
    for name, monitor in job.monitors.items():
        figures[name] = sum(monitor(prompts, texts)) / len(texts)
    return experience, figures


def shape_scores(scores: Tensor, ended: Tensor, config: RLConfig, progress: Progress) -> Tensor:
    """Normalise by the moments of all scores so far, clip, then fine responses without EOS: each [B], each optional."""
    if config.normalize_scores:
        progress.moments = objectives.updated_moments(progress.moments, scores)
        scores = (scores - progress.moments.mean) / progress.moments.std
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    return scores - config.missing_eos_penalty * (~ended)


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, config: RLConfig
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, R]: the one step in which PPO, RLOO and GRPO differ."""
    if config.algorithm == "ppo":
        advantages, returns = objectives.gae(
            rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        return objectives.whiten(advantages, mask), returns
    per_group = (
        objectives.rloo_advantages if config.algorithm == "rloo" else objectives.grpo_advantages
    )
    per_episode = per_group(rewards.sum(dim=1), config.group_size)
    return per_episode[:, None] * mask, torch.zeros_like(values)


@torch.no_grad()
def measure_kl(actors: Actors, experience: Experience, job: RLJob) -> dict[str, float]:
    """KL of the rollout's policy to every model of `job.kl_to`, in nats per response; one more model in memory."""
    here = {} if job.anchor.moves else actors.reference.by_digest
    figures = {}
    for name, checkpoint in job.kl_to.items():
        model = here.get(checkpoint.digest) or models.load_policy(checkpoint.path)
        order = microbatches(experience.rollout, job.config)
        with computing(job.precision, model):
            parts = [_logprobs(model, rows_of(experience.rollout, index), job) for index in order]
        theirs = torch.cat(parts)[torch.cat(order).argsort()]
        kl = objectives.kl_estimate(experience.logprobs, theirs, "k1").sum(dim=1)
        figures[f"kl_{name}"] = kl.mean().item()
    return figures


def update_models(
    actors: Actors,
    experience: Experience,
    job: RLJob,
    progress: Progress,
    generator: torch.Generator,
) -> UpdateStats:
    """`num_epochs` passes in shuffled minibatches; each steps policy and critic once."""
    config = job.config
    decay = 1 - progress.update / config.num_updates
    rates = {
        "policy": config.learning_rate,
        "critic": config.critic_learning_rate or config.learning_rate,
    }
    for name, (_, optimizer) in actors.learners.items():
        optimizer.param_groups[0]["lr"] = rates[name] * decay
    steps = []
    for _ in range(config.num_epochs):
        order = torch.randperm(len(experience), generator=generator, device=generator.device)
        for mb_index in order.split(config.minibatch):
            steps.append(_optimizer_step(actors, rows_of(experience, mb_index), job, progress))
            actors.reference.after_step(actors.policy)
    return UpdateStats(
        **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    )


def advance(
    actors: Actors, progress: Progress, config: RLConfig, figures: Mapping[str, float]
) -> None:
    """Count the update, let a resetting anchor reset, and adapt β to the KL that was measured."""
    progress.update += 1
    progress.rewards.append(figures["reward"])
    was_reset = actors.reference.after_update(actors.policy, progress.update)
    if was_reset and actors.reference.anchor.reset_optimizer:
        actors.forget_moments()
    if config.adaptive_kl is not None:
        progress.kl_coef = objectives.adapted_kl_coef(
            progress.kl_coef,
            figures["kl"],
            target=config.adaptive_kl.target,
            horizon=config.adaptive_kl.horizon,
            num_episodes=config.rollout_size,
        )


def microbatches(rollout: Rollout, config: RLConfig) -> list[Tensor]:
    """Row numbers of each forward pass: rows that begin alike together, `microbatch_tokens` distinct ones at once."""
    here = rollout.response.device
    return [
        torch.tensor(pack, device=here) for pack in packs_of(rollout.rows, config.microbatch_tokens)
    ]


def _optimizer_step(
    actors: Actors, minibatch: Experience, job: RLJob, progress: Progress
) -> dict[str, float]:
    """Step policy and critic, one after the other where they share no weights: one's gradients in memory at a time."""
    figures: dict[str, float] = {}
    for group in actors.groups(warming_up=progress.update < job.config.critic_warmup):
        figures |= _step(actors, group, minibatch, job, progress.kl_coef)
    return figures


def _step(
    actors: Actors, group: Sequence[str], minibatch: Experience, job: RLJob, kl_coef: float
) -> dict[str, float]:
    """Accumulate the group's gradients over microbatches, weighted by their real tokens, and step its optimizers."""
    total_tokens = minibatch.rollout.response_mask.sum()
    figures: dict[str, Tensor] = {}
    models_and_trunks = [actors.modules_of(name) for name in group]
    trunks = [trunk for _, trunk in models_and_trunks]
    saving = recomputing(*trunks) if job.config.gradient_checkpointing else nullcontext()
    with computing(job.precision, *chain(*models_and_trunks)), saving:
        for index in microbatches(minibatch.rollout, job.config):
            micro = rows_of(minibatch, index)
            share = micro.rollout.response_mask.sum() / total_tokens
            loss, parts = _losses(actors, group, micro, job, kl_coef)
            (loss * share).backward()
            for name, part in parts.items():
                figures[name] = figures.get(name, 0) + part.detach() * share
    for name in group:
        model, optimizer = actors.learners[name]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.config.max_grad_norm)
        figures["grad_norm" if name == "policy" else "critic_grad_norm"] = norm
        optimizer.step()
    actors.forget_gradients()
    return {name: float(value) for name, value in figures.items()}


def _losses(
    actors: Actors, group: Sequence[str], micro: Experience, job: RLJob, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The group's loss on a microbatch, and its figures."""
    terms: list[Tensor] = []
    figures: dict[str, Tensor] = {}
    if "policy" in group:
        loss, of_policy = _policy_loss(actors.policy, micro, job, kl_coef)
        terms.append(loss)
        figures |= of_policy
    if "critic" in group and actors.critic is not None:
        value = objectives.value_loss(
            models.response_values(actors.critic, micro.rollout),
            micro.values,
            micro.returns,
            micro.rollout.response_mask,
            value_clip_range=job.config.value_clip_range,
        )
        terms.append(job.config.value_weight * value.loss)
        figures |= {"value_loss": value.loss, "value_clip_fraction": value.clip_fraction}
    return torch.stack(terms).sum(), figures


def _policy_loss(
    policy: PreTrainedModel, micro: Experience, job: RLJob, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective, and β·KL where it is in the loss."""
    config, mask = job.config, micro.rollout.response_mask
    logprobs = _logprobs(policy, micro.rollout, job)
    clipped = objectives.policy_loss(
        logprobs, micro.logprobs, micro.advantages, mask, clip_range=config.clip_range
    )
    figures = {
        "policy_loss": clipped.loss,
        "clip_fraction": clipped.clip_fraction,
        "approx_kl": clipped.approx_kl,
        "ratio": objectives.masked_mean((logprobs - micro.logprobs).exp(), mask),
    }
    if config.kl_in == "reward":
        return clipped.loss, figures
    kl = objectives.kl_estimate(logprobs, micro.ref_logprobs, config.kl_kind)
    figures["kl_loss"] = objectives.masked_mean(kl, mask)
    return clipped.loss + kl_coef * figures["kl_loss"], figures


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


def _forward(actors: Actors, rollout: Rollout, job: RLJob) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs and entropy of the policy, logprobs of the reference, values: each [B, R]."""
    parts = []
    order = microbatches(rollout, job.config)
    everyone = [m for name in actors.learners for m in actors.modules_of(name)]
    with computing(job.precision, *everyone, *actors.reference.models):
        for index in order:
            micro = rows_of(rollout, index)
            own = models.response_stats(actors.policy, micro, temperature=job.config.temperature)
            ref_logprobs = actors.reference.logprobs(
                [_logprobs(model, micro, job) for model in actors.reference.models]
            )
            values = torch.zeros_like(own.logprobs)
            if actors.critic is not None:
                values = models.response_values(actors.critic, micro)
            parts.append(torch.stack([own.logprobs, own.entropy, ref_logprobs, values]))
    back = torch.cat(order).argsort()
    logprobs, entropy, ref_logprobs, values = torch.cat(parts, dim=1)[:, back]
    return logprobs, entropy, ref_logprobs, values


def _logprobs(model: PreTrainedModel, rollout: Rollout, job: RLJob) -> Tensor:
    return models.response_logprobs(model, rollout, temperature=job.config.temperature)


def load(job: RLJob) -> tuple[Actors, PreTrainedTokenizerBase, Sampling]:
    """The run's models, the policy's tokenizer and how it samples.

    Raises:
        CheckpointError: the models do not share a vocabulary, or one is not what its digest says.
    """
    named = {"critic": job.critic_init} | {
        f"reference {i}" if i else "reference": c for i, c in enumerate(job.anchor.models)
    }
    for name, checkpoint in named.items():
        if not models.same_vocabulary(job.init.path, checkpoint.path):
            raise CheckpointError(
                f"{job.label}: the {name}'s tokenizer is not the policy's. Use models of one family."
            )
    for checkpoint in job.anchor.models:
        checkpoint.verify()
    config, tokenizer = job.config, models.load_tokenizer(job.init.path)
    sampling = models.sampling(
        job.init.path,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        precision=job.precision,
    )
    actors = load_actors(
        config,
        init=job.init,
        critic_init=job.critic_init,
        anchor=job.anchor,
        pad_id=sampling.pad_id,
        seed=job.seed,
    )
    if not job.anchor.moves and config.lora is None:  # a shared base stays as exact as it is
        for model in actors.reference.models:
            freeze(model, job.precision)
    return actors, tokenizer, sampling


def _return_to_best(actors: Actors, progress: Progress, states: Path, label: str) -> None:
    """Put the best checkpoint back if it was better than what came since."""
    if progress.best is not None and progress.best[1] > progress.reward:
        say(f"{label}: returns to update {progress.best[0]}, mean reward {progress.best[1]:.4g}")
        load_progress(actors, states, progress.best[0])


def _require_finite(label: str, update: int, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise WorkFailed(
                f"{label}: {name} is {value} at update {update + 1}. The last checkpoint is kept; "
                "try a smaller rl.learning_rate or rl.kl_coef."
            )


def _work(actors: Actors, rollout: Rollout, config: RLConfig) -> dict[str, Work]:
    """What each phase has to compute: forward passes of distinct tokens, and thrice that where gradients are needed."""
    rows, tokens, response = rollout.rows, int(rollout.mask.sum()), int(rollout.lengths.sum())
    packs = packs_of(rows, config.microbatch_tokens)
    distinct = sum(num_distinct([rows[row] for row in pack]) for pack in packs)
    policy = forward_flops(actors.policy, distinct, response)
    critic = forward_flops(actors.critic, distinct, 0) if actors.critic is not None else 0.0
    experience = policy * (1 + len(actors.reference.models)) + critic
    return {
        "rollout": Work(response, policy),
        "experience": Work(tokens, experience),
        "update": Work(tokens * config.num_epochs, 3 * config.num_epochs * (policy + critic)),
    }
