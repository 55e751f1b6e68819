"""Reward models: TRL's RewardTrainer on preference pairs, and the accuracy on pairs that were kept back."""

from collections.abc import Sequence
from pathlib import Path

from salsa.artifacts import read_jsonl, write_atomic
from salsa.data import Row, kept_back, preference_rows
from salsa.errors import DataError
from salsa.models import RewardModel, load_classifier, load_tokenizer, save_checkpoint
from salsa.models.scalar import SCORING_TOKENS
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
from salsa.stages.jobs import RewardJob


def train_reward(job: RewardJob, directory: Path, engine: Engine) -> None:
    """Train a sequence classifier on preferences; write it and its held-out accuracy to `directory`; resumable.

    Raises:
        ConfigError: no layer is called what `lora.target_modules` says.
        DataError: no pair is left to train on, or rows of the wrong shape.
    """
    import datasets
    import trl

    config = job.config
    tokenizer = load_tokenizer(job.init.path)
    where = str(job.pairs.path / "pairs.jsonl")
    rows = preference_rows(read_jsonl(Path(where)), tokenizer, where)
    back, rest = kept_back(
        [row["prompt"] for row in rows], config.holdout, config.split_seed, config.holdout_prompts
    )
    if not rest:
        raise DataError(
            f"{where}: of {len(rows)} pairs {len(back)} are kept back, which leaves none to train on. "
            "Give more pairs, or set reward.holdout=0."
        )
    arguments = common_arguments(job, directory, engine)
    model = load_classifier(
        job.init.path, pad_id=int(tokenizer.pad_token_id), new_head_seed=job.seed
    )
    with known_to_accelerate(engine):
        with finding_targets(config.lora, "reward"):
            trainer = divided(trl.RewardTrainer, engine, pairs=True)(
                model=model,
                args=trl.RewardConfig(**arguments, disable_dropout=True),
                train_dataset=datasets.Dataset.from_list([rows[i] for i in rest]),
                processing_class=tokenizer,
                peft_config=adapters(config.lora, "SEQ_CLS", job.seed, whole=("score",)),
            )
        train(trainer, directory, job.label, ("loss", "accuracy", "margin"), engine)
        model, weights = learned(trainer, model, engine)
    if engine.is_main:
        save_checkpoint(model, tokenizer, directory, weights)
    if back and engine.is_main:
        accuracy = _accuracy(RewardModel.load(directory, engine.alone), [rows[i] for i in back])
        text = f"{accuracy:.6f} on {len(back)} held-out pairs\n"
        write_atomic(directory / "accuracy.txt", text)


def _accuracy(model: RewardModel, rows: Sequence[Row]) -> float:
    """Share of the pairs whose chosen reply, of however many turns, scores higher than the rejected one."""

    def scores(side: str) -> list[float]:
        return model.scores([model.token_ids(r["prompt"], r[side]) for r in rows], SCORING_TOKENS)

    pairs = zip(scores("chosen"), scores("rejected"), strict=True)
    return sum(chosen > rejected for chosen, rejected in pairs) / len(rows)
