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
    sides = [(row, side) for row in range(len(prompts)) for side in (0, 1)]
    counts = Counter(authors[row][side] for row, side in sides).values()
    replies: dict[tuple[int, int], str] = {}
    total = sum(-(-count // BATCH) for count in counts)
    with tracker(directory, job.label, total, ("length",)) as log:
        log.resume_at(0)
        for number in range(len(job.models)):
            own = [(row, side) for row, side in sides if authors[row][side] == number]
            texts = _replies(job, number, [prompts[row] for row, _ in own], log, engine)
            replies.update(zip(own, texts, strict=True))
    first, second = ([replies[row, side] for row in range(len(prompts))] for side in (0, 1))
    rows = label_pairs(prompts, first, second, config)
    if not rows:
        raise DataError("preferences: no prompt got two different replies. Give more prompts.")
    write_jsonl(directory / "pairs.jsonl", rows)


def _authors(num_models: int, num_prompts: int, seed: int) -> Sequence[Sequence[int]]:
    """Who writes each prompt's two replies: different models where there are several, else one model twice."""
    if num_models == 1:
        return [(0, 0)] * num_prompts
    rng = random.Random(seed)
    return [rng.sample(range(num_models), 2) for _ in range(num_prompts)]


def _replies(
    job: PreferencesJob, number: int, prompts: Sequence[Prompt], log: Tracker, engine: Engine
) -> list[str]:
    """One model's replies, a row of metrics a batch."""
    path = job.models[number].path
    tokenizer = load_tokenizer(path)
    sampler = LocalSampler(LanguageModel.load(path, engine))
    config = job.config
    longest, temperature = config.max_new_tokens, config.temperature
    sampling = sampling_for(path, tokenizer, max_new_tokens=longest, temperature=temperature)
    generator = engine.generator(config.seed, number)
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
    score = FunctionScorer([config.labeller])
    rng = random.Random(config.seed)
    rows = []
    scores = score(prompts, first), score(prompts, second)
    for prompt, a, b, score_a, score_b in zip(prompts, first, second, *scores, strict=True):
        if a.strip() == b.strip():
            continue
        prefer_a = bool(rng.random() < expit((score_a - score_b) / config.noise))
        chosen, rejected = (a, b) if prefer_a else (b, a)
        agrees = bool((score_a >= score_b) == prefer_a)
        value: Any = list(prompt.messages) if prompt.messages else prompt.text
        row = {"prompt": value, "chosen": chosen, "rejected": rejected, "label_agrees": agrees}
        rows.append(row)
    return rows
