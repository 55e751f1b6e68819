"""What the generator may not change: tokens, whichever rows meet; logprobs, however they are computed."""

import pytest
import torch

from salsa import models
from salsa.data import Prompt, collate
from salsa.runtime.generation import generate
from salsa.types import Rollout
from tests.conftest import FAMILIES, tiny_model

ENDS = (2, 40, 41, 42, 43, 44, 45, 46)  # several, so that lengths are mixed


def prompts_of(count: int) -> list[Prompt]:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (count,), generator=rng).tolist()
    return [
        Prompt(tuple(torch.randint(3, 261, (n,), generator=rng).tolist()), None, "")
        for n in lengths
    ]


def say(model, prompts, *, pad_id=0, max_rows=64, steps=24, ends=ENDS, seed=0):
    batch = collate(prompts, pad_id)
    said = generate(
        model,
        batch.prompt,
        batch.prompt_mask,
        max_new_tokens=steps,
        temperature=0.8,
        eos_ids=ends,
        pad_id=pad_id,
        generator=torch.Generator().manual_seed(seed),
        max_rows=max_rows,
    )
    return said, Rollout(batch.prompt, batch.prompt_mask, said.response, said.response_mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [3, 64])
def test_logprobs_are_those_of_teacher_forcing(family, max_rows):
    model = tiny_model(family)
    said, rollout = say(model, prompts_of(20), max_rows=max_rows)
    again = models.response_stats(model, rollout, temperature=0.8).logprobs
    assert len(set(rollout.lengths.tolist())) > 5
    assert torch.allclose(said.logprobs, again, atol=1e-4)


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_what_a_row_says_does_not_depend_on_the_rows_beside_it(max_rows):
    model, prompts = tiny_model("llama"), prompts_of(20)
    whole, few = say(model, prompts)[0], say(model, prompts, max_rows=max_rows)[0]
    assert torch.equal(whole.response, few.response)
    assert torch.equal(whole.response_mask, few.response_mask)


def test_pad_equal_to_eos_changes_only_the_padding():
    model, prompts = tiny_model("llama"), prompts_of(20)
    apart, equal = (
        say(model, prompts, ends=(2, 40, 41))[0],
        say(model, prompts, ends=(2, 40, 41), pad_id=2)[0],
    )
    assert torch.equal(apart.response_mask, equal.response_mask)
    assert torch.equal(apart.response[apart.response_mask], equal.response[equal.response_mask])
    assert (equal.response[~equal.response_mask] == 2).all()


def test_samples_of_one_prompt_share_its_reading_and_differ():
    """Four samples each of three prompts: the model reads three rows, and says what it says to twelve."""
    model, prompts = tiny_model("llama"), [p for p in prompts_of(3) for _ in range(4)]
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared, _ = say(model, prompts)
    hook.remove()
    assert read[0][0] == 3 and read[1][0] <= 12
    assert len({tuple(row.tolist()) for row in shared.response[:4]}) == 4
    again = models.response_stats(model, say(model, prompts)[1], temperature=0.8).logprobs
    assert torch.allclose(shared.logprobs, again, atol=1e-4)


def test_rows_are_let_in_while_others_still_speak():
    """Continuous batching needs fewer steps than batch after batch."""
    model, prompts = tiny_model("llama"), prompts_of(32)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    lengths = say(model, prompts, max_rows=4)[1].lengths
    hook.remove()
    assert len(calls) < sum(int(lengths[i : i + 4].max()) for i in range(0, 32, 4))


def test_the_same_seed_says_the_same():
    model, prompts = tiny_model("llama"), prompts_of(8)
    assert torch.equal(say(model, prompts)[0].response, say(model, prompts)[0].response)
    assert not torch.equal(
        say(model, prompts)[0].response[:, :3], say(model, prompts, seed=1)[0].response[:, :3]
    )
