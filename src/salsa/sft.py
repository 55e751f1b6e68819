"""Supervised fine-tuning: TRL's SFTTrainer, loss on the reply only, one dataclass in, one checkpoint out."""

from dataclasses import dataclass
from pathlib import Path

from salsa.artifacts import Checkpoint
from salsa.config import SFTConfig
from salsa.data import SFT_COLUMNS, describe, load_rows, sft_rows
from salsa.models import load_policy, load_tokenizer, save
from salsa.runtime.hf_trainer import common_arguments, train


@dataclass(frozen=True)
class SFTJob:
    """One SFT run."""

    label: str
    base: Checkpoint
    config: SFTConfig
    seed: int
    precision: str


def train_sft(job: SFTJob, directory: Path) -> None:
    """Fine-tune `job.base` and write the model to `directory`; resumable.

    Raises:
        DataError: see `salsa.data`.
    """
    import datasets
    import trl

    config = job.config
    assert config.dataset is not None  # the schema: either dataset or checkpoints
    tokenizer = load_tokenizer(job.base.path)
    where = describe(config.dataset)
    rows = load_rows(config.dataset, SFT_COLUMNS)
    microbatch = config.microbatch_size or config.batch_size
    arguments = trl.SFTConfig(
        **common_arguments(
            directory,
            seed=job.seed,
            precision=job.precision,
            checkpoint_every=config.checkpoint_every,
        ),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=config.batch_size // microbatch,
        max_length=config.max_length,
        completion_only_loss=True,
    )
    model = load_policy(job.base.path)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(sft_rows(rows, tokenizer, where)),
        processing_class=tokenizer,
    )
    train(trainer, directory, job.label, ("loss", "mean_token_accuracy"))
    save(model, tokenizer, directory)
