"""Precision: measured, not believed; bf16 inside, fp32 masters."""

import subprocess
import sys
import time

import pytest
import torch

from salsa.models import LanguageModel, RewardModel, ValueModel
from salsa.models.loading import load_classifier
from salsa.models.weights import digest_of_weights
from salsa.runtime import engine as engine_module
from salsa.runtime.engine import Engine
from tests.conftest import tiny_model, tiny_tokenizer
from tests.unit.test_models import rollout_of

BF16, FP32 = Engine.create("bf16"), Engine.create("fp32")


@pytest.fixture
def measured(monkeypatch):
    """A CPU of so many GFLOP/s in fp32 and in bf16."""

    def measured(fp32, bf16):
        speeds = {torch.float32: fp32 * 1e9, torch.bfloat16: bf16 * 1e9}
        monkeypatch.setattr(engine_module, "_flops_per_second", speeds.__getitem__)
        engine_module._speeds.cache_clear()

    yield measured
    engine_module._speeds.cache_clear()


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(176, 20, "fp32"), (100, 120, "fp32"), (100, 300, "bf16")]
)
def test_auto_takes_what_is_faster_by_measurement(fp32, bf16, chosen, measured):
    measured(fp32, bf16)
    engine = Engine.create("auto")
    assert engine.precision == chosen
    assert f"{fp32} GFLOP/s in fp32, {bf16} in bf16" in engine.reason


@pytest.mark.parametrize(("fp32", "bf16"), [(176, 20), (132, 100), (100, 100), (100, 300)])
def test_bf16_asked_of_a_cpu_that_emulates_it_is_said_to_be_slow(fp32, bf16, measured):
    measured(fp32, bf16)
    said = BF16.emulation_warning()
    if fp32 / bf16 > 1.3:
        assert said == (
            f"warning: bf16 takes {fp32 / bf16:.2g} times as long as fp32 on this CPU (measured here: matrix products "
            f"at {fp32} GFLOP/s in fp32, {bf16} in bf16). For a new run set model.precision=auto."
        )
    else:
        assert said is None
    assert FP32.emulation_warning() is None


def test_the_measurement_takes_a_third_of_a_second_and_is_made_once():
    engine_module._speeds.cache_clear()
    start = time.perf_counter()
    first = Engine.create("auto")
    assert time.perf_counter() - start < 2.0  # 0.3 s on an idle machine
    start = time.perf_counter()
    assert Engine.create("auto") == first and time.perf_counter() - start < 0.1


def test_what_is_asked_for_is_taken():
    assert (BF16.precision, BF16.dtype, FP32.dtype) == ("bf16", torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="precision='fp16' is unknown. Use auto, fp32 or bf16"):
        Engine.create("fp16")


def test_one_process_is_the_main_one_and_its_own_sum():
    x = torch.randn(3)
    assert FP32.is_main and FP32.world_size == 1 and torch.equal(FP32.sum(x), x)


def test_gradients_of_several_passes_add_up_in_fp32_on_the_masters():
    """Two micro-batches; the module computes in bf16 and keeps no gradient."""
    model, exact = (LanguageModel(tiny_model(), e, learns=True) for e in (BF16, FP32))
    rollout = rollout_of()
    for _ in range(2):
        (model.logprobs(rollout, 1.0).sum() / 2).backward()
    exact.logprobs(rollout, 1.0).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for p in model.parameters())
    once = LanguageModel(tiny_model(), BF16, learns=True)
    (once.logprobs(rollout, 1.0).sum() / 2).backward()
    for (name, master), other in zip(
        model.trained().items(), exact.trained().values(), strict=True
    ):
        assert master.dtype == master.grad.dtype == torch.float32
        assert torch.equal(master, other)
        assert (master.grad - other.grad).norm() < 0.1 * other.grad.norm() + 1e-6
        assert torch.equal(master.grad, 2 * once.trained()[name].grad)


def test_sync_rounds_what_an_optimizer_changed():
    model = LanguageModel(tiny_model(), BF16, learns=True)
    before, rollout = model.version(), rollout_of()
    first = model.stats(rollout, 1.0).logprobs
    with torch.no_grad():
        for master in model.trained().values():
            master += 0.01
    assert torch.equal(model.stats(rollout, 1.0).logprobs, first)
    model.sync()
    assert not torch.equal(model.stats(rollout, 1.0).logprobs, first) and model.version() != before
    for parameter, master in zip(model.parameters(), model.trained().values(), strict=True):
        assert torch.equal(parameter, master.to(torch.bfloat16))


def test_a_frozen_model_computes_the_bits_of_the_model_that_learns():
    learner, frozen = (
        LanguageModel(tiny_model(), BF16, learns=True),
        LanguageModel(tiny_model(), BF16),
    )
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
    rollout = rollout_of()
    assert torch.equal(learner.stats(rollout, 1.0).logprobs, frozen.stats(rollout, 1.0).logprobs)


@pytest.mark.parametrize("engine", [FP32, BF16], ids=["fp32", "bf16"])
def test_following_moves_by_its_share_in_fp32(engine):
    """A share of 1e-3 of a step of 1e-3 is lost in bf16."""
    model = LanguageModel(tiny_model(), engine, moves=True)
    start = {name: weight.clone() for name, weight in model.weights()}
    target = tiny_model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 1e-3
    model.follow(LanguageModel(target, FP32), 1e-3)
    for name, weight in model.weights():
        torch.testing.assert_close(
            weight - start[name], torch.full_like(weight, 1e-6), rtol=0.2, atol=0
        )
    model.follow(LanguageModel(target, FP32), 1.0)
    for (name, weight), parameter in zip(model.weights(), target.parameters(), strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-7, msg=name)
        assert torch.equal(dict(model.backbone.named_parameters())[name], weight.to(engine.dtype))


def test_the_version_covers_every_tensor_and_every_name():
    weights = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([3.0], dtype=torch.bfloat16)}
    whole = digest_of_weights(weights.items())
    for name, weight in weights.items():
        assert digest_of_weights((weights | {name: weight + 1}).items()) != whole
    assert digest_of_weights([("c", weights["b"]), ("a", weights["a"])]) != whole
    assert digest_of_weights([("b", weights["b"])]) != whole


def test_scalar_heads_are_in_fp32(make_checkpoint):
    """Hidden states of 1/256 steps: bf16 would round the products."""
    from salsa.models.scalar import scalar

    head = torch.nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 1.0]]))
    hidden = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    assert scalar(head, hidden).item() == 257.0 and scalar(head, hidden).dtype == torch.float32


def test_a_score_is_read_at_the_last_token_that_is_not_padding(make_checkpoint):
    model = load_classifier(make_checkpoint("llama").path, pad_id=0, new_head_seed=3)
    reward = RewardModel(model, tiny_tokenizer(), FP32)
    plain = reward.scores([[1, 3, 40, 41]], 100)
    assert reward.scores([[1, 3, 40, 41, 0, 0]], 100) == pytest.approx(plain, abs=1e-5)
    assert reward.scores([[1, 3, 40]], 100) != pytest.approx(plain, abs=1e-3)


def test_the_padding_row_learns(make_checkpoint):
    """Transformers' padding_idx would give it no gradient, and it may be EOS's row."""
    checkpoint = make_checkpoint("llama", 0)
    model = LanguageModel.load(checkpoint.path, FP32, learns=True)
    assert model.backbone.get_input_embeddings().padding_idx is None
    critic = ValueModel.load(checkpoint.path, FP32, pad_id=0, new_head_seed=0)
    assert critic.trunk.get_input_embeddings().padding_idx is None


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_the_environment(make_checkpoint, tmp_path):
    """HF_HUB_OFFLINE makes a tokenizer remember `local_files_only`."""
    import os

    code = (
        "import sys; from pathlib import Path; from salsa.models import *\n"
        "from salsa.runtime.engine import Engine\n"
        "path, out = map(Path, sys.argv[1:])\n"
        "LanguageModel.load(path, Engine.create('fp32')).save(load_tokenizer(path), out)\n"
        "from salsa.artifacts import sha256_tree; print(sha256_tree(out))"
    )
    digests = set()
    for name, extra in (("on", {}), ("off", {"HF_HUB_OFFLINE": "1"})):
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | extra
        command = [
            sys.executable,
            "-c",
            code,
            str(make_checkpoint("llama", 0).path),
            str(tmp_path / name),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1
