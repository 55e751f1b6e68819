"""Passes of a step share rows of similar length, and a step has the rows that it would have anyway."""

from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainingArguments

from salsa.runtime.hf_trainer import _lengths, _SortedSteps, divided

LENGTHS = [7, 3, 9, 1, 8, 2, 6, 5, 4, 10]


def drawn(epoch):
    sampler = SeedableRandomSampler(LENGTHS, data_seed=4)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_step_keeps_its_rows_and_has_them_by_length():
    steps = _SortedSteps(SeedableRandomSampler(LENGTHS, data_seed=4), LENGTHS, 4)
    assert len(steps) == len(LENGTHS)
    for epoch in (0, 1, 5):  # 5: a run that goes on there
        steps.set_epoch(epoch)
        order, plain = list(steps), drawn(epoch)
        for start in (0, 4, 8):
            step = order[start : start + 4]
            assert set(step) == set(plain[start : start + 4])
            assert [LENGTHS[row] for row in step] == sorted(LENGTHS[row] for row in step)
    assert drawn(0) != drawn(1)


def test_a_pair_is_as_long_as_its_prompt_and_longer_reply():
    pairs = {"chosen_ids": [[1], [1, 1, 1]], "rejected_ids": [[1, 1], [1]]}
    assert _lengths(datasets.Dataset.from_dict(pairs)) == [2, 3]
    assert _lengths(datasets.Dataset.from_dict(pairs | {"prompt_ids": [[1, 1], []]})) == [4, 3]
    assert _lengths(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})) == [2, 1]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_trainer_cuts_its_passes_from_sorted_steps(passes, tmp_path):
    def lengths_drawn(kind):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4 // passes, report_to="none",
            gradient_accumulation_steps=passes, use_cpu=True, seed=4, dataloader_pin_memory=False,
            remove_unused_columns=False,
        )  # fmt: skip
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in LENGTHS]})
        collate = lambda passed: {"lengths": torch.tensor([len(r["input_ids"]) for r in passed])}
        trainer = kind(torch.nn.Linear(1, 1), arguments, collate, rows)
        return [batch["lengths"].tolist() for batch in trainer.get_train_dataloader()]

    plain = lengths_drawn(Trainer)
    own = lengths_drawn(divided(Trainer, SimpleNamespace(world_size=1)))
    if passes == 1:
        assert own == plain
    else:
        steps = lambda drawn: [list(chain(*drawn[at : at + 2])) for at in (0, 2, 4)]
        assert own != plain
        assert steps(own) == [sorted(step) for step in steps(plain)]
