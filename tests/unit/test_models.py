"""Forward passes against transformers' own, over three families, padding and pad = eos."""

import pytest
import torch
from transformers import DynamicCache

from salsa import models
from salsa.data import Prompt, collate
from salsa.errors import CheckpointError
from salsa.runtime.generation import generate
from salsa.types import Rollout
from tests.conftest import FAMILIES, tiny_model

PROMPTS = [Prompt(ids, None, "") for ids in ((1, 3, 40, 41), (1, 3, 50, 51, 52, 53, 54), (1,))]


def rollout_of(pad_id: int = 0) -> Rollout:
    batch = collate(PROMPTS, pad_id)
    response = torch.tensor([[60, 61, 2, pad_id], [70, 71, 72, 73], [2, pad_id, pad_id, pad_id]])
    lengths = torch.tensor([3, 4, 1])
    return Rollout(batch.prompt, batch.prompt_mask, response, torch.arange(4) < lengths[:, None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_id", [0, 2])
def test_logprobs_are_those_of_each_row_alone(family, pad_id):
    """Oracle: each sequence by itself, unpadded, full logits, float64 log-softmax. pad_id 2 is EOS."""
    model, rollout, temperature = tiny_model(family), rollout_of(pad_id), 0.7
    stats = models.response_stats(model, rollout, temperature=temperature)
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        ids = torch.tensor([[*prompt.ids, *rollout.response[row, :length].tolist()]])
        logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
        for t in range(length):
            position = len(prompt.ids) + t
            expected = logprobs[position - 1, ids[0, position]].item()
            entropy = -(logprobs[position - 1].exp() * logprobs[position - 1]).sum().item()
            assert stats.logprobs[row, t].item() == pytest.approx(expected, abs=1e-4)
            assert stats.entropy[row, t].item() == pytest.approx(entropy, abs=1e-4)
        assert (stats.logprobs[row, length:] == 0).all()
        assert (stats.entropy[row, length:] == 0).all()


def test_values_are_read_before_the_token(make_checkpoint):
    checkpoint = make_checkpoint("llama")
    critic = models.load_scorer(checkpoint.path, pad_id=0, new_head_seed=3).eval()
    rollout = rollout_of()
    values = models.response_values(critic, rollout)
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        ids = torch.tensor([[*prompt.ids, *rollout.response[row, :length].tolist()]])
        alone = critic.score(critic.model(ids).last_hidden_state)[0, :, 0]
        for t in range(length):
            assert values[row, t].item() == pytest.approx(
                alone[len(prompt.ids) + t - 1].item(), abs=1e-4
            )
        assert (values[row, length:] == 0).all()


def test_sequence_scores_do_not_depend_on_the_batch(make_checkpoint):
    model = models.load_scorer(make_checkpoint("llama").path, pad_id=0, new_head_seed=3).eval()
    sequences = [[1, 3, 40], [1, 3, 50, 51, 52, 60, 61], [1, 9]]
    together = models.sequence_scores(model, sequences, batch_size=3)
    alone = [model(torch.tensor([ids])).logits.item() for ids in sequences]
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_agrees_with_transformers_at_low_temperature(family):
    """A vanishing temperature is greedy decoding: left padding and dropped rows must change nothing.

    EOS is made of tokens that the rows say at different steps, so that they end one by one.
    """
    model, batch, steps = tiny_model(family), collate(PROMPTS, 0), 8
    free = [_greedy(model, prompt, steps) for prompt in PROMPTS]
    ends = (free[0][1], free[1][4])
    response, mask = generate(
        model,
        batch.prompt,
        batch.prompt_mask,
        max_new_tokens=steps,
        temperature=1e-4,
        eos_ids=ends,
        pad_id=0,
        generator=torch.Generator().manual_seed(0),
    )
    lengths = set()
    for row, said in enumerate(free):
        stop = next((t + 1 for t, token in enumerate(said) if token in ends), steps)
        assert response[row][mask[row]].tolist() == said[:stop]
        assert (response[row, stop:] == 0).all() and not mask[row, stop:].any()
        lengths.add(stop)
    assert len(lengths) > 1


def _greedy(model, prompt, steps) -> list[int]:
    """What transformers says to one prompt alone, never ending."""
    ids = torch.tensor([prompt.ids])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return said[0, ids.shape[1] :].tolist()


def test_generation_stops_at_eos_and_masks_what_follows():
    class Scripted(torch.nn.Module):
        """Says 7, then EOS (2) in row 0 only, then 7 for ever."""

        def __init__(self):
            super().__init__()
            self.step = 0

        def forward(self, input_ids, **kwargs):
            logits = torch.full((len(input_ids), 1, 10), -1e9)
            logits[:, 0, 7] = 0
            if self.step == 1:
                logits[0, 0, 7], logits[0, 0, 2] = -1e9, 0
            self.step += 1
            return type("Output", (), {"logits": logits, "past_key_values": DynamicCache()})

    response, mask = generate(
        Scripted(),
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 3, dtype=torch.bool),
        max_new_tokens=4,
        temperature=1.0,
        eos_ids=(2,),
        pad_id=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert response.tolist() == [[7, 2, 2, 2], [7, 7, 7, 7]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_sampling_follows_the_distribution():
    """Chi-square against softmax(logits / T): a wrong temperature or a biased draw fails."""
    from scipy.stats import chisquare

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    class Fixed(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return type(
                "Output",
                (),
                {"logits": logits.expand(len(input_ids), 1, 4), "past_key_values": None},
            )

    count = 20_000
    response, _ = generate(
        Fixed(),
        torch.zeros(count, 1, dtype=torch.long),
        torch.ones(count, 1, dtype=torch.bool),
        max_new_tokens=1,
        temperature=2.0,
        eos_ids=(9,),
        pad_id=0,
        generator=torch.Generator().manual_seed(0),
    )
    observed = torch.bincount(response.flatten(), minlength=4).double().numpy()
    expected = ((logits / 2).softmax(0) * count).double().numpy()
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_missing_models_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        models.load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="is no reward model"):
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        models.load_scorer(tmp_path, pad_id=0)


def test_pad_falls_back_to_eos(tmp_path):
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(tmp_path).pad_token_id == 2
