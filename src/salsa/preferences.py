"""Synthetic preferences: replies of the SFT models in pairs, labelled by a noisy scorer.

The labels follow Bradley and Terry: a is chosen with probability σ((score_a − score_b) / noise). They say what
the labeller likes, not what people like, and the report says so.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.special import expit

from salsa.artifacts import write_jsonl
from salsa.config import PreferencesConfig
from salsa.data import Prompt, Row, load_prompts
from salsa.errors import DataError
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.rewards import FunctionScorer
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.tracking import Tracker, tracker
from salsa.stages.jobs import PreferencesJob

BATCH = 64
"""Replies sampled at once."""


def sample_pairs(job: PreferencesJob, directory: Path, engine: Engine) -> None:
    """Write `pairs.jsonl`: prompt, chosen, rejected, and whether the noisy label agrees with the scorer.

    Raises:
        DataError: no prompt got two different replies.
    """
    config = job.config
    assert config.prompts is not None  # the schema: prompts and labeller, or a data set
    tokenizer = load_tokenizer(job.models[0].path)
    prompts = load_prompts(config.prompts, tokenizer, max_tokens=job.max_prompt_tokens)
    authors = _authors(len(job.models), len(prompts), config.seed)
    replies: list[list[str]] = [["", ""] for _ in prompts]
    with tracker(directory, job.label, _num_batches(authors), ("length",)) as log:
        log.resume_at(0)
        for number in range(len(job.models)):
            own = [
                (row, side)
                for row, pair in enumerate(authors)
                for side in (0, 1)
                if pair[side] == number
            ]
            texts = _replies(job, number, [prompts[row] for row, _ in own], log, engine)
            for (row, side), text in zip(own, texts, strict=True):
                replies[row][side] = text
    rows = label_pairs(prompts, [r[0] for r in replies], [r[1] for r in replies], config)
    if not rows:
        raise DataError("preferences: no prompt got two different replies. Give more prompts.")
    write_jsonl(directory / "pairs.jsonl", rows)


def _authors(num_models: int, num_prompts: int, seed: int) -> list[tuple[int, int]]:
    """Who writes each prompt's two replies: different models where there are several, else one model twice."""
    rng = random.Random(seed)
    if num_models == 1:
        return [(0, 0)] * num_prompts
    pairs = (rng.sample(range(num_models), 2) for _ in range(num_prompts))
    return [(first, second) for first, second in pairs]


def _num_batches(authors: Sequence[tuple[int, int]]) -> int:
    counts = Counter(author for pair in authors for author in pair)
    return sum(-(-count // BATCH) for count in counts.values())


def _replies(
    job: PreferencesJob, number: int, prompts: Sequence[Prompt], log: Tracker, engine: Engine
) -> list[str]:
    """One model's replies, a row of metrics a batch."""
    path = job.models[number].path
    tokenizer = load_tokenizer(path)
    sampler = LocalSampler(LanguageModel.load(path, engine))
    sampling = sampling_for(
        path,
        tokenizer,
        max_new_tokens=job.config.max_new_tokens,
        temperature=job.config.temperature,
    )
    generator = engine.generator(job.config.seed, number)
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = [prompt.ids for prompt in prompts[start : start + BATCH]]
        rollout = sampler.generate(batch, sampling, generator).rollout
        texts += rollout.texts(tokenizer)
        log.log(log.step + 1, {"length": rollout.lengths.float().mean().item()})
    return texts


def label_pairs(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    config: PreferencesConfig,
) -> list[Row]:
    """Noisy Bradley-Terry labels: a is chosen with probability σ((score_a − score_b) / noise).

    Pairs of equal replies teach nothing and are dropped.
    """
    assert config.labeller is not None  # the schema
    scorer = FunctionScorer([config.labeller])
    rng = random.Random(config.seed)
    rows = []
    scored = zip(
        prompts, first, second, scorer(prompts, first), scorer(prompts, second), strict=True
    )
    for prompt, a, b, score_a, score_b in scored:
        if a.strip() == b.strip():
            continue
        prefer_a = bool(rng.random() < expit((score_a - score_b) / config.noise))
        chosen, rejected = (a, b) if prefer_a else (b, a)
        agrees = bool((score_a >= score_b) == prefer_a)
        value: Any = list(prompt.messages) if prompt.messages else prompt.text
        rows.append(
            {"prompt": value, "chosen": chosen, "rejected": rejected, "label_agrees": agrees}
        )
    return rows
