"""What the generator may not change: tokens, whichever rows meet; logprobs, however they are computed."""

import pytest
import torch

from salsa.data import Prompt
from salsa.models import LanguageModel
from salsa.runtime.packing import SPARE_COLUMNS, num_distinct
from salsa.runtime.sampler import LocalSampler
from salsa.types import Generation, Sampling
from tests.conftest import FAMILIES, tiny_model, wrap
from tests.families import PACKED, model_of

ENDS = (2, 40, 41, 42, 43, 44, 45, 46)  # several, so that lengths are mixed


def prompts_of(count: int) -> list[Prompt]:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (count,), generator=rng).tolist()
    return [
        Prompt(tuple(torch.randint(3, 261, (n,), generator=rng).tolist()), None, "")
        for n in lengths
    ]


def sample(
    model, prompts, *, pad_id=0, max_rows=64, steps=24, ends=ENDS, seed=0, heat=0.8
) -> Generation:
    model = model if isinstance(model, LanguageModel) else wrap(model)
    return LocalSampler(model, max_rows).generate(
        [prompt.ids for prompt in prompts],
        Sampling(steps, heat, tuple(ends), pad_id),
        torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("family", [*PACKED, "bloom"])
@pytest.mark.parametrize("max_rows", [3, 64])
def test_logprobs_are_those_of_teacher_forcing(family, max_rows):
    model = wrap(model_of(family))
    assert model.uses_packing == (family != "bloom")
    drawn = sample(model, prompts_of(20), max_rows=max_rows, ends=range(2, 261, 12))
    again = model.stats(drawn.rollout, 0.8).logprobs
    assert len(set(drawn.rollout.lengths.tolist())) > 5
    assert torch.allclose(drawn.logprobs, again, atol=1e-4)


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_what_a_row_says_does_not_depend_on_the_rows_beside_it(max_rows):
    model, prompts = tiny_model("llama"), prompts_of(20)
    whole, few = (sample(model, prompts, max_rows=n).rollout for n in (64, max_rows))
    assert torch.equal(whole.response, few.response)
    assert torch.equal(whole.response_mask, few.response_mask)


def test_pad_equal_to_eos_changes_only_the_padding():
    model, prompts = tiny_model("llama"), prompts_of(20)
    apart, equal = (
        sample(model, prompts, ends=(2, 40, 41)).rollout,
        sample(model, prompts, ends=(2, 40, 41), pad_id=2).rollout,
    )
    assert torch.equal(apart.response_mask, equal.response_mask)
    assert torch.equal(apart.response[apart.response_mask], equal.response[equal.response_mask])
    assert (equal.response[~equal.response_mask] == 2).all()


def test_samples_of_one_prompt_share_its_reading_and_differ():
    """Four samples each of three prompts: the model reads three prompts, and says what it says to twelve."""
    model, prompts = wrap(tiny_model("llama")), [p for p in prompts_of(3) for _ in range(4)]
    read = []
    hook = model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = sample(model, prompts)
    hook.remove()
    assert read[0] == (1, num_distinct([p.ids for p in prompts]))
    assert read[1][0] == 1 and read[1][1] <= 12
    assert len({tuple(row.tolist()) for row in shared.rollout.response[:4]}) == 4
    again = model.stats(shared.rollout, 0.8).logprobs
    assert torch.allclose(shared.logprobs, again, atol=1e-4)


def test_rows_are_let_in_while_others_still_speak():
    """Continuous batching needs fewer steps than batch after batch."""
    model, prompts = wrap(tiny_model("llama")), prompts_of(32)
    calls = []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    lengths = sample(model, prompts, max_rows=4).rollout.lengths
    hook.remove()
    assert len(calls) < sum(int(lengths[i : i + 4].max()) for i in range(0, 32, 4))


def test_slots_grow_with_what_is_said():
    model, steps = wrap(tiny_model("llama")), 2 * SPARE_COLUMNS + 9
    drawn = sample(model, prompts_of(3), steps=steps, ends=())
    again = model.stats(drawn.rollout, 0.8).logprobs
    assert drawn.rollout.response.shape == (3, steps)
    assert torch.allclose(drawn.logprobs, again, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [1, 2, 64])
def test_agrees_with_transformers_at_low_temperature(family, max_rows):
    """A vanishing temperature is greedy decoding: dropped rows and rows let in late must change nothing.

    EOS is made of tokens that the rows say at different steps, so that they end one by one.
    """
    prompts = [(1, 3, 40, 41), (1, 3, 50, 51, 52, 53, 54), (1,)]
    model, steps = tiny_model(family), 8
    free = [_greedy(model, prompt, steps) for prompt in prompts]
    ends = (free[0][1], free[1][4])
    rollout = sample(
        model, [Prompt(p, None, "") for p in prompts], max_rows=max_rows, steps=steps, ends=ends, heat=1e-4
    ).rollout  # fmt: skip
    response, mask = rollout.response, rollout.response_mask
    lengths = set()
    for row, said in enumerate(free):
        stop = next((t + 1 for t, token in enumerate(said) if token in ends), steps)
        assert response[row][mask[row]].tolist() == said[:stop]
        assert (response[row, stop:] == 0).all() and not mask[row, stop:].any()
        lengths.add(stop)
    assert len(lengths) > 1


def _greedy(model, prompt, steps) -> list[int]:
    """What transformers says to one prompt alone, never ending."""
    ids = torch.tensor([prompt])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return said[0, ids.shape[1] :].tolist()


def unchecked(model) -> LanguageModel:
    """The wrapped model, whose head was replaced after it was checked."""
    head, model.lm_head = model.lm_head, tiny_model("llama").lm_head
    wrapped = wrap(model)
    model.lm_head = head
    return wrapped


class Scripted(torch.nn.Module):
    """In place of the output head: 7, then EOS (2) in row 0 only, then 7 for ever."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, hidden):
        logits = torch.full((*hidden.shape[:2], 10), -1e9)
        logits[..., 7] = 0
        if self.step == 1:
            logits[0, 0, 7], logits[0, 0, 2] = -1e9, 0
        self.step += 1
        return logits


@pytest.mark.parametrize("pad_id", [2, 5])
def test_stops_at_eos_and_masks_what_follows(pad_id):
    model = tiny_model("llama")
    model.lm_head = Scripted()
    prompts = [Prompt((1, 1, 1), None, "")] * 2
    drawn = sample(unchecked(model), prompts, ends=(2,), pad_id=pad_id, steps=4).rollout
    assert drawn.response.tolist() == [[7, 2, pad_id, pad_id], [7, 7, 7, 7]]
    assert drawn.response_mask.tolist() == [[True, True, False, False], [True] * 4]


class Fixed(torch.nn.Module):
    """In place of the output head: always the same logits."""

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:2], 4)


def test_sampling_follows_the_distribution():
    """Chi-square against softmax(logits / T): a wrong temperature or a biased draw fails."""
    from scipy.stats import chisquare

    model, count = tiny_model("llama"), 20_000
    model.lm_head = Fixed()
    prompts = [Prompt((1,), None, "")] * count
    drawn = sample(unchecked(model), prompts, max_rows=count, steps=1, heat=2.0, ends=(9,))
    response, logprobs = drawn.rollout.response, drawn.logprobs
    logits = Fixed.logits
    assert torch.allclose(logprobs[:, 0], (logits / 2).log_softmax(0)[response[:, 0]])
    observed = torch.bincount(response.flatten(), minlength=4).double().numpy()
    expected = ((logits / 2).softmax(0) * count).double().numpy()
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_the_same_seed_says_the_same():
    model, prompts = tiny_model("llama"), prompts_of(8)
    first, again, other = (sample(model, prompts, seed=n).rollout.response for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first[:, :3], other[:, :3])


def test_the_weights_that_were_sampled_from_are_stamped():
    model = wrap(tiny_model("llama"), learns=True)
    before = sample(model, prompts_of(2)).version
    assert before == model.version() == sample(model, prompts_of(3), seed=4).version
    with torch.no_grad():
        model.trained()["model.norm.weight"][0] += 1e-3
    model.sync()
    assert sample(model, prompts_of(2)).version == model.version() != before


def test_prompts_are_padded_left_by_length_even_where_pad_is_a_real_token():
    prompts = [Prompt((2, 5, 2), None, ""), Prompt((2,), None, "")]
    rollout = sample(tiny_model("llama"), prompts, pad_id=2, steps=1).rollout
    assert rollout.prompt.tolist() == [[2, 5, 2], [2, 2, 2]]
    assert rollout.prompt_mask.tolist() == [[True] * 3, [False, False, True]]
