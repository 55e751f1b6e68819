"""Direct preference optimisation (Rafailov et al. 2023): TRL's DPOTrainer, whose reference may be a soup.

L = −log σ(β·[log π/π_ref (chosen) − log π/π_ref (rejected)])
"""

from pathlib import Path

from salsa.artifacts import read_jsonl
from salsa.data import preference_rows
from salsa.models import check_vocabulary, load_policy, load_tokenizer, save_checkpoint
from salsa.runtime.engine import Engine
from salsa.runtime.hf_trainer import common_arguments, divided, known_to_accelerate, learned, train
from salsa.stages.jobs import DPOJob

SHOWN = ("loss", "rewards/accuracies", "rewards/margins")


def train_dpo(job: DPOJob, directory: Path, engine: Engine) -> None:
    """Train `job.init` against `job.reference` on the pairs and write the policy to `directory`; resumable.

    Raises:
        CheckpointError: policy and reference differ in vocabulary, or the reference is not what its digest says.
        DataError: rows of the wrong shape.
    """
    import datasets
    import trl

    tokenizer = load_tokenizer(job.init.path)
    check_vocabulary(tokenizer, job.reference.path, "reference")
    job.reference.verify()
    where = job.pairs.path / "pairs.jsonl"
    rows = preference_rows(read_jsonl(where), tokenizer, str(where))
    arguments = common_arguments(job, directory, engine)
    model = load_policy(job.init.path)
    with known_to_accelerate(engine):
        trainer = divided(trl.DPOTrainer, engine, pairs=True)(
            model=model,
            ref_model=load_policy(job.reference.path),
            args=trl.DPOConfig(**arguments, beta=job.config.beta, disable_dropout=True),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        train(trainer, directory, job.label, SHOWN, engine)
        model, weights = learned(trainer, model, engine)
    if engine.is_main:
        save_checkpoint(model, tokenizer, directory, weights)
