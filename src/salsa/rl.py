"""Policy optimisation with a KL penalty, as an outline: collect_rollout → compute_experience → update.

    L(π) = −R(x, y) + β·KL(π(y|x) ‖ π_reference(y|x))        (SALSA; plain PPO where the reference is one SFT model)

PPO, RLOO and GRPO are one loop: only `objectives.estimate_advantages` differs. The KL penalty is part of the per-token
reward, or a term of the loss. What an update draws depends on (seed, update) only, so k updates + kill + resume equal a
straight run, bit for bit on a CPU. Old logprobs are recomputed, in the arithmetic that scores the reference: equal
weights give a KL of exactly 0.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from salsa import objectives
from salsa.alarms import Alarms
from salsa.artifacts import Checkpoint
from salsa.config import RLConfig, Select
from salsa.data import Prompt, draw_prompts
from salsa.errors import WorkFailed
from salsa.models import LanguageModel, ValueModel
from salsa.objectives import Moments
from salsa.rewards import begin
from salsa.rl_models import (
    PolicySampler,
    Progress,
    RLModels,
    RLSetup,
    load,
    load_progress,
    save_models,
    save_progress,
)
from salsa.runtime.engine import Engine
from salsa.runtime.meter import Meter, Work, forward_flops
from salsa.runtime.packing import num_distinct, packs_of
from salsa.runtime.tracking import say, tracker
from salsa.trace import write_trace
from salsa.types import Experience, Generation, Rollout, UpdateStats, rows_of

SHOWN = ("score", "kl", "length", "tokens_per_second_rollout")


def train_rl(setup: RLSetup, directory: Path, engine: Engine | None = None) -> None:
    """Train the policy and write it to `directory`, with its critic; resumable.

    Raises:
        CheckpointError: the models do not share a vocabulary, or the reference changed since the last checkpoint.
        WorkFailed: a reward failed, a loss is no longer finite, or the sampler held other weights.
    """
    engine = engine or Engine.create()
    config, states = setup.config, directory / "resume"
    models, source = load(setup, engine)
    progress = load_progress(models, states) or Progress(config.kl_coef * setup.rule.pulls)
    with tracker(directory, setup.label, config.num_updates, SHOWN, writes=engine.is_main) as log:
        log.resume_at(progress.update)
        alarms = Alarms(setup.monitors, log.rows())
        for number in range(progress.update, config.num_updates):
            if reason := stop_reason(progress, config):
                say(f"{setup.label}: stops after update {number}: {reason}")
                break
            meter = Meter(engine)
            generator = engine.generator(setup.seed, number)
            prompts = draw_prompts(
                setup.prompts, config.rollout_size, config.group_size, setup.seed, number
            )
            generation = collect_rollout(models.policy, source, prompts, generator)
            rollout = generation.rollout
            meter.phase_done("rollout")
            experience, metrics, moments = compute_experience(
                models, rollout, prompts, setup, source, progress
            )
            metrics["sampler_gap"] = sampler_gap(generation, experience)
            _require_finite(setup.label, number, metrics)
            last = may_be_last(progress, config, metrics["kl"])
            if number % config.monitor_kl_every == 0 or last:
                metrics |= measure_kl(models, experience, setup, engine)
            if number == 0 or last:
                trace = partial(write_trace, directory, number + 1, experience, generation.logprobs)
                engine.from_main(trace)
            meter.phase_done("experience")
            stats = update(models, experience, setup, progress, generator, engine)
            meter.phase_done("update")
            _require_finite(setup.label, number, stats.metrics)
            row = metrics | stats.metrics | meter.metrics(_work(models, rollout, config))
            log.log(number + 1, row)
            if messages := alarms.observe(row | {"step": number + 1}):
                log.write("alarms.log", "\n".join(alarms.raised.values()) + "\n")
                say("\n".join(f"{setup.label}: {message}" for message in messages))
            progress = advance(models, replace(progress, moments=moments), config, metrics)
            due = progress.update % config.checkpoint_every == 0
            if due and progress.update < config.num_updates:
                progress = save_progress(
                    models, progress, states, keep_last=config.keep_checkpoints,
                    keep_best=config.select != "last", within=config.selection.kl,
                )  # fmt: skip
        if config.select != "last":
            _return_to_best(models, progress, states, setup.label, config.selection)
    save_models(models, source.tokenizer, setup.init, directory)


def collect_rollout(
    policy: LanguageModel,
    source: PolicySampler,
    prompts: Sequence[Prompt],
    generator: torch.Generator,
) -> Generation:
    """Sample one response per prompt from the policy as it is now.

    Raises:
        WorkFailed: the sampler holds other weights than the policy.
    """
    ids = [prompt.ids for prompt in prompts]
    generation = source.sampler.generate(ids, source.sampling, generator)
    if generation.version != (version := policy.version()):
        raise WorkFailed(
            f"the sampler held weights {generation.version[:12]}, the policy has {version[:12]}: its samples are "
            "stale and would bias every ratio. Push the policy's weights to the sampler after every update."
        )
    return generation


def sampler_gap(generation: Generation, experience: Experience) -> float:
    """Mean over tokens of |log π of the sampler − log π of the trainer|, in nats: rounding, if they agree."""
    gap = (generation.logprobs - experience.logprobs).abs()
    return objectives.masked_mean(gap, experience.rollout.response_mask).item()


@torch.no_grad()
def compute_experience(
    models: RLModels,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    setup: RLSetup,
    source: PolicySampler,
    progress: Progress,
) -> tuple[Experience, dict[str, float], Moments]:
    """Logprobs, values, scores, rewards and advantages of a rollout; their metrics; the scores' moments from now on."""
    config, mask = setup.config, rollout.response_mask
    texts = rollout.texts(source.tokenizer)
    engine = models.policy.engine
    begin_all = lambda scorers: {n: begin(s, prompts, texts, engine) for n, s in scorers.items()}
    pending, watched = begin_all(setup.rewards), begin_all(setup.monitors)
    logprobs, entropy, ref_logprobs, values = _forward(models, rollout, config)
    ended = rollout.ended(source.sampling.eos_ids)
    parts = {
        name: torch.tensor(scores(), dtype=torch.float32, device=mask.device)
        for name, scores in pending.items()
    }
    raw_scores = torch.stack(list(parts.values())).sum(dim=0)
    scores, moments = objectives.shape_scores(
        raw_scores, ended, progress.moments, normalize=config.normalize_scores,
        score_clip=config.score_clip, missing_eos_penalty=config.missing_eos_penalty,
    )  # fmt: skip
    kl_coef = progress.kl_coef if config.kl_in == "reward" else 0.0
    rewards = objectives.token_rewards(
        scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef, kl_kind=config.kl_kind
    )
    advantages, returns = objectives.estimate_advantages(
        rewards, values, mask, algorithm=config.algorithm, gamma=config.gamma,
        gae_lambda=config.gae_lambda, group_size=config.group_size,
    )  # fmt: skip
    weights, mismatch = _importance(rollout, logprobs, config)
    experience = Experience(
        rollout, logprobs, ref_logprobs, values, scores, rewards, advantages, returns, weights
    )
    metrics = _metrics(experience, raw_scores, ended, entropy, progress.kl_coef) | mismatch
    if models.critic is not None:
        metrics["value"] = objectives.masked_mean(values, mask).item()
        metrics["explained_variance"] = objectives.explained_variance(values, returns, mask)
    if len(parts) > 1:
        metrics |= {f"score_{name}": part.mean().item() for name, part in parts.items()}
    metrics |= {name: sum(scores()) / len(texts) for name, scores in watched.items()}
    return experience, metrics, moments


def _metrics(
    experience: Experience, scores: Tensor, ended: Tensor, entropy: Tensor, kl_coef: float
) -> dict[str, float]:
    """What is logged of every rollout, with or without a critic (docs/metrics.md)."""
    rollout = experience.rollout
    kl = objectives.kl_estimate(experience.logprobs, experience.ref_logprobs, "k1").sum(dim=1)
    return {
        "score": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "reward": experience.rewards.sum(dim=1).mean().item(),
        "kl": kl.mean().item(),
        "kl_stderr": kl.std(correction=0).item() / math.sqrt(len(kl)),
        "kl_coef": kl_coef,
        "entropy": objectives.masked_mean(entropy, rollout.response_mask).item(),
        "length": rollout.lengths.float().mean().item(),
        "eos_rate": ended.float().mean().item(),
    }


def _importance(
    rollout: Rollout, logprobs: Tensor, config: RLConfig
) -> tuple[Tensor | None, dict[str, float]]:
    """Importance weights for what a sampler with other numerics drew, and how large that mismatch is; else nothing."""
    if rollout.sampler_logprobs is None or config.vllm is None:
        return None, {}
    theirs, mask, cap = rollout.sampler_logprobs, rollout.response_mask, config.vllm.importance_cap
    weights = objectives.importance_weights(logprobs, theirs, mask, cap=cap)
    kl = objectives.kl_estimate(theirs, logprobs, "k3")
    return weights, {
        "sampler_kl": objectives.masked_mean(kl, mask).item(),
        "sampler_logprob_gap": (logprobs - theirs)[mask].abs().max().item(),
        "importance_weight": objectives.masked_mean(weights, mask).item(),
        "importance_capped": objectives.masked_mean((weights == cap).float(), mask).item(),
    }


def measure_kl(
    models: RLModels, experience: Experience, setup: RLSetup, engine: Engine
) -> dict[str, float]:
    """KL of the rollout's policy to every model of `setup.kl_to`, in nats per response; one more model in memory."""
    metrics = {}
    for name, checkpoint in setup.kl_to.items():
        theirs = _logprobs_under(checkpoint, models, experience.rollout, setup.config, engine)
        kl = objectives.kl_estimate(experience.logprobs, theirs, "k1").sum(dim=1)
        metrics[f"kl_to_{name}"] = kl.mean().item()
    return metrics


@torch.no_grad()
def _logprobs_under(
    checkpoint: Checkpoint, models: RLModels, rollout: Rollout, config: RLConfig, engine: Engine
) -> Tensor:
    """Logprobs [B, R] of the responses under a model, which is in memory no longer than that."""
    if (model := models.reference.by_digest.get(checkpoint.digest)) is None:
        model = LanguageModel.load(checkpoint.path, engine)
        engine.shard(model)

    def of(micro: Rollout) -> list[Tensor]:
        return [model.logprobs(micro, config.temperature)]

    (theirs,) = _of_every_row(rollout, config, engine, of)
    return theirs


def update(
    models: RLModels,
    experience: Experience,
    setup: RLSetup,
    progress: Progress,
    generator: torch.Generator,
    engine: Engine,
) -> UpdateStats:
    """`num_epochs` passes in shuffled minibatches; each steps policy and critic once."""
    config = setup.config
    _decay_learning_rates(models, config, progress.update)
    steps = []
    for epoch, minibatch in minibatches(experience, config, generator):
        metrics: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        for group in models.groups(warming_up=progress.update < config.critic_warmup):
            for micro, share in microbatches(minibatch, config, engine):
                found = []
                if "policy" in group:
                    kl_coef = progress.kl_coef
                    found.append(_policy_losses(models.policy, micro, config, kl_coef, epoch))
                if "critic" in group and models.critic is not None:
                    found.append(_value_losses(models.critic, micro, config))
                (sum(loss for loss, _ in found) * share).backward()
                for name, part in chain.from_iterable(parts.items() for _, parts in found):
                    metrics[name] = metrics.get(name, 0) + part.detach() * share
            for name in group:
                norm = models.learners[name].step(config.max_grad_norm)
                norms["grad_norm" if name == "policy" else "critic_grad_norm"] = norm.item()
            models.zero_grad()
        models.reference.after_step(models.policy)
        totals = engine.sum(torch.stack(list(metrics.values()))).tolist()
        steps.append(dict(zip(metrics, totals, strict=True)) | norms)
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return UpdateStats(**means)


def _policy_losses(
    policy: LanguageModel, micro: Experience, config: RLConfig, kl_coef: float, epoch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the policy minimises: the clipped loss, with entropy bonus and KL where asked for; its parts by metric."""
    rollout, mask = micro.rollout, micro.rollout.response_mask
    losses: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    if config.entropy_coef:
        logprobs, entropy = policy.logprobs_and_entropy(rollout, config.temperature)
        parts["entropy_loss"] = objectives.entropy_loss(entropy, mask)
        losses.append(config.entropy_coef * parts["entropy_loss"])
    else:
        logprobs = policy.logprobs(rollout, config.temperature)
    clipped = objectives.policy_loss(
        logprobs, micro.logprobs, micro.advantages, mask,
        clip_range=config.clip_range, weights=micro.weights,
    )  # fmt: skip
    losses.append(clipped.loss)
    parts |= {
        "policy_loss": clipped.loss, "clip_fraction": clipped.clip_fraction,
        "approx_kl": clipped.approx_kl, "ratio": clipped.ratio,
    }  # fmt: skip
    if config.kl_in == "loss":
        parts["kl_loss"] = objectives.kl_loss(
            logprobs, micro.logprobs, micro.ref_logprobs, mask, kl_kind=config.kl_kind,
            importance=config.weighs_kl(epoch), weights=micro.weights,
        )  # fmt: skip
        losses.append(kl_coef * parts["kl_loss"])
    return sum(losses[1:], start=losses[0]), parts


def _value_losses(
    critic: ValueModel, micro: Experience, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the critic minimises, and its parts by metric."""
    value = objectives.value_loss(
        critic.values(micro.rollout), micro.values, micro.returns, micro.rollout.response_mask,
        value_clip_range=config.value_clip_range,
    )  # fmt: skip
    parts = {"value_loss": value.loss, "value_clip_fraction": value.clip_fraction}
    return config.value_weight * value.loss, parts


def minibatches(
    experience: Experience, config: RLConfig, generator: torch.Generator
) -> Iterator[tuple[int, Experience]]:
    """(pass, minibatch) of `num_epochs` shuffled passes over the rollout."""
    for epoch in range(config.num_epochs):
        order = torch.randperm(len(experience), generator=generator, device=generator.device)
        for index in order.split(config.minibatch):
            yield epoch, rows_of(experience, index)


def microbatches(
    minibatch: Experience, config: RLConfig, engine: Engine
) -> Iterator[tuple[Experience, Tensor]]:
    """What one forward pass of this process takes, and its share of the minibatch's real tokens."""
    total_tokens = minibatch.rollout.response_mask.sum()
    for index, counts in packs(minibatch.rollout, config, engine):
        micro = rows_of(minibatch, index)
        yield micro, counts * micro.rollout.response_mask.sum() / total_tokens


def packs(rollout: Rollout, config: RLConfig, engine: Engine) -> list[tuple[Tensor, bool]]:
    """Row numbers of each forward pass of this process, and whether it counts (`Engine.share`).

    Rows that begin alike are together, `microbatch_tokens` distinct ones at once.
    """
    packed = packs_of(rollout.rows, config.microbatch_tokens, engine.world_size)
    return engine.share([torch.tensor(pack, device=rollout.response.device) for pack in packed])


def advance(
    models: RLModels, progress: Progress, config: RLConfig, metrics: Mapping[str, float]
) -> Progress:
    """Count the update, let a resetting reference reset, and adapt β to the KL that was measured."""
    number, kl_coef = progress.update + 1, progress.kl_coef
    was_reset = models.reference.after_update(models.policy, number)
    if was_reset and models.reference.rule.reset_optimizer:
        models.reset_optimizers()
    if (rule := config.adaptive_kl) is not None:
        kl_coef = objectives.adapted_kl_coef(
            kl_coef, metrics["kl"], target=rule.target, horizon=rule.horizon,
            num_episodes=config.rollout_size,
        )  # fmt: skip
    rewards = (*progress.rewards, metrics[config.selection.metric])
    kl = metrics["kl"]
    return replace(progress, update=number, kl_coef=kl_coef, rewards=rewards, kl=kl)


def stop_reason(progress: Progress, config: RLConfig) -> str | None:
    """Why the run ends after `progress.update` updates, or None. It follows from what a checkpoint keeps."""
    if (rule := config.stop) is None:
        return None
    if rule.kl is not None and progress.kl > rule.kl:
        return f"its KL {progress.kl:.4g} is above rl.stop.kl={rule.kl:g}"
    if rule.patience is not None and progress.best is not None:
        update, value = progress.best
        if progress.update - update >= rule.patience * config.checkpoint_every:
            name = config.selection.metric
            return (
                f"no checkpoint since update {update} is better than its mean {name} of {value:.4g}"
            )
    return None


def may_be_last(progress: Progress, config: RLConfig, kl: float) -> bool:
    """Whether the run may end with the update under way, whose rollout has this KL.

    It goes on where the checkpoint after it turns out to be the best one.
    """
    after = replace(progress, update=progress.update + 1, kl=kl)
    return after.update == config.num_updates or stop_reason(after, config) is not None


def _forward(
    models: RLModels, rollout: Rollout, config: RLConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs and entropy of the policy, logprobs of the reference, values: each [B, R]."""
    temperature = config.temperature

    def of(micro: Rollout) -> list[Tensor]:
        own = models.policy.stats(micro, temperature)
        ref_logprobs = models.reference.logprobs(
            [model.logprobs(micro, temperature) for model in models.reference.models]
        )
        values = torch.zeros_like(own.logprobs)
        if models.critic is not None:
            values = models.critic.values(micro)
        return [own.logprobs, own.entropy, ref_logprobs, values]

    logprobs, entropy, ref_logprobs, values = _of_every_row(
        rollout, config, models.policy.engine, of
    )
    return logprobs, entropy, ref_logprobs, values


def _of_every_row(
    rollout: Rollout, config: RLConfig, engine: Engine, of: Callable[[Rollout], list[Tensor]]
) -> Tensor:
    """[k, B, R]: what `of` gives for some rows, k numbers per response token, for all rows of the rollout."""
    parts, rows = [], []
    for index, counts in packs(rollout, config, engine):
        parts.append(torch.stack(of(rows_of(rollout, index))))
        rows.append(index[: len(index) * counts])
    together = torch.zeros_like(parts[0][:, :1]).repeat(1, len(rollout), 1)
    for part, own in zip(parts, rows, strict=True):
        together[:, own] = part[:, : len(own)]
    return engine.sum(together)


def _decay_learning_rates(models: RLModels, config: RLConfig, number: int) -> None:
    """Set both rates to what the schedule says of this update."""
    factor = objectives.schedule(
        config.lr_schedule, number, config.num_updates, warmup=config.lr_warmup
    )
    for optimizer in (learner.optimizer for learner in models.learners.values()):
        rate = optimizer.defaults["lr"]
        optimizer.param_groups[0]["lr"] = rate * factor


def _return_to_best(
    models: RLModels, progress: Progress, states: Path, label: str, rule: Select
) -> None:
    """Put the best checkpoint back if it was better than what came since, or that is over the KL budget."""
    over = rule.kl is not None and progress.kl > rule.kl
    if progress.best is None:
        if over:
            say(f"{label}: no checkpoint is within select.kl={rule.kl:g}: returns the last policy")
        return
    update, value = progress.best
    # right after a checkpoint there is nothing newer to compare
    since = progress.reward if progress.rewards and not over else -math.inf
    if update != progress.update and value > since:
        say(f"{label}: returns to update {update}, mean {rule.metric} {value:.4g}")
        load_progress(models, states, update)


def _require_finite(label: str, number: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise WorkFailed(
                f"{label}: {name} is {value} at update {number + 1}. The last checkpoint is kept; "
                "try a smaller rl.learning_rate or rl.kl_coef."
            )


def _work(models: RLModels, rollout: Rollout, config: RLConfig) -> dict[str, Work]:
    """What each phase has to compute: forward passes of distinct tokens, and thrice that where gradients are needed."""
    rows, tokens, response = rollout.rows, int(rollout.mask.sum()), int(rollout.lengths.sum())
    packed = packs_of(rows, config.microbatch_tokens, models.policy.engine.world_size)
    distinct = sum(num_distinct([rows[row] for row in pack]) for pack in packed)
    policy = forward_flops(models.policy, distinct, response)
    critic = forward_flops(models.critic, distinct, 0) if models.critic is not None else 0.0
    experience = policy * (1 + len(models.reference.models)) + critic
    return {
        "rollout": Work(response, policy),
        "experience": Work(tokens, experience),
        "update": Work(tokens * config.num_epochs, 3 * config.num_epochs * (policy + critic)),
    }
