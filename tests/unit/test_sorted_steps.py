"""Passes of a step share rows of alike length, and a step has the rows that it would have anyway."""

import datasets
from accelerate.data_loader import SeedableRandomSampler

from salsa.runtime.hf_trainer import _lengths, _SortedSteps

LENGTHS = [7, 3, 9, 1, 8, 2, 6, 5, 4, 10]


def drawn(epoch):
    sampler = SeedableRandomSampler(LENGTHS, data_seed=4)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_step_keeps_its_rows_and_has_them_by_length():
    steps = _SortedSteps(SeedableRandomSampler(LENGTHS, data_seed=4), LENGTHS, 4)
    assert len(steps) == len(LENGTHS)
    for epoch in (0, 1):
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
