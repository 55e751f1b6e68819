"""Runs that must agree: accumulation, kill and resume, pad = eos, measured or not."""

from dataclasses import replace

import pytest
import torch

from salsa import models
from salsa.artifacts import Checkpoint
from salsa.config.expressions import ReferenceRule
from salsa.runtime.engine import Engine
from tests.conftest import tiny_tokenizer
from tests.tiny_rl import GRPO, RLOO, job_from, run, run_killed, weights, without_times

KINDS = {
    "ppo": {},
    "head": {"critic": "head", "critic_warmup": 1},
    "rloo": RLOO | {"normalize_scores": True},
    "grpo": GRPO
    | {"kl_in": "loss", "kl_kind": "k3", "adaptive_kl": {"target": 0.1, "horizon": 100}},
    "lora": {"lora": {"rank": 2}},
}

ALL_KINDS = [
    pytest.param(kind, marks=[] if kind == "ppo" else [pytest.mark.slow]) for kind in KINDS
]


@pytest.mark.parametrize("tokens", [1, 100], ids=["eight of one", "a few of like length"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_forward_pass_of_eight_equals_several_of_fewer(kind, tokens, job, tmp_path):
    """Up to the order of fp32 sums: 20 times closer than the distance that was travelled."""
    options = KINDS[kind] | {"num_updates": 2, "minibatch_size": 8}
    run(job, tmp_path / "whole", microbatch_tokens=10_000, **options)
    run(job, tmp_path / "split", microbatch_tokens=tokens, **options)
    whole, split, start = (
        models.load_policy(path).state_dict()
        for path in (tmp_path / "whole", tmp_path / "split", job.init.path)
    )
    moved = max((whole[key] - start[key]).abs().max() for key in whole)
    apart = max((whole[key] - split[key]).abs().max() for key in whole)
    assert moved > 1e-3 and apart < moved / 20


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_recomputed_activations_change_no_bit(kind, job, tmp_path):
    rows = [
        run(job, tmp_path / str(on), num_updates=2, gradient_checkpointing=on, **KINDS[kind])
        for on in (False, True)
    ]
    assert without_times(rows[0]) == without_times(rows[1])
    assert weights(tmp_path / "False") == weights(tmp_path / "True")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kill_and_resume_equals_straight_through_bit_for_bit(kind, job, tmp_path):
    _resumes(job, tmp_path, KINDS[kind])


@pytest.mark.slow
def test_bf16_resumes_bit_for_bit_too(job, tmp_path):
    """fp32 master weights are what a checkpoint holds."""
    _resumes(job, tmp_path, {"engine": Engine.create("bf16")})


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [{"ema": 0.1}, {"reset_every": 3, "reset_optimizer": True}, {"pulls": False}], ids=str
)
@pytest.mark.parametrize("kind", ["ppo", "lora"])
def test_every_anchor_resumes_bit_for_bit(rule, kind, job, tmp_path):
    _resumes(replace(job, reference=ReferenceRule((job.init,), **rule)), tmp_path, KINDS[kind])


def _resumes(job, tmp_path, options):
    straight = run(job, tmp_path / "straight", num_updates=6, **options)
    run_killed(job, tmp_path / "killed", 6, num_updates=6, **options)
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 5
    resumed = run(job, tmp_path / "killed", num_updates=6, **options)
    assert without_times(resumed) == without_times(straight)
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pad_equal_to_eos_changes_nothing(tied, tmp_path):
    """Same weights; the tokenizer and the model's configuration call EOS their padding token, or not."""
    rows, trained = {}, {}
    for name, pad_is_eos in (("own", False), ("eos", True)):
        checkpoint = _checkpoint(tmp_path / f"{name}-start", pad_is_eos, tied)
        rows[name] = run(job_from(checkpoint), tmp_path / name)
        trained[name] = models.load_policy(tmp_path / name).state_dict()
    assert without_times(rows["own"]) == without_times(rows["eos"])
    for key, value in trained["own"].items():
        assert torch.equal(value, trained["eos"][key]), key


def _checkpoint(path, pad_is_eos, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config.pad_token_id = 2 if pad_is_eos else 0
    model.save_pretrained(path)
    tiny_tokenizer(pad_is_eos=pad_is_eos).save_pretrained(path)
    return Checkpoint.of(path)
