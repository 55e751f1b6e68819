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

    tokenizer = load_tokenizer(job.base.path)
    rows = sft_rows(load_rows(job.dataset, SFT_COLUMNS), tokenizer, describe(job.dataset))
    arguments = common_arguments(job, directory, engine)
    model = load_policy(job.base.path)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    train(trainer, directory, job.label, ("loss", "mean_token_accuracy"))
    save_checkpoint(model, tokenizer, directory)
