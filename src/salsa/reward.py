"""What RL maximises: TRL's RewardTrainer, and the reward model as a scorer of (prompt, response).

A scorer takes prompts and response texts and returns one float each. The reward model knows no
policy token: it applies its own chat template and tokenizer, so it may differ from the policy in both.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa.artifacts import Checkpoint, write_atomic
from salsa.config import RewardConfig
from salsa.data import Prompt, Row, preference_rows, render
from salsa.errors import DataError
from salsa.models import load_scorer, load_tokenizer, save, sequence_scores
from salsa.reward_functions import Scorer
from salsa.runtime.hf_trainer import common_arguments, train
from salsa.runtime.local import freeze

SCORING_TOKENS = 4096
"""Tokens per forward pass of a reward model."""


@dataclass(frozen=True)
class Reward:
    """What is maximised, the reward model behind it if there is one (the critic starts there), and a digest of both."""

    parts: Mapping[str, Scorer]
    """Name → scorer; the reward is their sum."""
    checkpoint: Checkpoint | None
    digest: str

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Sum of the parts."""
        columns = [scorer(prompts, responses) for scorer in self.parts.values()]
        return [sum(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class RewardJob:
    """One reward-model run on rows of prompt, chosen, rejected."""

    label: str
    init: Checkpoint
    rows: Sequence[Row]
    where: str
    config: RewardConfig
    seed: int
    precision: str


def train_reward(job: RewardJob, directory: Path) -> None:
    """Train a sequence classifier on preferences; write it and its held-out accuracy to `directory`; resumable.

    Raises:
        DataError: fewer than two pairs, or rows of the wrong shape.
    """
    import datasets
    import trl

    config = job.config
    tokenizer = load_tokenizer(job.init.path)
    rows = preference_rows(job.rows, tokenizer, job.where)
    num_held_out = math.ceil(len(rows) * config.holdout) if config.holdout else 0
    if len(rows) - num_held_out < 1:
        raise DataError(
            f"{job.where}: {len(rows)} pairs are too few to train on and hold {config.holdout:.0%} back."
        )
    random.Random(config.split_seed).shuffle(rows)
    arguments = trl.RewardConfig(
        **common_arguments(
            directory,
            seed=job.seed,
            precision=job.precision,
            checkpoint_every=config.checkpoint_every,
        ),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        max_length=config.max_length,
        disable_dropout=True,
    )
    pad_id = tokenizer.pad_token_id
    model = load_scorer(job.init.path, pad_id=pad_id, new_head_seed=job.seed)
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows[num_held_out:]),
        processing_class=tokenizer,
    )
    train(trainer, directory, job.label, ("loss", "accuracy", "margin"))
    save(model, tokenizer, directory)
    if num_held_out:
        accuracy = _accuracy(model_scorer(directory, job.precision), rows[:num_held_out])
        write_atomic(
            directory / "accuracy.txt", f"{accuracy:.6f} on {num_held_out} held-out pairs\n"
        )


def model_scorer(path: Path, precision: str) -> Scorer:
    """Score with a reward model; its own template and tokenizer."""
    tokenizer = load_tokenizer(path)
    model = freeze(load_scorer(path, pad_id=int(tokenizer.pad_token_id)), precision)

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        sequences = [
            _conversation_ids(prompt, response, tokenizer)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return sequence_scores(model, sequences, SCORING_TOKENS)

    return score


def _conversation_ids(prompt: Prompt, response: str, tokenizer: Any) -> list[int]:
    """Prompt and response as the reward model was trained to see them."""
    if prompt.messages is None:
        return tokenizer(prompt.text + response + tokenizer.eos_token)["input_ids"]
    messages = [*prompt.messages, {"role": "assistant", "content": response}]
    return tokenizer(render(messages, tokenizer, "reward"), add_special_tokens=False)["input_ids"]


def _accuracy(score: Scorer, rows: Sequence[Row]) -> float:
    prompts = [
        Prompt(
            (),
            tuple(row["prompt"]) if isinstance(row["prompt"], list) else None,
            str(row["prompt"]),
        )
        for row in rows
    ]

    def texts(column: str) -> list[str]:
        return [r[column] if isinstance(r[column], str) else r[column][0]["content"] for r in rows]

    pairs = zip(score(prompts, texts("chosen")), score(prompts, texts("rejected")), strict=True)
    return sum(chosen > rejected for chosen, rejected in pairs) / len(rows)
