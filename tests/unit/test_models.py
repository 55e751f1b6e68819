"""Forward passes against transformers' own, over three families, padding and pad = eos."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from salsa import models
from salsa.data import Prompt
from salsa.errors import CheckpointError
from salsa.models import LanguageModel, RewardModel, ValueModel, language, load_tokenizer
from salsa.runtime.engine import Engine
from salsa.runtime.sampler.local import left_padded
from salsa.types import Rollout, Sampling
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer, wrap

FP32 = Engine.create("fp32")

PROMPTS = [Prompt(ids, None, "") for ids in ((1, 3, 40, 41), (1, 3, 50, 51, 52, 53, 54), (1,))]


def rollout_of(pad_id: int = 0) -> Rollout:
    prompt, prompt_mask = left_padded([p.ids for p in PROMPTS], pad_id, torch.device("cpu"))
    response = torch.tensor([[60, 61, 2, pad_id], [70, 71, 72, 73], [2, pad_id, pad_id, pad_id]])
    lengths = torch.tensor([3, 4, 1])
    return Rollout(prompt, prompt_mask, response, torch.arange(4) < lengths[:, None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_id", [0, 2])
def test_logprobs_are_those_of_each_row_alone(family, pad_id):
    """Oracle: each sequence by itself, unpadded, full logits, float64 log-softmax. pad_id 2 is EOS."""
    model, rollout, temperature = tiny_model(family), rollout_of(pad_id), 0.7
    stats = wrap(model).stats(rollout, temperature)
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
    learns = wrap(model, learns=True)
    learnt = learns.logprobs(rollout, temperature)
    assert torch.allclose(learnt, stats.logprobs, atol=1e-6)
    both = learns.logprobs_and_entropy(rollout, temperature)
    assert torch.equal(both.logprobs, learnt) and both.entropy.requires_grad
    assert torch.allclose(both.entropy, stats.entropy, atol=1e-6)


def test_chunks_change_no_gradient_of_the_entropy(monkeypatch):
    gradients = []
    for chunk in (1, 512):
        monkeypatch.setattr(language, "LOGITS_CHUNK", chunk)
        model = wrap(tiny_model("llama"), learns=True)
        model.logprobs_and_entropy(rollout_of(), 0.7).entropy.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_chunks_of_logits_change_neither_loss_nor_gradient(chunk, monkeypatch):
    """Oracle: all logits at once, by transformers' own forward pass with a padding mask."""
    rollout, weights = rollout_of(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    gradients = []
    for whole in (True, False):
        model = tiny_model("llama")
        if whole:
            mask, width = rollout.mask.long(), rollout.response.shape[1]
            position = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(rollout.tokens, attention_mask=mask, position_ids=position).logits
            distribution = logits[:, -width - 1 : -1].log_softmax(-1)
            logprobs = distribution.gather(-1, rollout.response[..., None]).squeeze(-1)
            logprobs = logprobs * rollout.response_mask
        else:
            monkeypatch.setattr(language, "LOGITS_CHUNK", chunk)
            logprobs = wrap(model, learns=True).logprobs(rollout, 1.0)
        (logprobs * weights).sum().backward()
        gradients.append((logprobs.detach(), [p.grad for p in model.parameters()]))
    (expected, slopes), (got, own) = gradients
    assert torch.allclose(got, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, slopes, strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_exact_kl_against_full_distributions(given, monkeypatch):
    policy, other, rollout = tiny_model("llama", 0), tiny_model("llama", 1), rollout_of()
    own = wrap(policy)
    states = own.states(rollout) if given else None
    if given:  # and its own pass is not made again
        monkeypatch.setattr(own, "states", None)
    got = own.kl_to(wrap(other), rollout, 0.7, states)
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        ids = torch.tensor([[*prompt.ids, *rollout.response[row, :length].tolist()]])
        p, q = ((m(ids).logits[0].double() / 0.7).log_softmax(-1) for m in (policy, other))
        exact = (p.exp() * (p - q)).sum(-1)[len(prompt.ids) - 1 :][:length]
        assert torch.allclose(got[row, :length].double(), exact, atol=1e-4)
        assert (got[row, length:] == 0).all()


def test_soft_capped_logits_are_the_models_own(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=2.0,
        final_logit_softcapping=3.0, pad_token_id=0,
    )  # fmt: skip
    model, rollout = Gemma2ForCausalLM(config).eval(), rollout_of()
    logprobs = wrap(model, learns=True).logprobs(rollout, 1.0)
    ids = torch.tensor([[*PROMPTS[0].ids, *rollout.response[0, :3].tolist()]])
    expected = model(ids).logits[0].log_softmax(-1)[3:6].gather(-1, ids[0, 4:, None]).squeeze(-1)
    assert torch.allclose(logprobs[0, :3], expected, atol=1e-4)


def test_families_that_scale_their_logits_otherwise_are_refused(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0, initializer_range=1.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="GraniteForCausalLM scales its logits"):
        LanguageModel.load(tmp_path, FP32)


def test_values_are_read_before_the_token(make_checkpoint):
    checkpoint = make_checkpoint("llama")
    critic = models.load_classifier(checkpoint.path, pad_id=0, new_head_seed=3)
    rollout = rollout_of()
    values = ValueModel.load(checkpoint.path, FP32, pad_id=0, new_head_seed=3).values(rollout)
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
    model = models.load_classifier(make_checkpoint("llama").path, pad_id=0, new_head_seed=3)
    reward = RewardModel(model, tiny_tokenizer(), FP32)
    sequences = [[1, 3, 40], [1, 3, 50, 51, 52, 60, 61], [1, 9]]
    together = reward.scores(sequences, max_tokens=21)
    assert reward.scores(sequences, max_tokens=1) == pytest.approx(together, abs=1e-5)
    alone = [model(torch.tensor([ids])).logits.item() for ids in sequences]
    assert together == pytest.approx(alone, abs=1e-4)


def test_missing_models_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        models.load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="is no reward model"):
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        models.load_classifier(tmp_path, pad_id=0)


def test_a_classifier_without_a_linear_score_is_refused(tmp_path):
    """BERT's head reads the first token through a pooler: it cannot score what it was not trained to see."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=261, num_hidden_layers=2, num_labels=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    for load in (partial(models.load_classifier, pad_id=0), models.check_reward_model):
        with pytest.raises(
            CheckpointError, match="BertForSequenceClassification has no linear head"
        ):
            load(tmp_path)


def test_a_template_that_is_no_text_is_one_line(make_checkpoint, tmp_path):
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="x.jinja: cannot be read"):
        load_tokenizer(make_checkpoint("llama").path, chat_template=str(tmp_path / "x.jinja"))


def test_pad_falls_back_to_eos(tmp_path):
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(tmp_path).pad_token_id == 2


@pytest.mark.parametrize("pad_id", [0, 2])
def test_a_response_has_ended_if_its_last_real_token_is_eos(pad_id):
    """Not the last column, which is padding where a response is short."""
    assert rollout_of(pad_id).ended((2,)).tolist() == [True, False, True]
    assert rollout_of(pad_id).ended((73, 61)).tolist() == [False, True, False]
    assert rollout_of(pad_id).lengths.tolist() == [3, 4, 1]


@pytest.mark.parametrize(("written", "ends"), [(None, (2,)), (7, (2, 7)), ([5, 2], (2, 5))])
def test_replies_end_at_the_tokenizers_eos_and_the_generation_configs(written, ends, tmp_path):
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    sampling = models.sampling_for(tmp_path, tiny_tokenizer(), max_new_tokens=3, temperature=0.5)
    assert sampling == Sampling(3, 0.5, ends, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_model_says_that_its_weights_are_fp32(make_checkpoint, tmp_path, precision):
    """It said bfloat16 of fp32 weights where passes were in bf16: who loaded it by its word lost the digits."""
    made = make_checkpoint("llama", 0)
    model = LanguageModel.load(made.path, Engine.create(precision), learns=True)
    model.save(load_tokenizer(made.path), tmp_path / "out")
    assert '"dtype": "float32"' in (tmp_path / "out" / "config.json").read_text()
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.float32
    }
    AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).save_pretrained(
        tmp_path / "theirs"
    )
    own, theirs = (tmp_path / name / "config.json" for name in ("out", "theirs"))
    assert own.read_bytes() == theirs.read_bytes(), (
        "nothing else differs from what transformers writes"
    )
