"""Run a Hugging Face Trainer so that a kill loses at most the steps since its last checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from salsa.runtime.engine import Engine
from salsa.runtime.tracking import Tracker, tracker

_LOGS_PER_CHECKPOINT = 5
_COMPLETE = "complete"


def common_arguments(job: Any, directory: Path, engine: Engine) -> dict[str, Any]:
    """TrainingArguments that every stage shares, from the job's seed and the fields of its `config`.

    From here on this process sends no telemetry: TRL's trainers report to the hub when they are made.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    config, on_cpu = job.config, engine.device.type == "cpu"
    microbatch = getattr(config, "microbatch_size", None) or config.batch_size
    return {
        "output_dir": str(directory / "resume"),
        "seed": job.seed,
        "bf16": engine.precision == "bf16",
        "use_cpu": on_cpu,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": config.batch_size // microbatch,
        "max_length": config.max_length,
        "logging_steps": max(1, config.checkpoint_every // _LOGS_PER_CHECKPOINT),
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": not on_cpu,
        "report_to": "none",
        "disable_tqdm": True,
    }


def adapters(config: Any, task: str, seed: int, whole: tuple[str, ...] = ()) -> Any:
    """Peft's settings for `config` (rank, alpha, target_modules), None for None; modules in `whole` learn entirely.

    Seeds torch, which draws the adapters when a trainer is made: TRL seeds later.
    """
    if config is None:
        return None
    import peft

    torch.manual_seed(seed)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules) or "all-linear",
        modules_to_save=list(whole) or None,
        task_type=task,
    )


def merged(trainer: Trainer, model: PreTrainedModel) -> PreTrainedModel:
    """What was trained, as an ordinary model: W + (alpha / r)·B·A where there are adapters, else `model` itself."""
    trained: Any = trainer.model
    return trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else model


def train(trainer: Trainer, directory: Path, label: str, show: tuple[str, ...]) -> None:
    """Train to the end, from the last complete checkpoint in `directory/resume` if there is one."""
    trainer.remove_callback(PrinterCallback)
    folder = directory / "resume"
    for path in folder.glob("checkpoint-*"):
        if not (path / _COMPLETE).exists():  # half-written
            shutil.rmtree(path)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    with tracker(directory, label, _num_steps(trainer), show) as log:
        log.resume_at(int(last.rpartition("-")[2]) if last else 0)
        trainer.add_callback(_Report(log))
        trainer.train(resume_from_checkpoint=last)


class _Report(TrainerCallback):
    """Trainer events → tracker; marks a checkpoint once all its files are there."""

    def __init__(self, log: Tracker) -> None:
        self.tracker = log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            metrics = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            self.tracker.log(state.global_step, metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


def _num_steps(trainer: Trainer) -> int:
    per_epoch = -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
    return int(-(-per_epoch * trainer.args.num_train_epochs // 1))
