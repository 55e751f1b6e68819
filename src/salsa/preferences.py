"""Synthetic preferences: replies of the SFT models in pairs, labelled by a noisy scorer.

The labels follow Bradley and Terry: a is chosen with probability σ((score_a − score_b) / noise). They say what
the labeller likes, not what people like, and the report says so.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import expit

from salsa import models
from salsa.artifacts import Checkpoint, read_jsonl, write_atomic
from salsa.config import PreferencesConfig
from salsa.data import Prompt, Row
from salsa.errors import DataError
from salsa.reward import function_scorer
from salsa.rl import collect_rollout, decode
from salsa.runtime.local import seed_everything
from salsa.runtime.tracking import tracker

BATCH = 64


@dataclass(frozen=True)
class PairsJob:
    """Two replies per prompt, of two SFT models (or of one, twice)."""

    label: str
    models: Sequence[Checkpoint]
    config: PreferencesConfig
    prompts: Sequence[Prompt]
    precision: str


def sample_pairs(job: PairsJob, directory: Path) -> None:
    """Write `pairs.jsonl`: prompt, chosen, rejected, and whether the noisy label agrees with the scorer.

    Raises:
        DataError: no prompt got two different replies.
    """
    rng = random.Random(job.config.seed)
    count = len(job.models)
    # each prompt's two (model, draw): different models where there are several, else two draws of one
    authors = [tuple(rng.sample(range(count), 2)) if count > 1 else (0, 0) for _ in job.prompts]
    replies: list[list[str]] = [["", ""] for _ in job.prompts]
    tasks = [
        (author, row, side) for row, pair in enumerate(authors) for side, author in enumerate(pair)
    ]
    total = sum(-(-sum(author == m for author, _, _ in tasks) // BATCH) for m in range(count))
    with tracker(directory, job.label, total, ()) as log:
        done = 0
        for number, checkpoint in enumerate(job.models):
            tokenizer = models.load_tokenizer(checkpoint.path)
            policy = models.load_policy(checkpoint.path).eval()
            sampling = models.sampling(
                checkpoint.path,
                tokenizer,
                max_new_tokens=job.config.max_new_tokens,
                temperature=job.config.temperature,
                precision=job.precision,
            )
            generator = seed_everything(job.config.seed, number)
            own = [(row, side) for author, row, side in tasks if author == number]
            for start in range(0, len(own), BATCH):
                chunk = own[start : start + BATCH]
                rollout = collect_rollout(
                    policy, [job.prompts[row] for row, _ in chunk], sampling, generator
                )
                for (row, side), text in zip(chunk, decode(rollout, tokenizer), strict=True):
                    replies[row][side] = text
                done += 1
                log.advance(done)
    rows = label_pairs(job.prompts, [r[0] for r in replies], [r[1] for r in replies], job.config)
    if not rows:
        raise DataError("preferences: no prompt got two different replies. Give more prompts.")
    write_atomic(directory / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def read_pairs(directory: Path) -> list[Row]:
    """Rows that `sample_pairs` wrote."""
    return read_jsonl(directory / "pairs.jsonl")


def label_pairs(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    config: PreferencesConfig,
) -> list[Row]:
    """Noisy Bradley-Terry labels: a is chosen with probability σ((score_a − score_b) / noise).

    Pairs of equal replies teach nothing and are dropped.
    """
    scorer = function_scorer([config.labeller])
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
