"""Supervised fine-tuning: TRL's SFTTrainer, loss on replies only, one dataclass in, one checkpoint out."""

from pathlib import Path

from salsa.data import SFT_COLUMNS, describe, load_rows, sft_rows
from salsa.models import load_policy, load_tokenizer, save_checkpoint
from salsa.runtime.engine import Engine
from salsa.runtime.hf_trainer import (
    adapters,
    common_arguments,
    divided,
    known_to_accelerate,
    learned,
    train,
)
from salsa.runtime.lora import finding_targets
from salsa.stages.jobs import SFTJob


def train_sft(job: SFTJob, directory: Path, engine: Engine) -> None:
    """Fine-tune `job.base` and write the model to `directory`; resumable.

    Raises:
        ConfigError: no layer is called what `lora.target_modules` says.
        DataError: see `salsa.data`.
    """
    import datasets
    import trl

    tokenizer = load_tokenizer(job.base.path)
    config, whole = job.config, job.config.assistant_only_loss
    given = load_rows(job.dataset, SFT_COLUMNS)
    rows = sft_rows(given, tokenizer, describe(job.dataset), whole=whole)
    arguments = common_arguments(job, directory, engine) | {
        "packing": config.packing,
        "assistant_only_loss" if whole else "completion_only_loss": True,
    }
    model = load_policy(job.base.path)
    with known_to_accelerate(engine):
        with finding_targets(config.lora, "sft"):
            trainer = divided(trl.SFTTrainer, engine)(
                model=model,
                args=trl.SFTConfig(**arguments),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=adapters(config.lora, "CAUSAL_LM", job.seed),
            )
        train(trainer, directory, job.label, ("loss", "mean_token_accuracy"), engine)
        model, weights = learned(trainer, model, engine)
    if engine.is_main:
        save_checkpoint(model, tokenizer, directory, weights)
