"""What a policy says on held-out prompts: its scores, its KL to other models, its lengths.

KL is the sum over a response's tokens of the exact KL between next-token distributions (`objectives.categorical_kl`),
in nats per response, averaged over responses that the policy sampled.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.data import Prompt, load_prompts
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.rewards import sum_of
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.tracking import round_metric, tracker
from salsa.stages.jobs import EvalJob
from salsa.types import Rollout


def evaluate_policy(job: EvalJob, directory: Path, engine: Engine) -> None:
    """Write `samples.jsonl`: a row a prompt, with the response, its scores, KLs, length and whether it ended.

    In memory at once are the policy and the reward models, then the policy, its last hidden states and one of the
    models that it is measured to.
    """
    tokenizer = load_tokenizer(job.policy.path)
    policy = LanguageModel.load(job.policy.path, engine)
    limit = job.max_prompt_tokens if job.only is None else None
    prompts = load_prompts(job.prompts, tokenizer, max_tokens=limit)
    if job.only is not None:
        prompts = [prompts[number] for number in job.only]
    rows, rollouts = _respond(job, policy, prompts, tokenizer, directory, engine)
    kl = _kl(job, policy, rollouts)
    for number, row in enumerate(rows):
        last = {name: row.pop(name) for name in ("length", "ended")}  # the order of the columns
        row |= {f"kl_{name}": round_metric(values[number]) for name, values in kl.items()} | last
    write_jsonl(directory / "samples.jsonl", rows)


def _respond(
    job: EvalJob,
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    directory: Path,
    engine: Engine,
) -> tuple[list[dict[str, Any]], list[Rollout]]:
    """A row a prompt: the response, its scores and length; and the responses as tokens, a batch each."""
    scorers = {name: sum_of(reward.load(engine)) for name, reward in job.rewards.items()}
    sampler, generator = LocalSampler(policy), engine.generator(job.seed)
    sampling = sampling_for(
        job.policy.path, tokenizer, max_new_tokens=job.max_new_tokens, temperature=job.temperature
    )
    rows: list[dict[str, Any]] = []
    rollouts: list[Rollout] = []
    shown = (*list(scorers)[:1], "length")
    with tracker(directory, job.label, -(-len(prompts) // job.batch_size), shown) as log:
        log.resume_at(0)
        for start in range(0, len(prompts), job.batch_size):
            batch = prompts[start : start + job.batch_size]
            rollout = sampler.generate([p.ids for p in batch], sampling, generator).rollout
            texts, ended = rollout.texts(tokenizer), rollout.ended(sampling.eos_ids).tolist()
            with torch.no_grad():
                scores = {name: scorer(batch, texts) for name, scorer in scorers.items()}
            new = [
                {
                    "prompt": prompt.text,
                    "response": texts[i],
                    **{name: round_metric(values[i]) for name, values in scores.items()},
                    "length": int(rollout.lengths[i]),
                    "ended": ended[i],
                }
                for i, prompt in enumerate(batch)
            ]
            rows += new
            rollouts.append(rollout)
            metrics = {name: sum(row[name] for row in new) / len(new) for name in shown}
            log.log(len(rollouts), metrics)
    return rows, rollouts


def _kl(job: EvalJob, policy: LanguageModel, rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """Name → KL of each response; to a mixture the weighted sum of the KLs to its parts, which are named too."""
    measured: dict[str, tuple[Checkpoint, ...]] = {f"to_{n}": (c,) for n, c in job.kl_to.items()}
    if job.references:
        measured["reference"] = job.references
    own, named = job.policy.digest, chain.from_iterable(measured.values())
    others = {one.digest: one for one in named if one.digest != own}
    passes = [(rollout, policy.states(rollout)) for rollout in rollouts] if others else []
    each = {own: [0.0] * sum(map(len, rollouts))}
    each |= {d: _kl_to(one, policy, passes, job.temperature) for d, one in others.items()}
    columns: dict[str, list[float]] = {}
    for name, checkpoints in measured.items():
        parts = [each[one.digest] for one in checkpoints]
        columns[name] = parts[0]
        if len(parts) > 1:
            columns |= {f"{name}[{i}]": part for i, part in enumerate(parts)}
            columns[name] = [
                sum(w * k for w, k in zip(job.reference_weights, row, strict=True))
                for row in zip(*parts, strict=True)
            ]
    return columns


def _kl_to(
    model: Checkpoint,
    policy: LanguageModel,
    passes: Sequence[tuple[Rollout, Tensor]],
    temperature: float,
) -> list[float]:
    """KL(policy ‖ model) of each response; the model is in memory no longer than that."""
    other = LanguageModel.load(model.path, policy.engine)
    kls = [policy.kl_to(other, rollout, temperature, states) for rollout, states in passes]
    return [kl for batch in kls for kl in batch.sum(dim=1).tolist()]
