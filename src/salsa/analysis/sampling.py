"""Replies, their scores and their log-probabilities, a row a prompt; a kill loses one batch of prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from salsa.artifacts import append_jsonl, drop_half_line, read_jsonl, write_jsonl
from salsa.data import Prompt, load_prompts
from salsa.errors import ConfigError
from salsa.models import LanguageModel, load_tokenizer, same_vocabulary, sampling_for
from salsa.rewards import sum_of
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.sampler.local import left_padded
from salsa.runtime.tracking import round_metric, tracker
from salsa.stages.jobs import LogprobsJob, RepliesJob, ScoresJob
from salsa.types import Rollout

Row = dict[str, Any]

SEQUENCES = 256
"""Decoded at once: a prompt has that many replies and more, and short ones decode twice as fast as 64 at once."""


def write_replies(job: RepliesJob, directory: Path, engine: Engine) -> None:
    """`replies.jsonl`: {"prompt": token ids, "replies": [{"ids", "text", "ended", "logprob"}, …]}."""
    asked, path = job.asked, job.model.path
    tokenizer = load_tokenizer(path)
    prompts = load_prompts(asked.prompts, tokenizer, max_tokens=asked.max_prompt_tokens)
    sampler = LocalSampler(LanguageModel.load(path, engine), SEQUENCES)
    sampling = sampling_for(
        path, tokenizer, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature
    )

    def work(number: int, batch: Sequence[Prompt]) -> list[Row]:
        rows = [prompt.ids for prompt in batch for _ in range(asked.num_samples)]
        generator = engine.generator(asked.seed, number)
        generation = sampler.generate(rows, sampling, generator)
        rollout = generation.rollout
        ids = [r[m].tolist() for r, m in zip(rollout.response, rollout.response_mask, strict=True)]
        columns = {
            "ids": ids,
            "text": rollout.texts(tokenizer),
            "ended": rollout.ended(sampling.eos_ids).tolist(),
            "logprob": map(round_metric, generation.logprobs.sum(dim=1).tolist()),
        }
        replies = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        return [
            {"prompt": list(prompt.ids), "replies": own}
            for prompt, own in zip(batch, _batches(replies, asked.num_samples), strict=True)
        ]

    by_batch(directory, "replies.jsonl", job.label, prompts, asked.batch_prompts, work)


def write_scores(job: ScoresJob, directory: Path, engine: Engine) -> None:
    """`scores.jsonl`: {name: a score a reply}. Equal replies to a prompt are scored once."""
    tokenizer = load_tokenizer(job.model.path)
    prompts = load_prompts(job.asked.prompts, tokenizer, max_tokens=job.asked.max_prompt_tokens)
    rows = read_jsonl(job.replies.path / "replies.jsonl")
    scorers = {name: sum_of(reward.load(engine)) for name, reward in job.rewards.items()}

    def work(_: int, batch: Sequence[tuple[Prompt, Row]]) -> list[Row]:
        different = [
            (prompt, text)
            for prompt, row in batch
            for text in dict.fromkeys(reply["text"] for reply in row["replies"])
        ]
        shown, texts = [p for p, _ in different], [t for _, t in different]
        known = {
            name: dict(zip(((p.ids, t) for p, t in different), scorer(shown, texts), strict=True))
            for name, scorer in scorers.items()
        }
        return [
            {
                name: [round_metric(of[prompt.ids, reply["text"]]) for reply in row["replies"]]
                for name, of in known.items()
            }
            for prompt, row in batch
        ]

    pairs = list(zip(prompts, rows, strict=True))
    by_batch(directory, "scores.jsonl", job.label, pairs, 4, work)


def write_logprobs(job: LogprobsJob, directory: Path, engine: Engine) -> None:
    """`logprobs.jsonl`: {"logprobs": Σ_t log π(y_t | x, y_<t) of each reply, in nats}.

    Raises:
        ConfigError: the models differ in vocabulary, so no KL between them is defined.
    """
    if not same_vocabulary(job.author.path, job.model.path):
        raise ConfigError(
            f"{job.label}: {job.author.path} and {job.model.path} differ in vocabulary, so no KL between them is "
            "defined. Leave one of them out."
        )
    model = LanguageModel.load(job.model.path, engine)
    pad = int(load_tokenizer(job.model.path).pad_token_id)

    def work(_: int, batch: Sequence[Row]) -> list[Row]:
        return [{"logprobs": _logprobs(model, row, pad, job.temperature)} for row in batch]

    rows = read_jsonl(job.replies.path / "replies.jsonl")
    by_batch(directory, "logprobs.jsonl", job.label, rows, 1, work)


def rollout_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
) -> Rollout:
    """Token ids of prompts and responses as a rollout; masks come from lengths."""
    prompt, prompt_mask = left_padded(prompts, pad, device)
    width = max(map(len, responses))
    response = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in responses])
    lengths = torch.tensor([len(ids) for ids in responses])
    mask = torch.arange(width) < lengths[:, None]
    return Rollout(prompt, prompt_mask, response.to(device), mask.to(device))


@torch.no_grad()
def _logprobs(model: LanguageModel, row: Row, pad: int, temperature: float) -> list[float]:
    """Of each reply to one prompt; equal replies are computed once."""
    different = list(dict.fromkeys(tuple(reply["ids"]) for reply in row["replies"]))
    prompts = [row["prompt"]] * len(different)
    rollout = rollout_of(prompts, different, pad, model.engine.device)
    sums = model.logprobs(rollout, temperature).sum(dim=1).tolist()
    known = dict(zip(different, sums, strict=True))
    return [round_metric(known[tuple(reply["ids"])]) for reply in row["replies"]]


def by_batch(
    directory: Path,
    name: str,
    label: str,
    items: Sequence[Any],
    size: int,
    work: Callable[[int, Any], list[Row]],
    unit: str = "prompts",
) -> None:
    """Write `work(number, batch)` of every batch of `items` to `name`; finished batches survive a kill.

    `unit` is what the items are called in the progress.
    """
    partial = directory / "resume" / name
    partial.parent.mkdir(parents=True, exist_ok=True)
    drop_half_line(partial)
    done = len(read_jsonl(partial)) // size * size
    write_jsonl(partial, read_jsonl(partial)[:done])
    batches = _batches(items, size)
    with tracker(directory, label, len(batches), (unit,)) as log:
        log.resume_at(done // size)
        for number in range(done // size, len(batches)):
            append_jsonl(partial, work(number, batches[number]))
            log.log(number + 1, {unit: float(min((number + 1) * size, len(items)))})
    write_jsonl(directory / name, read_jsonl(partial))


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
