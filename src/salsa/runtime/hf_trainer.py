"""Run a Hugging Face Trainer, in one process or several, so that a kill loses at most the steps since a checkpoint.

In several the Trainer divides its model by FSDP2, through accelerate; which rows a process computes, and what they
weigh, is decided here (`divided`), so that the result is that of one process.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
from pyarrow.compute import list_value_length
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from salsa.runtime.engine import Engine
from salsa.runtime.lora import lora_config
from salsa.runtime.tracking import Tracker, say, tracker

_LOGS_PER_CHECKPOINT = 5
_COMPLETE = "complete"
_DIVIDED = "pytorch_model_fsdp.bin"
"""Is in a checkpoint of several processes."""


def common_arguments(job: Any, directory: Path, engine: Engine) -> dict[str, Any]:
    """TrainingArguments that every stage shares, from the job's seed and the fields of its `config`.

    From here on this process sends no telemetry: TRL's trainers report to the hub when they are made.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    config, on_cpu = job.config, engine.device.type == "cpu"
    microbatch = config.microbatch_size or config.batch_size
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
    } | ({"fsdp": True, "average_tokens_across_devices": False} if engine.world_size > 1 else {})


def divided(trainer: Any, engine: Engine, *, pairs: bool = False) -> Any:
    """A class of trainers whose models the engine's processes share by FSDP2.

    Every process reads the whole of a batch and computes its own rows. A loss is a mean over rows (`pairs`: of pairs,
    all chosen ones before all rejected ones), or, of SFT, is divided by the tokens of the whole batch; FSDP2 takes the
    mean over processes. Rows of similar length share a pass.
    """
    trainer = _by_length(trainer)
    if engine.world_size == 1:
        return _by_rows(trainer) if pairs else trainer

    class Divided(trainer):  # type: ignore[misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if engine.device.type == "cpu":
                _use_fsdp_on_cpu(self)
            self.accelerator.gather = partial(
                _gather_rows, self.accelerator, self.accelerator.gather
            )

        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            batches = loader.batch_sampler  # accelerate's, which would deal them out
            batches.num_processes, batches.process_index, batches.even_batches = 1, 0, False
            return loader

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            count = len(inputs["input_ids"]) // (2 if pairs else 1)
            own = engine.own_rows(count)
            share = len(own) / count if pairs else float(len(own) > 0)
            if len(own) == 0:  # all processes make the same passes: a row that counts nothing
                own = torch.zeros(1, dtype=torch.long, device=engine.device)
            rows = {count: own, 2 * count: torch.cat([own, own + count])}
            mine = {k: v[rows[len(v)]] if torch.is_tensor(v) else v for k, v in inputs.items()}
            loss = super().compute_loss(
                model, mine, return_outputs, num_items_in_batch=num_items_in_batch
            )
            return loss * (engine.world_size * share)

    return _by_rows(Divided) if pairs else Divided


def _by_length(trainer: Any) -> Any:
    """A class of trainers that sorts the rows of each optimizer step by length, so that its passes have less padding.

    The rows of a step stay the same; where a step is one pass, their order does too.
    """

    class ByLength(trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            if (passes := self.args.gradient_accumulation_steps) > 1:
                batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
                rows = passes * batches.batch_size
                batches.sampler = _SortedSteps(batches.sampler, _lengths(self.train_dataset), rows)
            return loader

    return ByLength


class _SortedSteps:
    """The rows that `sampler` draws, every `size` of them sorted by length; accelerate calls `set_epoch`."""

    def __init__(self, sampler: Any, lengths: Sequence[int], size: int) -> None:
        self.sampler, self.lengths, self.size = sampler, lengths, size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        for start in range(0, len(drawn), self.size):
            yield from sorted(drawn[start : start + self.size], key=self.lengths.__getitem__)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def _lengths(rows: Any) -> list[int]:
    """Tokens of each row of a data set that TRL tokenized; of a pair, with its longer reply. Reads no token."""
    columns = rows.with_format("arrow")[:]

    def tokens(name: str) -> np.ndarray:
        if name not in rows.column_names:
            return np.zeros(len(rows), dtype=int)
        return list_value_length(columns[name]).to_numpy()

    longer = np.maximum(tokens("chosen_ids"), tokens("rejected_ids"))
    return (tokens("input_ids") + tokens("prompt_ids") + longer).tolist()


def _by_rows(trainer: Any) -> Any:
    """A class of trainers that weighs the passes of a batch by their rows: the last batch's may have different numbers.

    The Trainer takes the mean over passes, unless a loss is divided by the batch's tokens, as SFT's is.
    """

    class ByRows(trainer):  # type: ignore[misc]
        def get_batch_samples(self, *args: Any) -> Any:
            batches, tokens = super().get_batch_samples(*args)
            counts = [len(one["input_ids"]) for one in batches]
            self._mean_rows = sum(counts) / max(1, len(counts))
            return batches, tokens

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **named)
            return loss * (len(inputs["input_ids"]) / self._mean_rows)

    return ByRows


def _gather_rows(accelerator: Any, gather: Any, x: torch.Tensor) -> torch.Tensor:
    """What `gather` of the accelerator gives, also of rows whose number differs from process to process."""
    if x.ndim == 0:
        return gather(x)
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    parts = gather(accelerator.pad_across_processes(x)).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _use_fsdp_on_cpu(trainer: Any) -> None:
    """Tell accelerate, which uses FSDP on accelerators only, that this is FSDP: so tests run what GPUs run."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state = trainer.accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


@contextmanager
def known_to_accelerate(engine: Engine) -> Iterator[None]:
    """While the block lasts, accelerate finds the engine's processes in the environment; of one it learns nothing."""
    if engine.world_size == 1:
        yield
        return
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    on_cpu = engine.device.type == "cpu"
    local_rank = engine.rank if on_cpu else torch.cuda.current_device()
    size = str(engine.world_size)
    os.environ |= {
        "RANK": str(engine.rank), "WORLD_SIZE": size, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": size,
        "OMP_NUM_THREADS": str(engine.threads),  # accelerate sets the threads otherwise
    }  # fmt: skip
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


def adapters(config: Any, task: str, seed: int, whole: tuple[str, ...] = ()) -> Any:
    """Peft's settings for `config` (rank, alpha, target_modules), None for None; modules in `whole` learn entirely.

    Seeds torch, which draws the adapters when a trainer is made: TRL seeds later.
    """
    if config is None:
        return None
    torch.manual_seed(seed)
    return lora_config(config, modules_to_save=list(whole) or None, task_type=task)


def merged(trainer: Trainer, model: PreTrainedModel) -> PreTrainedModel:
    """What was trained, as an ordinary model: W + (alpha / r)·B·A where there are adapters, else `model` itself."""
    trained: Any = trainer.model
    return trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else model


def train(
    trainer: Trainer, directory: Path, label: str, show: tuple[str, ...], engine: Engine
) -> None:
    """Train to the end, from the last complete checkpoint in `directory/resume` if there is one.

    Several processes go on from a checkpoint of any number of them, one process from its own: what was begun the other
    way begins anew.
    """
    trainer.remove_callback(PrinterCallback)
    last = engine.from_main(lambda: _last_checkpoint(directory / "resume", label, engine))
    with tracker(directory, label, _num_steps(trainer), show, writes=engine.is_main) as log:
        log.resume_at(int(last.rpartition("-")[2]) if last else 0)
        trainer.add_callback(_Report(log, engine))
        trainer.train(resume_from_checkpoint=last)


def learned(
    trainer: Trainer, model: PreTrainedModel, engine: Engine
) -> tuple[PreTrainedModel, dict[str, torch.Tensor] | None]:
    """What was trained, as an ordinary model; of a divided one its weights too, put together in the main process."""
    if engine.world_size == 1:
        return merged(trainer, model), None
    weights = trainer.accelerator.get_state_dict(trainer.model)
    names = dict(model.named_parameters())  # tied weights once
    return model, {name: weight for name, weight in weights.items() if name in names}


def _last_checkpoint(folder: Path, label: str, engine: Engine) -> str | None:
    """The newest checkpoint that is whole and of this kind; others are removed."""
    several = engine.world_size > 1
    for path in folder.glob("checkpoint-*"):
        whole = (path / _COMPLETE).exists()
        if whole and (path / _DIVIDED).exists() == several:
            continue
        if whole:
            begun = "one process" if several else "several processes"
            say(f"{label}: {path.name} was written by {begun}; it begins anew")
        shutil.rmtree(path)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


class _Report(TrainerCallback):
    """Trainer events → tracker; marks a checkpoint once all its files are there."""

    def __init__(self, log: Tracker, engine: Engine) -> None:
        self.tracker, self.engine = log, engine

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            metrics = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            self.tracker.log(state.global_step, metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine.max(0.0)  # everybody's files are there
        if self.engine.is_main:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


def _num_steps(trainer: Trainer) -> int:
    per_epoch = -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
    return int(-(-per_epoch * trainer.args.num_train_epochs // 1))
