"""What a policy says on held-out prompts: its scores, its KL to other models, its lengths.

KL is the sum over a response's tokens of the exact KL between next-token distributions (`objectives.categorical_kl`),
in nats per response, averaged over responses that the policy sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa import models
from salsa.artifacts import Checkpoint, write_jsonl
from salsa.data import Prompt
from salsa.reward_functions import Scorer
from salsa.rl import collect_rollout, decode, has_ended
from salsa.runtime.local import freeze, seed_everything
from salsa.runtime.tracking import round_figure, tracker
from salsa.types import Sampling


@dataclass(frozen=True)
class EvalJob:
    """One policy on the evaluation prompts."""

    label: str
    policy: Checkpoint
    kl_to: Mapping[str, Checkpoint]
    """Name → model to measure the KL to, e.g. `anchor` and `reference`."""
    prompts: Sequence[Prompt]
    scorers: Mapping[str, Scorer]
    """Name → scorer; `proxy` is the training reward."""
    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    precision: str = "auto"
    mixed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Name → weights of names in `kl_to`: the KL to a mixture is the weighted sum of the KLs to its parts."""


def evaluate_policy(job: EvalJob, directory: Path) -> None:
    """Write `samples.jsonl`: a row a prompt, with the response, its scores, KLs, length and whether it ended."""
    tokenizer = models.load_tokenizer(job.policy.path)
    policy = freeze(models.load_policy(job.policy.path), job.precision)
    others = {
        name: freeze(models.load_policy(c.path), job.precision)
        for name, c in job.kl_to.items()
        if c != job.policy
    }
    sampling = models.sampling(
        job.policy.path,
        tokenizer,
        max_new_tokens=job.max_new_tokens,
        temperature=job.temperature,
        precision=job.precision,
    )
    generator = seed_everything(job.seed)
    rows: list[dict] = []
    shown = (*list(job.scorers)[:1], "length")
    with tracker(directory, job.label, -(-len(job.prompts) // job.batch_size), shown) as log:
        log.resume_at(0)
        for start in range(0, len(job.prompts), job.batch_size):
            prompts = job.prompts[start : start + job.batch_size]
            batch = _evaluate_batch(job, policy, others, prompts, tokenizer, sampling, generator)
            rows += batch
            figures = {name: sum(row[name] for row in batch) / len(batch) for name in shown}
            log.log(start // job.batch_size + 1, figures)
    write_jsonl(directory / "samples.jsonl", rows)


@torch.no_grad()
def _evaluate_batch(
    job: EvalJob,
    policy: PreTrainedModel,
    others: Mapping[str, PreTrainedModel],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[dict]:
    """Rows of one batch of prompts."""
    rollout = collect_rollout(policy, prompts, sampling, generator)
    kl = {name: [0.0] * len(prompts) for name in job.kl_to}
    for name, model in others.items():
        per_token = models.response_kl(policy, model, rollout, temperature=job.temperature)
        kl[name] = per_token.sum(dim=1).tolist()
    for name, weights in job.mixed.items():
        kl[name] = [
            sum(w * kl[part][i] for part, w in weights.items()) for i in range(len(prompts))
        ]
    texts = decode(rollout, tokenizer)
    scores = {name: scorer(prompts, texts) for name, scorer in job.scorers.items()}
    ended = has_ended(rollout, sampling.eos_ids).tolist()
    return [
        {
            "prompt": prompt.text,
            "response": texts[i],
            **{name: round_figure(values[i]) for name, values in scores.items()},
            **{f"kl_{name}": round_figure(values[i]) for name, values in kl.items()},
            "length": int(rollout.lengths[i]),
            "ended": ended[i],
        }
        for i, prompt in enumerate(prompts)
    ]
