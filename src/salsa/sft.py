"""Supervised fine-tuning: TRL's SFTTrainer, loss on the reply only, one dataclass in, one checkpoint out."""

from pathlib import Path

from salsa.data import SFT_COLUMNS, describe, load_rows, sft_rows
from salsa.models import load_policy, load_tokenizer, save_checkpoint
from salsa.runtime.engine import Engine
from salsa.runtime.hf_trainer import common_arguments, train
from salsa.stages.jobs import SFTJob


def train_sft(job: SFTJob, directory: Path, engine: Engine) -> None:
    """Fine-tune `job.base` and write the model to `directory`; resumable.

    Raises:
        DataError: see `salsa.data`.
    """
    import datasets
    import trl

    config = job.config
    assert not isinstance(config.epochs, tuple)  # SFTConfig.of_model gave this model its own
    tokenizer = load_tokenizer(job.base.path)
    where = describe(job.dataset)
    rows = load_rows(job.dataset, SFT_COLUMNS)
    microbatch = config.microbatch_size or config.batch_size
    arguments = trl.SFTConfig(
        **common_arguments(
            directory,
            seed=job.seed,
            engine=engine,
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
    save_checkpoint(model, tokenizer, directory)
