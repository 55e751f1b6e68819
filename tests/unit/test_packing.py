"""Packed rows: every token once, within the budget, and nothing but rounding changed by it."""

import random

import pytest
import torch

from salsa.errors import CheckpointError
from salsa.models.trunk import enable_gradient_checkpointing, enable_packing, hidden_states
from salsa.runtime import packing
from salsa.runtime.packing import num_distinct, pack, packs_of, take
from tests.families import ALONE, PACKED, model_of

ROWS = [[1, 5, 6, 7], [1, 5, 6, 8, 9], [3, 4], [1, 5, 6, 8, 9], [1, 5], [1, 9, 2, 4, 4, 6]]


def test_a_trie_by_hand():
    found = pack([[7, 8, 9, 5], [7, 8, 4], [7, 8, 9, 6]], torch.device("cpu"))
    assert found.tokens.tolist() == [[7, 8, 4, 9, 5, 6]]
    assert num_distinct([[7, 8, 9, 5], [7, 8, 4], [7, 8, 9, 6]]) == 6
    assert found.positions.tolist() == [[0, 1, 2, 2, 3, 3]]
    assert found.paths.tolist() == [[0, 1, 3, 4], [0, 1, 2, 0], [0, 1, 3, 5]]
    assert found.added.tolist() == [[3, 4, 0], [0, 1, 2], [5, 0, 0]]
    assert found.added.flatten()[found.place].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.visible[0, 0].tolist() == [
        [True, True, True, False], [True, True, True, True], [True, False, False, False],
    ]  # fmt: skip


@pytest.mark.parametrize("max_tokens", [1, 50, 64, 200, 10_000])
def test_packs_hold_every_row_once_within_the_budget(max_tokens):
    rng = random.Random(0)
    rows = [
        [*range(20), *(rng.randint(30, 99) for _ in range(rng.randint(1, 40)))] for _ in range(100)
    ]
    packs = packs_of(rows, max_tokens)
    assert sorted(row for found in packs for row in found) == list(range(100))
    sizes = [num_distinct([rows[i] for i in found]) for found in packs]
    for found, size in zip(packs, sizes, strict=True):
        assert size <= max_tokens or len(found) == 1
    distinct = 20 + sum(len(row) - 20 for row in rows)
    assert max_tokens != 10_000 or (len(packs) == 1 and sizes[0] <= distinct)
    assert max_tokens != 200 or min(sizes) > 140


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [1, 64, 200, 10_000])
def test_packs_for_several_processes_are_as_many_for_each(processes, max_tokens):
    rng = random.Random(0)
    rows = [[rng.randint(0, 99) for _ in range(rng.randint(1, 40))] for _ in range(99)]
    packs = packs_of(rows, max_tokens, processes)
    assert sorted(row for found in packs for row in found) == list(range(99))
    sizes = [num_distinct([rows[i] for i in found]) for found in packs]
    assert all(
        size <= max_tokens or len(found) == 1 for found, size in zip(packs, sizes, strict=True)
    )
    fewest = -(-len(packs_of(rows, max_tokens)) // processes) * processes
    assert fewest - processes < len(packs) <= fewest
    assert max_tokens != 10_000 or max(sizes) - min(sizes) <= 80  # two rows, at most


def test_no_rows_make_no_packs():
    assert packs_of([], 10) == []


@pytest.mark.parametrize("scores", ["at once", "by torch"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_are_padded_rows(family, scores, monkeypatch):
    """Oracle: transformers' own forward and backward pass of each row alone."""
    monkeypatch.setattr(packing, "SHORT", 2**22 if scores == "at once" else 0)
    model = model_of(family)
    trunk = getattr(model, model.base_model_prefix)
    weights = torch.randn(trunk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    alone = [trunk(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
    sum((h @ weights).square().sum() for h in alone).backward()
    expected = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    assert enable_packing(model)
    hidden, paths = hidden_states(trunk, ROWS)
    assert hidden.shape[0] == 13  # of 24 tokens
    found = [take(hidden, paths[i, : len(row)]) for i, row in enumerate(ROWS)]
    sum((h @ weights).square().sum() for h in found).backward()
    for got, own in zip(found, alone, strict=True):
        assert torch.allclose(got, own, atol=1e-4)
    largest = max(slope.abs().max() for slope in expected.values())
    for name, slope in expected.items():
        assert torch.allclose(trunk.get_parameter(name).grad, slope, atol=1e-5 * largest), name


@pytest.mark.parametrize("family", ALONE)
def test_families_with_an_attention_of_their_own_are_run_on_padded_rows(family):
    model = model_of(family)
    before = model.config._attn_implementation
    assert not enable_packing(model) and model.config._attn_implementation == before
    hidden, paths = hidden_states(model.base_model, ROWS)
    assert hidden.shape[0] == 36
    for i, row in enumerate(ROWS):
        own = model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0]
        assert torch.allclose(hidden[paths[i, : len(row)]], own, atol=1e-4)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputed_activations_give_the_same_bits(family, packs):
    slopes = []
    for recompute in (False, True):
        model = model_of(family)
        assert not packs or enable_packing(model)
        names = [name for name, _ in model.named_parameters()]
        if recompute:
            enable_gradient_checkpointing(model)
        hidden, _ = hidden_states(model.base_model, ROWS)
        hidden.square().sum().backward()
        wrapped = [name for name, _ in model.named_parameters()]
        assert (wrapped != names) is recompute
        assert list(model.state_dict()) == list(model_of(family).state_dict())
        slopes.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(slopes[0]) == len(slopes[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_models_without_layers_to_recompute_are_refused():
    with pytest.raises(CheckpointError, match=r"Linear has no layers.*gradient_checkpointing"):
        enable_gradient_checkpointing(torch.nn.Linear(2, 2))


def test_layers_that_do_not_tell_their_window_are_not_packed():
    """What reaches further back than the four rows on trial would be wrong in silence."""
    model = model_of("gemma2")
    trunk = model.base_model
    trunk.layers[0].self_attn.sliding_window = None
    trunk.config.sliding_window = 100
    assert not enable_packing(model)


def test_gradients_of_a_shared_prefix_are_summed_in_fp32():
    """One by one in bf16, a sum of ones would stop at 256."""
    flat = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    take(flat, torch.zeros(40, 25, dtype=torch.long)).sum().backward()
    assert flat.grad.tolist() == [[1000.0] * 3, [0.0] * 3]


def test_a_model_that_packs_still_runs_on_padded_rows():
    """As transformers runs it: whoever is handed the model may call it."""
    model, plain = model_of("llama"), model_of("llama")
    assert enable_packing(model)
    tokens = torch.tensor([[0, 0, 1, 5, 6], [1, 5, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours, theirs = (m(tokens, attention_mask=mask).logits for m in (model, plain))
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
