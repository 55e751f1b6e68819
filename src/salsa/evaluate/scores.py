"""What a policy says on held-out prompts: its scores, its KL to other models, its lengths.

KL is the sum over a response's tokens of the exact KL between next-token distributions (`objectives.categorical_kl`),
in nats per response, averaged over responses that the policy sampled.
"""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.data import load_prompts
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.rewards import sum_of
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.tracking import round_metric, tracker
from salsa.stages.jobs import EvalJob
from salsa.types import Rollout


def evaluate_policy(job: EvalJob, directory: Path, engine: Engine) -> None:
    """Write `samples.jsonl`: a row a prompt, with the response, its scores, KLs, length and whether it ended."""
    tokenizer = load_tokenizer(job.policy.path)
    policy = LanguageModel.load(job.policy.path, engine)
    measured: dict[str, tuple[Checkpoint, ...]] = {f"to_{n}": (c,) for n, c in job.kl_to.items()}
    if job.references:
        measured["reference"] = job.references
    models = {job.policy.digest: policy}  # each is loaded once, and the policy may be one of them
    for one in chain.from_iterable(measured.values()):
        if one.digest not in models:
            models[one.digest] = LanguageModel.load(one.path, engine)
    scorers = {name: sum_of(reward.load(engine)) for name, reward in job.rewards.items()}
    limit = job.max_prompt_tokens if job.only is None else None
    prompts = load_prompts(job.prompts, tokenizer, max_tokens=limit)
    if job.only is not None:
        prompts = [prompts[number] for number in job.only]
    sampler = LocalSampler(policy)
    sampling = sampling_for(
        job.policy.path, tokenizer, max_new_tokens=job.max_new_tokens, temperature=job.temperature
    )
    generator = engine.generator(job.seed)
    rows: list[dict] = []
    shown = (*list(scorers)[:1], "length")
    with tracker(directory, job.label, -(-len(prompts) // job.batch_size), shown) as log:
        log.resume_at(0)
        for start in range(0, len(prompts), job.batch_size):
            batch = prompts[start : start + job.batch_size]
            rollout = sampler.generate([p.ids for p in batch], sampling, generator).rollout
            kl = _kl(job, measured, models, rollout)
            texts, ended = rollout.texts(tokenizer), rollout.ended(sampling.eos_ids).tolist()
            with torch.no_grad():
                columns = {name: scorer(batch, texts) for name, scorer in scorers.items()}
            columns |= {f"kl_{name}": values for name, values in kl.items()}
            new = [
                {
                    "prompt": prompt.text,
                    "response": texts[i],
                    **{name: round_metric(values[i]) for name, values in columns.items()},
                    "length": int(rollout.lengths[i]),
                    "ended": ended[i],
                }
                for i, prompt in enumerate(batch)
            ]
            rows += new
            metrics = {name: sum(row[name] for row in new) / len(new) for name in shown}
            log.log(start // job.batch_size + 1, metrics)
    write_jsonl(directory / "samples.jsonl", rows)


def _kl(
    job: EvalJob,
    measured: Mapping[str, tuple[Checkpoint, ...]],
    models: Mapping[str, LanguageModel],
    rollout: Rollout,
) -> dict[str, list[float]]:
    """Name → KL of each response; to a mixture the weighted sum of the KLs to its parts, which are named too."""
    columns: dict[str, list[float]] = {}
    policy = models[job.policy.digest]
    each = {
        digest: policy.kl_to(model, rollout, job.temperature).sum(dim=1).tolist()
        for digest, model in models.items()
        if model is not policy
    } | {job.policy.digest: [0.0] * len(rollout)}
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
