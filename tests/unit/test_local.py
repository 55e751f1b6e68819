"""Precision: bf16 inside, fp32 outside."""

import pytest
import torch

from salsa.runtime.local import computing, freeze
from tests.conftest import tiny_model


def test_computing_in_bf16_gives_fp32_weights_and_gradients_back():
    model, tokens = tiny_model(), torch.tensor([[1, 5, 9, 70]])
    before = {name: p.clone() for name, p in model.named_parameters()}
    exact = tiny_model()
    exact(tokens).logits.square().mean().backward()
    with computing("bf16", model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for _ in range(2):  # two micro-batches: gradients add up
            (model(tokens).logits.float().square().mean() / 2).backward()
        assert all(p.grad is None for p in model.parameters())
    for (name, p), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p, before[name])
        assert (p.grad - other.grad).norm() < 0.05 * other.grad.norm()


def test_computing_gives_the_weights_back_when_something_fails():
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt), computing("bf16", model):
        raise KeyboardInterrupt
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_frozen_model_computes_the_bits_of_the_model_that_learns():
    learner, frozen, tokens = tiny_model(), freeze(tiny_model(), "bf16"), torch.tensor([[1, 5, 9]])
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad(), computing("bf16", learner, frozen):
        assert torch.equal(learner(tokens).logits, frozen(tokens).logits)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
